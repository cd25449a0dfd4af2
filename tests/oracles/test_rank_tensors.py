"""Tensors of torch, as a trainer has them, are read without a copy or refused by name."""

import numpy as np
import pytest
import torch

from hotload.checkpoint.safetensors import DTYPE_BITS, TensorInfo
from hotload.clients.publish.tensors import bytes_of
from hotload.errors import InvalidCheckpointError


def served(dtype: str, *shape: int) -> TensorInfo:
    size_bytes = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
    return TensorInfo("w", dtype, shape, 0, size_bytes)


@pytest.mark.parametrize(
    ("dtype", "tag"),
    [
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.float64, "F64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.float8_e8m0fnu, "F8_E8M0"),
        (torch.uint8, "U8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.complex64, "C64"),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_storage_is_viewed(dtype: torch.dtype, tag: str, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    data = bytes_of(tensor, served(tag, *shape), "shard")
    assert data.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert not data.size or data.ctypes.data == tensor.data_ptr()


def test_a_parameter_that_learns_will_do() -> None:
    weights = torch.nn.Parameter(torch.randn(4, 6).to(torch.bfloat16))
    data = bytes_of(weights, served("BF16", 4, 6), "shard")
    assert data.ctypes.data == weights.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.ones(6, 4).T, "contiguous: found strides"),
        (torch.ones(8, 6)[::2], "contiguous: found strides"),
        (torch.ones(4, 6, device="meta"), "device: found"),
        (torch.ones(4, 6).to_sparse(), "w'"),
        (torch.ones(4, 6).half(), "dtype: found F16, expected F32"),
        (torch.ones(6, 4), "shape: found \\[6, 4\\], expected \\[4, 6\\]"),
    ],
)
def test_what_is_not_as_served_is_refused_by_name(tensor: torch.Tensor, found: str) -> None:
    with pytest.raises(InvalidCheckpointError, match=found):
        bytes_of(tensor, served("F32", 4, 6), "shard")
