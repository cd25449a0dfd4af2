"""Checkpoints one trainer step apart: every dtype, shape and value a delta has to carry (§11)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.conformance.plain import INDEX, SPEC, Shards, Sides, Tensor

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16", "F16": "float16",
    "I16": "int16", "U16": "uint16", "F32": "float32", "I32": "int32", "U32": "uint32",
    "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}


@dataclass(frozen=True)
class Pair:
    """A checkpoint and the one a step later; `sides` are all files that are no shard."""

    base: Shards
    target: Shards
    sides: Sides


def sides_of(shards: Shards, config: dict[str, object] | None = None) -> Sides:
    """Config, tokenizer, index and weight spec of a full checkpoint (§6)."""
    homes = {name: file for file, shard in shards.items() for name in shard}
    tensors = [(name, tensor) for shard in shards.values() for name, tensor in shard.items()]
    index = {
        "metadata": {"total_size": sum(len(tensor.data) for _, tensor in tensors)},
        "weight_map": homes,
    }
    spec = {
        "tensor_map": {
            name: {"shape": list(tensor.shape), "dtype": TORCH[tensor.dtype]}
            for name, tensor in tensors
        }
    }
    return {
        "config.json": json.dumps(config or CONFIG).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        INDEX: json.dumps(index, indent=2, sort_keys=True).encode() + b"\n",
        SPEC: json.dumps(spec, indent=2).encode(),
    }


def random(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    size = SIZES[dtype] * int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return Tensor(dtype, shape, (data & 1 if dtype == "BOOL" else data).tobytes())


def stepped(tensor: Tensor, seed: int, share: float = 0.02) -> Tensor:
    """The tensor with `share` of its elements moved by one in the last place, one at least."""
    width = SIZES[tensor.dtype]
    values = np.frombuffer(tensor.data, f"<u{width}").copy()
    generator = np.random.default_rng(seed)
    moved = generator.random(values.size) < share
    if values.size and not moved.any():
        moved[generator.integers(values.size)] = True
    values[moved] ^= 1
    return Tensor(tensor.dtype, tensor.shape, values.tobytes())


def step(shards: Shards, seed: int = 1) -> Shards:
    return {
        file: {
            name: stepped(tensor, seed + number) for number, (name, tensor) in enumerate(s.items())
        }
        for file, s in shards.items()
    }


def pair(base: Shards, target: Shards | None = None) -> Pair:
    return Pair(base, target or step(base), sides_of(base))


def one(base: Tensor, target: Tensor) -> Pair:
    """A checkpoint whose second layer holds what the case is about."""
    first = {"model.layers.0.w": random("BF16", (8, 8), 3)}
    before = {"model-1.safetensors": first, "model-2.safetensors": {"model.layers.1.w": base}}
    after = {
        **step({"model-1.safetensors": first}),
        "model-2.safetensors": {"model.layers.1.w": target},
    }
    return pair(before, after)


def raw(dtype: str, *words: int) -> Tensor:
    return Tensor(dtype, (len(words),), np.array(words, f"<u{SIZES[dtype]}").tobytes())


def dtypes() -> Pair:
    shards: Shards = {
        "model-00001-of-00003.safetensors": {
            "model.embed_tokens.weight": random("BF16", (24, 16), 1),
            "model.embed_tokens.mask": random("BOOL", (19,), 2),
        },
        "model-00002-of-00003.safetensors": {
            f"model.layers.0.{dtype.lower()}": random(dtype, (5, 7), 3)
            for dtype in SIZES
            if dtype != "BOOL"
        },
        "model-00003-of-00003.safetensors": {"lm_head.weight": random("BF16", (24, 16), 4)},
    }
    return pair(shards)


def fp8_with_scales() -> Pair:
    shards: Shards = {
        "model.safetensors": {
            "model.layers.0.mlp.down_proj.weight": random("F8_E4M3", (128, 128), 5),
            "model.layers.0.mlp.down_proj.weight_scale_inv": random("F32", (1, 1), 6),
            "model.layers.0.mlp.up_proj.weight": random("F8_E5M2", (128, 64), 7),
            "model.layers.0.mlp.up_proj.weight_scale": random("F8_E8M0", (1, 1), 8),
        }
    }
    quantized = {
        **CONFIG,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    return Pair(shards, step(shards), sides_of(shards, quantized))


def special_values() -> Pair:
    """NaNs with their payloads, both zeros, infinities, denormals: bits, not numbers."""
    before = [0x7FC0, 0xFFC1, 0x7F80, 0xFF80, 0x0000, 0x8000, 0x0001, 0x7F81, 0x3F80]
    after = [0x7FC1, 0x7FC1, 0xFF80, 0x7F80, 0x8000, 0x0000, 0x8001, 0xFF81, 0x3F80]
    return one(raw("BF16", *before), raw("BF16", *after))


def borders() -> Pair:
    """Sizes around zstd's blocks and the pieces that writers work in."""
    sizes = [n + d for n in (1 << 17, 1 << 18, 1 << 20) for d in (-1, 0, 1)]
    shard = {f"model.layers.0.{size}": random("U8", (size,), size) for size in sizes}
    return pair({"model.safetensors": shard})


