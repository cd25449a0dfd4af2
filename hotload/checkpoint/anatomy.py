"""Which part of a model a tensor is of: a layer, embeddings, final norm or head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hotload.checkpoint.safetensors import ShardHeader

OTHER = "other"

# Where a part stands among the files of a checkpoint; layers of a stack follow their numbers.
Place = tuple[int, tuple[str | int, ...]]

_ORDER = ("embeddings", "layer", "final norm", "head", OTHER)
_LAYER = re.compile(r"(?:.*?\.)??(?:layers|blocks|block|h)\.\d+(?=\.|$)")
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|wpe|tok_embeddings|word_embeddings|embed_in)\."
)
_FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|norm_f|ln_f|final_layernorm|final_layer_norm)\.[^.]+$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")


def part_of(name: str) -> str | None:
    """Name what a file may hold one of: a layer by its prefix, "embeddings", "final norm" or
    "head".

    None for a tensor that belongs to no such part (wire-format §6).
    """
    if match := _LAYER.match(name):
        return match.group()
    if _EMBEDDINGS.search(name):
        return "embeddings"
    if _HEAD.search(name):
        return "head"
    return "final norm" if _FINAL_NORM.search(name) else None


def is_delta(shards: Iterable[ShardHeader], index: Mapping[str, Any] | None) -> bool:
    """Tell whether these are the shards of a delta in any dialect (wire-format §2, §5).

    The index tells, or else the payloads do: no model is made of vectors of U8 alone.
    """
    metadata = None if index is None else index.get("metadata")
    if isinstance(metadata, dict) and "delta_encoding" in metadata:
        return True
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return bool(tensors) and all(one.dtype == "U8" and len(one.shape) == 1 for one in tensors)


def place_key(name: str) -> Place:
    """Make a key that orders tensors: embeddings, layers by number, final norm, head, all else."""
    part = part_of(name) or OTHER
    if part in _ORDER:
        return _ORDER.index(part), ()
    return _ORDER.index("layer"), natural_key(part)


def natural_key(name: str) -> tuple[str | int, ...]:
    """Make a key that puts layer 2 before layer 10; no two names have the same."""
    texts = re.split(r"([0-9]+)", name)  # every second one is a number
    key: list[str | int] = []
    for text, digits in zip(texts[::2], [*texts[1::2], ""], strict=True):
        significant = digits.lstrip("0")
        key += [text, len(significant), significant]  # compares as numbers do, however long
    return (*key, name)
