"""Prediction: the bytes of a delta, from a sample of the tensors and before anything is encoded.

The sample is spread over all tensor bytes, one window in every stretch of equal size. Where in its
stretch a window lies follows the golden ratio: layers repeat, and windows at equal distances would
meet the same tensors in each. The same files give the same sample, so a killed cycle decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from hotload.checkpoint.safetensors import ShardHeader, TensorInfo
from hotload.delta.byte_io import read_bytes
from hotload.delta.encode import encode_tensor
from hotload.directory.files import AnyFile
from hotload.directory.shards import open_shard

SAMPLE_BYTES = 4 << 20
WINDOW_BYTES = 64 << 10
GOLDEN_RATIO = 0.6180339887498949
ALIGNMENT_BYTES = 16  # of the widest element


def predict_delta_bytes(
    base: Path, target: Callable[[str], AnyFile], shards: Sequence[ShardHeader]
) -> int:
    """Predict the bytes of all delta shards from checkpoint `base` to another.

    At most `SAMPLE_BYTES` of each are read, one window at a time, and encoded as a delta is. What
    is no larger is encoded whole, and the frames are then exactly as large.

    Args:
        target: finds a file of the other by its name.
        shards: headers of `base`; those of the other hold the same tensors.

    Raises:
        InvalidCheckpointError: a shard cannot be read.
    """
    predicted = float(sum(shard.data_start for shard in shards))
    for file, windows in groupby(_windows(shards), key=lambda window: window[0]):
        with open_shard(base / file) as old, open_shard(target(file)) as new:
            for _, span, stands_for in windows:
                before, after = (
                    read_bytes(shard, shard.header.data_start + span.start, len(span))
                    for shard in (old, new)
                )
                frame, _ = encode_tensor(before, after)
                predicted += len(frame) * stands_for
    return round(predicted)


def _windows(shards: Sequence[ShardHeader]) -> Iterator[tuple[str, range, float]]:
    """Choose (file, bytes counted from the end of its header, windows this one stands for)."""
    tensors = [(shard.file, tensor) for shard in shards for tensor in shard.tensors]
    total = sum(tensor.size_bytes for _, tensor in tensors)
    if total <= SAMPLE_BYTES:
        for file, tensor in tensors:
            yield file, range(tensor.start, tensor.end), 1.0
        return
    count = SAMPLE_BYTES // WINDOW_BYTES
    reached, each = 0, iter(tensors)
    file, tensor = next(each)
    for number in range(count):
        at = int((number + number * GOLDEN_RATIO % 1) * total / count)
        while at >= reached + tensor.size_bytes:
            reached += tensor.size_bytes
            file, tensor = next(each)
        span = _window_at(tensor, at - reached)
        yield file, span, total / count / len(span)


def _window_at(tensor: TensorInfo, offset: int) -> range:
    """Place a window at an offset of a tensor, moved back where it would leave it."""
    last = max(tensor.size_bytes - WINDOW_BYTES, 0)
    start = tensor.start + min(offset - offset % ALIGNMENT_BYTES, last)
    return range(start, min(start + WINDOW_BYTES, tensor.end))