def sizes() -> Pair:
    """Where the zstd header changes its form, one byte aside each."""
    found = [1, 2, 3, 4, 7, 8, 9, 255, 256, 257, 65_791, 65_792, 65_793]
    shard = {f"model.layers.0.{size}": random("U8", (size,), size) for size in found}
    return pair({"model.safetensors": shard})


def names() -> Pair:
    told = ["ä.weight", 'quoted "name"', "back\\slash", "a b", "x" * 200, "数", "w@sha256"]
    return pair({"model.safetensors": {name: random("BF16", (3, 3), len(name)) for name in told}})


def unchanged() -> Pair:
    shards = dtypes().base
    return pair(shards, shards)


def changed_all_over() -> Pair:
    """Nothing left to compress: every byte of a large tensor is another one."""
    return one(random("BF16", (300, 500), 1), random("BF16", (300, 500), 2))


def half_unchanged() -> Pair:
    base = {
        f"model-{number}.safetensors": {
            f"model.layers.{number}.w": random("BF16", (300, 300), number),
            f"model.layers.{number}.norm": random("F32", (30,), number),
        }
        for number in range(4)
    }
    stepping = step(base)
    return pair(base, base | {file: stepping[file] for file in ("model-1.safetensors",)})


def single_file() -> Pair:
    """As `save_pretrained` leaves a small model: one shard, no index, no spec."""
    shards = {"model.safetensors": {"model.layers.0.w": random("BF16", (8, 8), 1)}}
    sides = sides_of(shards)
    return Pair(
        shards, step(shards), {name: sides[name] for name in ("config.json", "tokenizer.json")}
    )


def tied_head() -> Pair:
    """No lm_head in the checkpoint: the config ties it to the embedding."""
    shards = {"model.safetensors": {"model.embed_tokens.weight": random("BF16", (24, 16), 1)}}
    return Pair(shards, step(shards), sides_of(shards, {**CONFIG, "tie_word_embeddings": True}))


ZEROS = Tensor("BF16", (400, 400), bytes(320_000))
ONES = Tensor("BF16", (400, 400), bytes.fromhex("803f") * 160_000)

PAIRS: dict[str, Callable[[], Pair]] = {
    "dtypes": dtypes,
    "fp8-with-scales": fp8_with_scales,
    "one-element": lambda: one(raw("F32", 0x3F800000), raw("F32", 0x3F800001)),
    "scalar": lambda: one(
        Tensor("F32", (), bytes(4)), Tensor("F32", (), bytes.fromhex("0000803f"))
    ),
    "no-element": lambda: one(Tensor("BF16", (0, 16), b""), Tensor("BF16", (0, 16), b"")),
    "special-values": special_values,
    "all-equal": lambda: one(ZEROS, ONES),
    "all-equal-kept": lambda: one(ONES, ONES),
    "one-bit": lambda: one(
        ZEROS, Tensor("BF16", (400, 400), bytes(199_999) + b"\x80" + bytes(120_000))
    ),
    "borders": borders,
    "sizes": sizes,
    "names": names,
    "unchanged": unchanged,
    "half-unchanged": half_unchanged,
    "changed-all-over": changed_all_over,
    "single-file": single_file,
    "tied-head": tied_head,
}
