"""Full checkpoints that may be published, and such that may not (wire-format §6, §11)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.pairs import CONFIG, random, sides_of
from tests.conformance.plain import INDEX, SPEC, Shards, Tensor, write_checkpoint

Spoil = Callable[[Path], None]
EMBED, LAYER, NORM, HEAD = (f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4))
W = "model.layers.0.mlp.down_proj.weight"


def sound() -> Shards:
    """One layer a file; embedding, norm and head each in one of their own."""
    return {
        EMBED: {"model.embed_tokens.weight": random("BF16", (24, 16), 1)},
        LAYER: {
            W: random("BF16", (16, 16), 2),
            "model.layers.0.input_layernorm.weight": random("BF16", (16,), 3),
        },
        NORM: {"model.norm.weight": random("BF16", (16,), 4)},
        HEAD: {"lm_head.weight": random("BF16", (24, 16), 5)},
    }


def with_shards(change: Callable[[Shards], Any], config: dict[str, object] | None = None) -> Spoil:
    """Another layout, with an index and a spec that describe it."""

    def write(directory: Path) -> None:
        shards = sound()
        change(shards)
        write_checkpoint(directory, shards, sides_of(shards, config))

    return write


def with_document(file: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """The sound checkpoint, one of its JSON files changed."""

    def write(directory: Path) -> None:
        sides = sides_of(sound())
        document = json.loads(sides[file])
        change(document)
        write_checkpoint(directory, sound(), {**sides, file: json.dumps(document).encode()})

    return write


def without(file: str) -> Spoil:
    def write(directory: Path) -> None:
        write_checkpoint(directory, sound(), sides_of(sound()))
        (directory / file).unlink()

    return write


def with_file(file: str, data: bytes) -> Spoil:
    def write(directory: Path) -> None:
        write_checkpoint(directory, sound(), sides_of(sound()))
        (directory / file).write_bytes(data)

    return write


def layers_mixed(shards: Shards) -> None:
    shards[LAYER]["model.layers.1.mlp.down_proj.weight"] = random("BF16", (16, 16), 6)


def tensor_parallel(shards: Shards) -> None:
    shards["model-tp_rank_00.safetensors"] = shards.pop(LAYER)


def head_tied(shards: Shards) -> None:
    del shards[HEAD]


def twice(directory: Path) -> None:
    shards = sound()
    shards[NORM][W] = shards[LAYER][W]
    write_checkpoint(directory, shards, sides_of(sound()))


def above_5_gb(directory: Path) -> None:
    """Sparse: a gigabyte takes no room on the disk."""
    size = 5_000_001_024
    shards = sound()
    shards[HEAD] = {"lm_head.weight": Tensor("BF16", (size // 32, 16), b"")}
    write_checkpoint(directory, shards, sides_of(shards))
    head = {
        "lm_head.weight": {
            "dtype": "BF16",
            "shape": [size // 32, 16],
            "data_offsets": [0, size],
        }
    }
    text = json.dumps(head).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with (directory / HEAD).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def single_file(directory: Path) -> None:
    shards = {"model.safetensors": {n: t for shard in sound().values() for n, t in shard.items()}}
    write_checkpoint(directory, shards, {"config.json": json.dumps(CONFIG).encode()})


MAY_BE_PUBLISHED: dict[str, Spoil] = {
    "sound": with_shards(lambda shards: None),
    "tied-head": with_shards(head_tied, {**CONFIG, "tie_word_embeddings": True}),
}
MAY_NOT: dict[str, Spoil] = {
    "index-lists-a-missing-file": without(LAYER),
    "no-index": without(INDEX),
    "no-spec": without(SPEC),
    "no-config": without("config.json"),
    "stray-shard": with_document(
        INDEX, lambda index: [index["weight_map"].pop("model.norm.weight")]
    ),
    "single-file": single_file,
    "tensor-in-two-shards": twice,
    "mixed-layers-in-a-file": with_shards(layers_mixed),
    "tensor-parallel-shard": with_shards(tensor_parallel),
    "file-above-5-gb": above_5_gb,
    "spec-of-another-shape": with_document(
        SPEC, lambda spec: spec["tensor_map"][W].update(shape=[16, 17])
    ),
    "spec-of-another-dtype": with_document(
        SPEC, lambda spec: spec["tensor_map"][W].update(dtype="float16")
    ),
    "spec-without-a-tensor": with_document(SPEC, lambda spec: spec["tensor_map"].pop(W)),
    "adapter-config-in-a-full": with_file("adapter_config.json", b"{}"),
    "header-longer-than-file": with_file(NORM, (1 << 30).to_bytes(8, "little") + b"{}"),
    "index-with-a-path": with_document(
        INDEX, lambda index: index["weight_map"].update({W: f"../{LAYER}"})
    ),
}
