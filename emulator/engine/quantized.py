"""FP8 weights as float32: what a code means, times the scale of its tensor, row or block."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from agent.loading.checkpoint_files import UnsupportedModelError
from emulator.engine.feed_forward import FloatArray
from hotload.checkpoint.quantization import Block, QuantizedTensor, block_of

# How large activations were found to be: what is computed here keeps them whole.
ACTIVATION_SCALE = ".input_scale"


def e4m3(codes: bytes | bytearray) -> FloatArray:
    """Widen codes of F8_E4M3: no infinities, NaN where all bits but the sign are set."""
    return _E4M3[np.frombuffer(codes, np.uint8)]


def e5m2(codes: bytes | bytearray) -> FloatArray:
    """Widen codes of F8_E5M2, the upper half of a float16."""
    return (np.frombuffer(codes, np.uint8).astype("<u2") << 8).view("<f2").astype(np.float32)


def e8m0(codes: bytes | bytearray) -> FloatArray:
    """Widen codes of F8_E8M0, powers of two; 255 is NaN."""
    exponents = np.frombuffer(codes, np.uint8).astype(np.int32)
    # 2^128 is above what a float32 can hold, and not asked for: its code means NaN.
    powers = np.ldexp(np.float32(1), np.minimum(exponents, 254) - 127)
    powers[exponents == 255] = np.nan
    return powers


def apply_scales(
    tensors: dict[str, FloatArray], quantized: Iterable[QuantizedTensor], block: Block | None
) -> None:
    """Multiply the `quantized` tensors by the scales beside them, which are taken out.

    Args:
        block: rows and columns that share a scale, where the config says so.

    Raises:
        UnsupportedModelError: a scale is missing, or fits neither tensor, rows nor blocks.
    """
    for one in quantized:
        name, scale = one.weight.name, one.scale
        if scale is None:
            raise UnsupportedModelError(f"tensor {name!r} is quantized, and has no scale")
        shape, shared = one.weight.shape, block_of(one, block)
        if shared is None:
            shapes = f"{list(scale.shape)}, its weight {list(shape)}"
            raise UnsupportedModelError(f"scale {scale.name!r} is {shapes}")
        tensors[name] *= _spread(tensors.pop(scale.name), shape, shared)
        tensors.pop(f"{name.rpartition('.')[0]}{ACTIVATION_SCALE}", None)


def _spread(scale: FloatArray, shape: tuple[int, ...], block: Block) -> FloatArray:
    """Repeat a scale, one number a block, so that it can be multiplied with a weight of `shape`
    `[…, rows, columns]`."""
    if scale.size == 1:
        return scale.reshape(())
    rows, columns = shape[-2:]
    grid = scale.reshape(*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    spread = np.repeat(grid, block[0], axis=-2)[..., :rows, :]
    return np.repeat(spread, block[1], axis=-1)[..., :columns]


def _e4m3_table() -> FloatArray:
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, (codes & 7) / 8
    # Below the least exponent the leading 1 is missing, and the step stays.
    values = np.where(exponents == 0, mantissas, 1 + mantissas)
    values *= np.exp2(np.maximum(exponents, 1) - 7.0)
    values[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -values, values).astype(np.float32)


_E4M3 = _e4m3_table()
