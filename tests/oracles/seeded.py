"""Seeded pairs of shards, written by the safetensors library: one trainer step between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# name: (dtype, shape). Every width, a scalar, an empty one, one above 128 KiB, one above a piece.
SMALL: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "model.embed_tokens.weight": (torch.bfloat16, (16, 24)),
    "model.layers.0.input_layernorm.weight": (torch.bfloat16, (24,)),
    "model.layers.0.mlp.down_proj.weight": (torch.float16, (24, 9)),
    "model.layers.0.mlp.experts.weight": (torch.float8_e4m3fn, (11, 13)),
    "model.layers.0.mlp.experts.weight_scale": (torch.float32, (1, 11)),
    "model.layers.0.mlp.gate.e5m2": (torch.float8_e5m2, (7, 3)),
    "model.layers.0.position_ids": (torch.int64, (5,)),
    "model.layers.0.quantized": (torch.int8, (33,)),
    "model.layers.0.mask": (torch.bool, (19,)),
    "model.layers.0.temperature": (torch.float32, ()),
    "model.layers.0.nothing": (torch.bfloat16, (0, 24)),
    "model.layers.0.unchanged": (torch.bfloat16, (40,)),
}
LARGE = SMALL | {
    "model.layers.1.above_128_kib": (torch.bfloat16, (300, 301)),
    "model.layers.1.above_a_piece": (torch.float32, (1111, 1009)),
}
SPECIAL = np.array([0x7FC0, 0xFFC1, 0x8000, 0x0000, 0x7F80, 0xFF80, 0x0001], np.uint16)


def write_pair(
    directory: Path, seed: int, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[Path, Path]:
    """Base and target shard: random bit patterns, every NaN among them, about 2 % changed."""
    rng = np.random.default_rng(seed)
    base: dict[str, torch.Tensor] = {}
    target: dict[str, torch.Tensor] = {}
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * dtype.itemsize
        old = rng.integers(0, 256, size, np.uint8)
        if dtype == torch.bool:
            old &= 1
        if dtype == torch.bfloat16 and size >= 2 * SPECIAL.nbytes:
            old[: SPECIAL.nbytes] = SPECIAL.view(np.uint8)
        flips = rng.integers(0, 256, size, np.uint8) * (rng.random(size) < 0.02).astype(np.uint8)
        if dtype == torch.bool:
            flips &= 1
        if name.endswith("unchanged"):
            flips[:] = 0
        elif size:
            flips[-1] |= 1  # never without a change
        if dtype == torch.bfloat16 and not name.endswith("unchanged") and size:
            flips[1] ^= 0x80  # a sign alone: NaN to NaN, 0 to -0
        base[name] = _tensor(old, dtype, shape)
        target[name] = _tensor(old ^ flips, dtype, shape)
    save_file(base, directory / "base.safetensors", {"format": "pt"})
    save_file(target, directory / "target.safetensors", {"format": "pt"})
    return directory / "base.safetensors", directory / "target.safetensors"


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data.copy()).view(dtype).reshape(shape)
