"""Directories, headers and indexes that lie (wire-format §6, §7, §11)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.conformance.cases import Build, Spoil, V, W, spoiled
from tests.conformance.plain import INDEX, Delta, Dress, Tensor, render_shard

Head = dict[str, Any]


def index_lists_a_missing_file(delta: Delta, dress: Dress) -> None:
    delta.spoil[delta.file_of(V)] = None


def stray_shard(delta: Delta, dress: Dress) -> None:
    delta.spoil["stray.safetensors"] = render_shard(
        {"model.layers.9.w": Tensor("U8", (1,), b"x")}, {}
    )


def in_two_shards(delta: Delta, dress: Dress) -> None:
    file, other = delta.file_of(W), delta.file_of(V)
    delta.frames[other][W], delta.texts[other][W] = delta.frames[file][W], delta.texts[file][W]


def header(change: Callable[[bytes, bytes], bytes]) -> Spoil:
    """Put `change(JSON header, payloads)` in the place of the shard that holds W."""

    def spoil(delta: Delta, dress: Dress) -> None:
        file = delta.file_of(W)
        frames = {name: Tensor("U8", (len(f),), f) for name, f in delta.frames[file].items()}
        data = render_shard(frames, delta.texts[file])
        size = int.from_bytes(data[:8], "little")
        delta.spoil[file] = change(data[8 : 8 + size].rstrip(), data[8 + size :])

    return spoil


def told(text: bytes, data: bytes, size: int | None = None) -> bytes:
    """A file with this JSON header; `size` is what its prefix states."""
    text = text.ljust(-(-len(text) // 8) * 8)
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entries(change: Callable[[Head], object]) -> Spoil:
    """`change` the parsed JSON header in place, entry of W included."""

    def rewrite(text: bytes, data: bytes) -> bytes:
        head = json.loads(text)
        change(head)
        return told(json.dumps(head).encode(), data)

    return header(rewrite)


def overlap(head: Head) -> None:
    start, end = head[W]["data_offsets"]
    head["model.layers.7.w"] = {"dtype": "U8", "shape": [end - 1], "data_offsets": [start, end - 1]}


def index_is(text: bytes) -> Spoil:
    def spoil(delta: Delta, dress: Dress) -> None:
        delta.spoil[INDEX] = text

    return spoil


def mapped_to(name: object) -> Spoil:
    """The index maps W to `name`, and there is such a file if one can be made in the directory."""

    def spoil(delta: Delta, dress: Dress) -> None:
        file = delta.file_of(W)
        index = delta.index or json.loads(delta.sides[INDEX])
        index["weight_map"][W] = name
        delta.spoil[INDEX] = json.dumps(index).encode()
        frames = {key: Tensor("U8", (len(f),), f) for key, f in delta.frames[file].items()}
        if str(name).startswith("nested/"):
            delta.spoil[str(name)] = render_shard(frames, delta.texts[file])
            delta.spoil[file] = None

    return spoil


def index_with(change: Callable[[str], str]) -> Spoil:
    def spoil(delta: Delta, dress: Dress) -> None:
        index = delta.index or json.loads(delta.sides[INDEX])
        delta.spoil[INDEX] = change(json.dumps(index)).encode()

    return spoil


LAYOUT: dict[str, Build] = {
    "index-lists-a-missing-file": spoiled("refused", index_lists_a_missing_file),
    # A receiver that globs trips over these, one that follows the index never sees them.
    "stray-shard": spoiled("either", stray_shard),
    "tensor-in-two-shards": spoiled("either", in_two_shards),
    "no-index": spoiled("either", lambda delta, dress: delta.spoil.update({INDEX: None})),
}
ROBUSTNESS: dict[str, Build] = {
    "empty-shard": spoiled("refused", header(lambda text, data: b"")),
    "seven-bytes": spoiled("refused", header(lambda text, data: bytes(7))),
    "header-longer-than-file": spoiled(
        "refused", header(lambda text, data: told(text, data, 90_000_000))
    ),
    "header-of-an-exabyte": spoiled(
        "refused", header(lambda text, data: told(text, data, 1 << 60))
    ),
    "header-is-no-json": spoiled("refused", header(lambda text, data: told(b"{'w':1}", data))),
    "header-is-a-list": spoiled("refused", header(lambda text, data: told(b"[]", data))),
    "header-nested-deeply": spoiled(
        "refused",
        header(
            lambda text, data: told(b'{"__metadata__":' + b"[" * 9999 + b"]" * 9999 + b"}", data)
        ),
    ),
    "overlapping-offsets": spoiled("refused", entries(overlap)),
    "offsets-beyond-the-file": spoiled(
        "refused", entries(lambda head: head[W].update(data_offsets=[0, 1 << 40], shape=[1 << 40]))
    ),
    "negative-offsets": spoiled(
        "refused", entries(lambda head: head[W].update(data_offsets=[-8, 13]))
    ),
    "offsets-are-text": spoiled(
        "refused", entries(lambda head: head[W].update(data_offsets=["0", "21"]))
    ),
    "entry-is-null": spoiled("refused", entries(lambda head: head.update({W: None}))),
    "metadata-is-a-list": spoiled(
        "refused", entries(lambda head: head.update({"__metadata__": [1]}))
    ),
    # Not every JSON reader notices; whoever does not may take either of two equal entries.
    "tensor-twice-in-header": spoiled(
        "either",
        header(lambda text, data: told(text[:-1] + text[text.rindex(b',"' + W.encode()) :], data)),
    ),
    "shard-in-a-sub-directory": spoiled("refused", mapped_to("nested/model.safetensors")),
    "shard-above-the-directory": spoiled("refused", mapped_to("../model.safetensors")),
    "shard-by-absolute-path": spoiled("refused", mapped_to("/etc/model.safetensors")),
    "shard-name-with-nul": spoiled("refused", mapped_to("model\0.safetensors")),
    "shard-name-empty": spoiled("refused", mapped_to("")),
    "shard-is-a-number": spoiled("refused", mapped_to(7)),
    "index-is-no-json": spoiled("refused", index_is(b"{'weight_map'")),
    "index-is-a-list": spoiled("refused", index_is(b"[]")),
    "index-is-not-utf8": spoiled("refused", index_is(b'{"weight_map": {"\xff": 1}}')),
    "index-nested-deeply": spoiled(
        "refused", index_is(b'{"weight_map":' + b"[" * 9999 + b"]" * 9999 + b"}")
    ),
    "index-without-weight-map": spoiled(
        "refused", index_with(lambda text: text.replace("weight_map", "weights"))
    ),
    "weight-map-is-a-list": spoiled(
        "refused", index_is(b'{"metadata": {"delta_encoding": "xor"}, "weight_map": []}')
    ),
    "index-with-a-key-twice": spoiled(
        "either", index_with(lambda text: text[:-1] + text[text.index(', "weight_map"') :])
    ),
}
