"""A weight that is infinite or no number is found, in every float format and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.directory.finite import find_not_finite
from hotload.directory.relayout import CheckpointView
from hotload.directory.shards import read_checkpoint

BITS = {
    "BF16": ("<u2", 0x7F80, 0xFFC0, 0x7F7F),
    "F16": ("<u2", 0xFC00, 0x7E01, 0x7BFF),
    "F32": ("<u4", 0x7F800000, 0xFFC00000, 0x7F7FFFFF),
    "F64": ("<u8", 0x7FF0000000000000, 0x7FF8000000000000, 0x7FEFFFFFFFFFFFFF),
}


def view(directory: Path, dtype: str, values: np.ndarray) -> CheckpointView:
    infos = [TensorInfo("layer.weight", dtype, values.shape, 0, values.nbytes)]
    (directory / "model.safetensors").write_bytes(render_header(infos, {}) + values.tobytes())
    return CheckpointView(directory, read_checkpoint(directory))


@pytest.mark.parametrize("dtype", BITS)
def test_what_is_no_number_is_counted_and_the_largest_number_is_none(
    tmp_path: Path, dtype: str
) -> None:
    kind, infinite, none, largest = BITS[dtype]
    values = np.full(600_000, largest, kind)
    assert find_not_finite(view(tmp_path, dtype, values)) is None
    values[[0, -1]] = infinite, none
    found = (
        "tensor layer.weight of model.safetensors: 2 of 600,000 values are infinite or no number"
    )
    assert find_not_finite(view(tmp_path, dtype, values)) == found


def test_bytes_that_are_no_floats_are_not_looked_at(tmp_path: Path) -> None:
    assert find_not_finite(view(tmp_path, "U8", np.full(64, 0xFF, np.uint8))) is None
