"""Weights that behave like reinforcement learning, one step apart, from a seed.

fp32 master weights, N(0, σ) with σ from 0.02 to 0.05 by tensor, take Adam-normalised steps and are
rounded after each, as a trainer does. A gradient is noise around what an element's gradients agree
on, and Adam's momentum averages it, so the signs of steps are partly correlated in time. Of bf16
elements a step of 1e-6 changes about 1 %, nearly all by one unit in the last place.

Arrays hold bit patterns: unsigned integers as wide as an element, row-major, little-endian.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import (
    PREFIX_BYTES,
    ShardHeader,
    TensorInfo,
    header_size,
    read_header,
    render_header,
)

Bits = npt.NDArray[np.unsignedinteger]
Floats = npt.NDArray[np.float32]

MOMENTUM = 0.9  # Adam's beta 1
SIGNAL = 0.5  # of the gradient's noise: what an element's gradients agree on
STEPS = 2
FP8_BLOCK = 128  # rows and columns that share a scale
FP8_LARGEST = 448.0  # of e4m3
PIECE_ELEMENTS = 1 << 20

# One layer of a dense model of 2 billion parameters, and a few experts of a mixture of 30 billion.
LAYER = {
    "input_layernorm.weight": (2048,),
    "self_attn.q_proj.weight": (2048, 2048),
    "self_attn.k_proj.weight": (1024, 2048),
    "self_attn.v_proj.weight": (1024, 2048),
    "self_attn.o_proj.weight": (2048, 2048),
    "post_attention_layernorm.weight": (2048,),
    "mlp.gate_proj.weight": (6144, 2048),
    "mlp.up_proj.weight": (6144, 2048),
    "mlp.down_proj.weight": (2048, 6144),
}
EXPERTS = {f"mlp.experts.{index}.up_proj.weight": (768, 2048) for index in range(30)}
EMBEDDING = {"embed_tokens.weight": (16384, 2048)}
QUICK = 8  # a tensor has that many times fewer rows under `--quick`


@dataclass(frozen=True)
class Recipe:
    """How a data set is made, and how many of its elements change, in percent."""

    dtype: str
    learning_rate: float
    changed_percent: tuple[float, float]
    shapes: Mapping[str, tuple[int, ...]]
    still_share: float = 0.0  # of whole experts nothing is routed to, or of rows no token names


RECIPES = {
    "bf16, lr 1e-6": Recipe("BF16", 1e-6, (0.85, 1.15), LAYER),
    "bf16, lr 3e-6": Recipe("BF16", 3e-6, (2.3, 3.0), LAYER),
    "bf16, lr 1e-5": Recipe("BF16", 1e-5, (6.2, 7.6), LAYER),
    "bf16, lr 2e-4": Recipe("BF16", 2e-4, (40.0, 60.0), LAYER),
    "MoE bf16, lr 1e-6, 3 of 10 experts still": Recipe("BF16", 1e-6, (0.6, 0.9), EXPERTS, 0.3),
    "fp8 e4m3 with scales, lr 1.5e-5": Recipe("F8_E4M3", 1.5e-5, (0.7, 1.3), LAYER),
    "fp32, lr 1e-6, 18 % of the rows still": Recipe("F32", 1e-6, (79.0, 84.0), EMBEDDING, 0.18),
}


@dataclass(frozen=True)
class Change:
    """One tensor before and after a step; `dtype` is the safetensors tag."""

    name: str
    dtype: str
    old: Bits
    new: Bits


def make(title: str, *, seed: int = 0, is_quick: bool = False) -> list[Change]:
    """The tensors of the data set `title` of `RECIPES`; the same for the same seed."""
    recipe = RECIPES[title]
    changes: list[Change] = []
    for index, (name, shape) in enumerate(recipe.shapes.items()):
        shape = (shape[0] // QUICK, *shape[1:]) if is_quick and len(shape) > 1 else shape
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        is_still = recipe.shapes is EXPERTS and index % 10 < recipe.still_share * 10
        rate = 0.0 if is_still or len(shape) == 1 else recipe.learning_rate
        # Evenly spread, since the share of changes follows σ and is not to follow the seed.
        sigma = 0.02 + 0.03 * (0.618 * index % 1)
        still_share = recipe.still_share if recipe.shapes is EMBEDDING else 0.0
        masters = _masters(random, shape, sigma, rate, still_share)
        changes += _rounded(name, recipe.dtype, shape, masters)
    return changes


def changed_percent(changes: Iterable[Change]) -> float:
    """Of all elements, those whose bits differ."""
    counts = [(np.count_nonzero(one.old != one.new), one.old.size) for one in changes]
    return 100 * float(sum(changed for changed, _ in counts) / sum(size for _, size in counts))


def bfloat16(values: Floats) -> Bits:
    """fp32 rounded to bf16, to nearest even."""
    bits = values.view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (bits >> np.uint32(16)).astype(np.uint16)


def float8_e4m3(values: Floats) -> Bits:
    """fp32 of at most 448 rounded to e4m3, to nearest even: 4 bits of exponent, 3 of mantissa."""
    bits = values.view(np.uint32)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    size = bits & np.uint32(0x7FFFFFFF)
    size = size + (np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1)))
    normal = (size >> np.uint32(20)) - np.uint32((127 - 7) << 3)
    # Below 2^-6 the steps are of one size, 2^-9.
    below = np.rint(np.abs(values) * np.float32(512)).astype(np.uint32)
    return (sign | np.where(np.abs(values) < 2**-6, below, normal)).astype(np.uint8)


def _masters(
    random: np.random.Generator,
    shape: tuple[int, ...],
    sigma: float,
    rate: float,
    still_share: float,
) -> Iterator[tuple[Floats, Floats]]:
    """fp32 weights before and after the last step, some rows at a time."""
    columns, rows = shape[-1], int(np.prod(shape[:-1]))
    at_once = max(FP8_BLOCK, PIECE_ELEMENTS // columns // FP8_BLOCK * FP8_BLOCK)
    for start in range(0, rows, at_once):
        size = (min(at_once, rows - start), columns)

        def normal(size: tuple[int, int] = size) -> Floats:
            return random.standard_normal(size, np.float32)

        if len(shape) == 1:  # a norm
            before = after = np.ones(size, np.float32)
        else:
            before = after = np.float32(sigma) * normal()
            step = np.float32(rate) / np.sqrt(1 + np.float32(SIGNAL) ** 2)
            steps = np.where(random.random((size[0], 1)) < still_share, 0, step).astype(np.float32)
            agreed = np.float32(SIGNAL) * normal()
            settled = np.float32(((1 - MOMENTUM) / (1 + MOMENTUM)) ** 0.5)
            momentum = agreed + settled * normal()
            for _ in range(STEPS):
                momentum *= np.float32(MOMENTUM)
                momentum += np.float32(1 - MOMENTUM) * (agreed + normal())
                before, after = after, after - steps * momentum
        yield before, after


def _rounded(
    name: str, dtype: str, shape: tuple[int, ...], masters: Iterable[tuple[Floats, Floats]]
) -> Iterator[Change]:
    if dtype == "F8_E4M3" and len(shape) == 2:
        pieces = [(*_quantized(old), *_quantized(new)) for old, new in masters]
        codes, scales, new_codes, new_scales = map(np.concatenate, zip(*pieces, strict=True))
        yield Change(name, dtype, codes, new_codes)
        yield Change(f"{name}_scale_inv", "F32", scales, new_scales)
        return
    is_single = dtype == "F32"
    bits = [
        (old.view(np.uint32), new.view(np.uint32)) if is_single else (bfloat16(old), bfloat16(new))
        for old, new in masters
    ]
    before, after = (np.concatenate(side).reshape(shape) for side in zip(*bits, strict=True))
    yield Change(name, "F32" if is_single else "BF16", before, after)


def _quantized(values: Floats) -> tuple[Bits, Bits]:
    """e4m3 codes, and one fp32 scale for each block, as a pre-quantised checkpoint holds them."""
    rows, columns = values.shape
    blocks = values.reshape(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    scales = np.abs(blocks).max(axis=(1, 3), keepdims=True) / np.float32(FP8_LARGEST)
    codes = float8_e4m3(np.minimum(np.abs(blocks / scales), FP8_LARGEST) * np.sign(blocks))
    return codes.reshape(values.shape), scales.reshape(scales.shape[0::2]).view(np.uint32)


def image(changes: Sequence[Change], side: str) -> npt.NDArray[np.uint8]:
    """A whole safetensors file in memory; `side` is "old" or "new"."""
    data = [getattr(one, side).reshape(-1).view(np.uint8) for one in changes]
    return np.concatenate([np.frombuffer(_head(changes), np.uint8), *data])


def write_shard(directory: Path, file: str, changes: Sequence[Change]) -> None:
    """The same file below `directory`/old and `directory`/new."""
    for side in ("old", "new"):
        (directory / side).mkdir(parents=True, exist_ok=True)
        image(changes, side).tofile(directory / side / file)


def write_large_shard(directory: Path, file: str, change: Change, *, size_bytes: int) -> None:
    """As `write_shard`: one tensor of two fifths of the size, then smaller ones.

    All repeat `change`, so that a machine of little memory makes them; its own size is out of
    reach of every window here, so nothing gains by it.
    """
    rows, columns = change.old.shape
    count = -(-size_bytes // change.old.nbytes)
    counts = [count * 2 // 5] + [1] * (count - count * 2 // 5)
    entries, end = [], 0
    for index, repeats in enumerate(counts):
        start, end = end, end + repeats * change.old.nbytes
        shape = (repeats * rows, columns)
        entries.append(TensorInfo(f"part_{index}.weight", change.dtype, shape, start, end))
    for side in ("old", "new"):
        (directory / side).mkdir(parents=True, exist_ok=True)
        with open(directory / side / file, "wb") as out:
            out.write(render_header(entries, {"format": "pt"}))
            for _ in range(count):
                out.write(getattr(change, side).data)


def write_checkpoints(directory: Path, changes: list[Change], *, layers: int) -> None:
    """Two checkpoints in HuggingFace layout, `directory`/old and /new, one layer a file.

    Every layer has the same bytes: nothing looks further than one tensor, so nothing gains by it.
    """
    for layer in range(layers):
        named = [
            Change(f"model.layers.{layer}.{one.name}", one.dtype, one.old, one.new)
            for one in changes
        ]
        write_shard(directory, f"model-{layer + 1:05d}-of-{layers:05d}.safetensors", named)
    for side in ("old", "new"):
        shards = [read_head(path) for path in sorted((directory / side).glob("*.safetensors"))]
        (directory / side / INDEX_FILE).write_bytes(build_index(shards))
        (directory / side / SPEC_FILE).write_bytes(build_spec(shards))
        config = {"model_type": "llama", "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
        (directory / side / CONFIG_FILE).write_text(json.dumps(config))


def read_head(path: Path) -> ShardHeader:
    """The header of a shard on disk."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(PREFIX_BYTES)
        head += file.read(header_size(head, file=path.name, size_bytes=size_bytes) - len(head))
    return read_header(head, file=path.name, size_bytes=size_bytes)


def read(directory: Path) -> list[Change]:
    """The tensors of the only shard below `directory`/old and /new; elements of 16 bits."""
    (old,), (new,) = ((directory / side).glob("*.safetensors") for side in ("old", "new"))
    head = read_head(old)
    bits = [np.fromfile(path, np.uint16, offset=head.data_start) for path in (old, new)]
    spans = [(tensor, slice(tensor.start // 2, tensor.end // 2)) for tensor in head.tensors]
    return [
        Change(tensor.name, tensor.dtype, *(side[span].reshape(tensor.shape) for side in bits))
        for tensor, span in spans
    ]


def _head(changes: Iterable[Change]) -> bytes:
    entries, end = [], 0
    for one in changes:
        start, end = end, end + one.old.nbytes
        entries.append(TensorInfo(one.name, one.dtype, one.old.shape, start, end))
    return render_header(entries, {"format": "pt"})
