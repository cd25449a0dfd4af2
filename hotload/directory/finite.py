"""Finite: whether every weight of a checkpoint is a number. A cycle never asks: bytes are bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hotload.checkpoint.safetensors import TensorInfo
from hotload.delta.frame import PIECE_BYTES
from hotload.directory.relayout import CheckpointView
from hotload.directory.shards import OpenShard, open_shard
from hotload.quantities import plural

EXPONENTS: Mapping[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
"""The bits of an exponent, all of which are set in what is infinite or no number."""


def find_not_finite(view: CheckpointView) -> str | None:
    """Name the first tensor with a weight that is infinite or no number, and count those; None
    where there is none. Other formats than floats of 16 bits and more are not looked at.

    Raises:
        InvalidCheckpointError: a shard cannot be read.
    """
    for shard in view.checkpoint.shards:
        with open_shard(view.file(shard.file)) as opened:
            for tensor in opened.header.tensors:
                if tensor.dtype in EXPONENTS and (count := _count(opened, tensor)):
                    whole = f"{plural(math.prod(tensor.shape), 'value')}"
                    are = f"{count:,} of {whole} are infinite or no number"
                    return f"tensor {tensor.name} of {shard.file}: {are}"
    return None


def _count(opened: OpenShard, tensor: TensorInfo) -> int:
    dtype, exponent = EXPONENTS[tensor.dtype]
    start, end = (opened.header.data_start + one for one in (tensor.start, tensor.end))
    count = 0
    for at in range(start, end, PIECE_BYTES):
        piece = np.empty(min(PIECE_BYTES, end - at), np.uint8)
        opened.read_into(at, piece.data)
        bits = piece.view(dtype)
        count += int(np.count_nonzero((bits & exponent) == exponent))
    return count
