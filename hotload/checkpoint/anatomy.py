"""Which part of a model a tensor is of: a layer, embeddings, final norm or head.

A layer is recognised by its number. Embeddings and heads have usual names; under another name they
are recognised by their shape: as many rows as the vocabulary of config.json, or their partner's
shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hotload.checkpoint.safetensors import ShardHeader, TensorInfo
from hotload.checkpoint.sub_configs import vocab_size

EMBEDDINGS, FINAL_NORM, HEAD, OTHER = "embeddings", "final norm", "head", "other"

# Where a part stands among the files of a checkpoint; layers of a stack follow their numbers.
Place = tuple[int, tuple[str | int, ...]]

_ORDER = (EMBEDDINGS, "layer", FINAL_NORM, HEAD, OTHER)
_STACK = re.compile(r"(?:layers?|blocks?|^h)$")
_TOKEN_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|tok_embeddings|word_embeddings|embed_in)\."
)
_POSITIONS = re.compile(r"(?:^|\.)wpe\.")
_FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|norm_f|ln_f|final_layernorm|final_layer_norm)\.[^.]+$")
_NORM = re.compile(r"(?:^|\.)(?!\w*emb)(?:\w*norm\w*|ln_\w+)$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_LIKE_EMBEDDINGS = re.compile(r"emb|wte|shared")
_TIED_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|head)\.weight$")


@dataclass(frozen=True)
class Parts:
    """The part of every tensor of a checkpoint that belongs to one, by name (wire-format §6)."""

    tensors: tuple[TensorInfo, ...]
    by_name: Mapping[str, str]

    @cached_property
    def heads(self) -> tuple[TensorInfo, ...]:
        """The weights of heads: what a tied head would duplicate the embeddings as."""
        weights = (one for one in self.tensors if one.name.endswith(".weight"))
        return tuple(one for one in weights if self.by_name.get(one.name) == HEAD)

    @cached_property
    def embeddings(self) -> tuple[TensorInfo, ...]:
        """The embeddings of tokens and positions."""
        return tuple(one for one in self.tensors if self.by_name.get(one.name) == EMBEDDINGS)

    @cached_property
    def stacks(self) -> Mapping[str, frozenset[str]]:
        """The numbers of the layers of every stack, without leading zeros."""
        found: dict[str, set[str]] = {}
        for layer in set(self.by_name.values()).difference(_ORDER):
            stack, _, number = layer.rpartition(".")
            found.setdefault(stack, set()).add(number.lstrip("0") or "0")
        return {stack: frozenset(numbers) for stack, numbers in found.items()}

    def place(self, name: str) -> Place:
        """Make a key that orders tensors as `place_key` does."""
        return _place(self.by_name.get(name, OTHER))


def find_parts(tensors: Iterable[TensorInfo], config: Mapping[str, Any]) -> Parts:
    """Find the part of every tensor by its name, its shape and what stands beside it."""
    tensors = tuple(tensors)
    parts = {one.name: part for one in tensors if (part := part_of(one.name))}
    loose = [one for one in tensors if parts.get(one.name, OTHER) in _ORDER]
    parts |= _recognised_by_shape(loose, parts, vocab_size(config))
    # A bias or a scale goes with the weight of its module.
    modules = {_module(name): part for name, part in parts.items() if part in (EMBEDDINGS, HEAD)}
    beside_stacks = {_module(_module(layer)) for layer in set(parts.values()).difference(_ORDER)}
    for one in loose:
        module = _module(one.name)
        if one.name in parts or not module:
            continue
        if module in modules:
            parts[one.name] = modules[module]
        elif len(one.shape) == 1 and _NORM.search(module) and _module(module) in beside_stacks:
            parts[one.name] = FINAL_NORM
    return Parts(tensors, parts)


def part_of(name: str) -> str | None:
    """Name what a file may hold one of, by the tensor's name alone: a layer by its prefix,
    "embeddings", "final norm" or "head".

    None for a tensor that belongs to no such part, as far as its name tells (wire-format §6).
    """
    if layer := _layer(name):
        return layer
    if _TOKEN_EMBEDDINGS.search(name) or _POSITIONS.search(name):
        return EMBEDDINGS
    if _HEAD.search(name):
        return HEAD
    return FINAL_NORM if _FINAL_NORM.search(name) else None


def is_name_of_head(name: str) -> bool:
    """Tell whether a tensor that nobody wrote would be a head, going by its name."""
    return _TIED_HEAD.search(name) is not None


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
    return _place(part_of(name) or OTHER)


def natural_key(name: str) -> tuple[str | int, ...]:
    """Make a key that puts layer 2 before layer 10; no two names have the same."""
    texts = re.split(r"([0-9]+)", name)  # every second one is a number
    key: list[str | int] = []
    for text, digits in zip(texts[::2], [*texts[1::2], ""], strict=True):
        significant = digits.lstrip("0")
        key += [text, len(significant), significant]  # compares as numbers do, however long
    return (*key, name)


def _layer(name: str) -> str | None:
    """The prefix that names a layer: up to the first number of a stack, or, where no component is
    called one, up to the first number with a module and its tensor behind it.
    """
    components = name.split(".")
    numbers = [at for at, one in enumerate(components) if at and one.isascii() and one.isdigit()]
    named = [at for at in numbers if _STACK.search(components[at - 1])]
    others = [at for at in numbers if at + 2 < len(components)]
    for at in named or others:
        return ".".join(components[: at + 1])
    return None


def _recognised_by_shape(
    loose: Iterable[TensorInfo], parts: Mapping[str, str], size: int | None
) -> dict[str, str]:
    """Find embeddings and heads without a usual name: matrices with a row for every token."""
    matrices = [one for one in loose if len(one.shape) == 2]
    named = [one for one in matrices if parts.get(one.name) in (EMBEDDINGS, HEAD)]
    forms = {one.shape for one in named if not _POSITIONS.search(one.name)}
    forms |= {one.shape for one in matrices if one.shape[0] == size}
    unnamed = [one.name for one in matrices if one.shape in forms and one.name not in parts]
    embeddings = {name: EMBEDDINGS for name in unnamed if _LIKE_EMBEDDINGS.search(name)}
    has_embeddings = bool(embeddings) or any(_TOKEN_EMBEDDINGS.search(one.name) for one in named)
    rest = [name for name in unnamed if name not in embeddings]
    if has_embeddings:
        return embeddings | dict.fromkeys(rest, HEAD)
    return dict.fromkeys(rest, EMBEDDINGS) if len(rest) == 1 else {}


def _place(part: str) -> Place:
    if part in _ORDER:
        return _ORDER.index(part), ()
    return _ORDER.index("layer"), natural_key(part)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
