"""The predicted bytes of a delta against those of the delta itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import TensorSpec, serialize_file

from examples.tiny_trainer import bf16
from hotload.directory import prediction
from hotload.directory.prediction import SAMPLE_BYTES, predict_delta_bytes
from hotload.directory.shards import encode_file, read_checkpoint
from hotload.errors import InvalidCheckpointError

LAYERS = 16  # a divisor of the number of windows
ROWS, WIDTH = 2048, 256


def weights(seed: int) -> list[dict[str, np.ndarray]]:
    """16 layers of 1 MB, large enough to be sampled."""
    random_numbers = np.random.default_rng(seed)
    return [
        {
            "norm.weight": np.full(WIDTH, 0x3F80, np.uint16),
            "up.weight": bf16(0.05 * random_numbers.standard_normal((ROWS, WIDTH), np.float32)),
            "empty": np.zeros(0, np.uint16),
        }
        for _ in range(LAYERS)
    ]


def write(directory: Path, layers: list[dict[str, np.ndarray]]) -> Path:
    directory.mkdir()
    for number, tensors in enumerate(layers):
        specs = {
            f"layers.{number}.{name}": TensorSpec(
                dtype="bfloat16",
                shape=list(bits.shape),
                data_ptr=bits.ctypes.data,
                data_len=bits.nbytes,
            )
            for name, bits in tensors.items()
        }
        serialize_file(specs, str(directory / f"model-{number:05d}.safetensors"), {"format": "pt"})
    return directory


def changed(share: float, *, layers: range = range(LAYERS)) -> list[dict[str, np.ndarray]]:
    """The weights of seed 1 after a share of the elements of these layers moved."""
    moved, random_numbers = weights(1), np.random.default_rng(2)
    for number in layers:
        bits = moved[number]["up.weight"].reshape(-1)
        places = random_numbers.random(bits.size) < share
        bits[places] ^= random_numbers.integers(1, 4, int(places.sum())).astype(np.uint16)
    return moved


def encoded_bytes(base: Path, target: Path, out: Path) -> int:
    out.mkdir()
    return sum(
        encode_file(path, target / path.name, out / path.name).size_bytes
        for path in sorted(base.iterdir())
    )


CASES = {
    "nothing": changed(0),
    "a step": changed(0.01),
    "every tenth": changed(0.1),
    "every second": changed(0.5),
    "three layers of sixteen": changed(0.1, layers=range(4, 7)),
    "other weights": weights(7),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_prediction_is_near(tmp_path: Path, case: str) -> None:
    base, target = write(tmp_path / "base", weights(1)), write(tmp_path / "target", CASES[case])
    shards = read_checkpoint(base).shards
    whole = sum(shard.size_bytes for shard in shards)
    assert whole > 2 * SAMPLE_BYTES
    found, actual = (
        predict_delta_bytes(base, target.joinpath, shards),
        encoded_bytes(base, target, tmp_path / "delta"),
    )
    assert abs(found - actual) < 0.1 * actual + 0.001 * whole
    assert predict_delta_bytes(base, target.joinpath, shards) == found


def test_what_is_smaller_than_the_sample_is_foreseen_but_for_its_heads(tmp_path: Path) -> None:
    base = write(tmp_path / "base", weights(1)[:3])
    target = write(tmp_path / "target", changed(0.1)[:3])
    shards = read_checkpoint(base).shards
    assert sum(shard.size_bytes for shard in shards) < SAMPLE_BYTES
    found = predict_delta_bytes(base, target.joinpath, shards)
    actual = encoded_bytes(base, target, tmp_path / "delta")
    assert abs(found - actual) < 100 * len(shards)


def test_the_sample_is_bounded_and_meets_every_layer(tmp_path: Path) -> None:
    shards = read_checkpoint(write(tmp_path / "base", weights(1))).shards
    windows = list(prediction._windows(shards))
    assert sum(len(span) for _, span, _ in windows) <= SAMPLE_BYTES
    assert {file for file, _, _ in windows} == {shard.file for shard in shards}
    by_file = {shard.file: shard for shard in shards}
    for file, span, _ in windows:
        tensor = next(one for one in by_file[file].tensors if one.start <= span.start < one.end)
        assert span.stop <= tensor.end
    represented = sum(len(span) * stands_for for _, span, stands_for in windows)
    tensor_bytes = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors)
    assert represented == pytest.approx(tensor_bytes)
    # At equal distances they would meet the same place of each layer.
    places = {span.start for _, span, _ in windows}
    assert len(places) > len(windows) / 2


def test_a_shard_that_became_shorter_is_refused(tmp_path: Path) -> None:
    base, target = write(tmp_path / "base", weights(1)), write(tmp_path / "target", weights(7))
    shards = read_checkpoint(base).shards
    last = target / shards[-1].file
    last.write_bytes(last.read_bytes()[: 1 << 19])
    with pytest.raises(InvalidCheckpointError):
        predict_delta_bytes(base, target.joinpath, shards)
