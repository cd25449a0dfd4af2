"""FP8 by its definition, code by code, and matrices in it; the emulator is held to this."""

import math

import numpy as np


def value(code: int, exponent_bits: int, *, has_infinities: bool) -> float:
    """The value of one code of a format of 8 bits, as its specification reads."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if code >> 7 else 1.0
    exponent, mantissa = divmod(code & 127, 1 << mantissa_bits)
    last = (1 << exponent_bits) - 1
    if exponent == last and has_infinities:
        return math.nan if mantissa else sign * math.inf
    if exponent == last and mantissa == (1 << mantissa_bits) - 1:
        return math.nan
    bias = last >> 1
    whole = mantissa + (1 << mantissa_bits if exponent else 0)
    return sign * math.ldexp(whole, max(exponent, 1) - bias - mantissa_bits)


E4M3 = [value(code, 4, has_infinities=False) for code in range(256)]
E5M2 = [value(code, 5, has_infinities=True) for code in range(256)]
LARGEST = 448.0


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest codes of values within ±448."""
    positive = np.array(E4M3[:127])
    above = np.clip(np.searchsorted(positive, np.abs(values)), 1, 126)
    is_below = np.abs(values) - positive[above - 1] < positive[above] - np.abs(values)
    return ((above - is_below) | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def in_blocks(weight: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of E4M3 and float32 scales of a matrix, one scale for so many rows and columns."""
    height, width = weight.shape
    scales = np.empty((-(-height // rows), -(-width // columns)), "<f4")
    codes = np.empty(weight.shape, np.uint8)
    for i, top in enumerate(range(0, height, rows)):
        for j, left in enumerate(range(0, width, columns)):
            part = np.s_[top : top + rows, left : left + columns]
            scales[i, j] = np.abs(weight[part]).max() / LARGEST
            codes[part] = to_e4m3(weight[part] / scales[i, j])
    return codes, scales


def widened(codes: np.ndarray, scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """What codes and scales stand for, in float32."""
    row, column = np.indices(codes.shape)
    return np.array(E4M3, "<f4")[codes] * scales[row // rows, column // columns]
