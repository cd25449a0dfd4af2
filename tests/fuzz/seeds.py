"""The corpus: golden files, hostile ones among them, as inputs of `targets.any_of`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import zstandard

from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Lineage, render_index
from hotload.delta.frame import zero_frame
from tests.fuzz.targets import TARGETS

GOLDEN = Path(__file__).parents[1] / "golden"
FOUND = Path(__file__).with_name("corpus.hex")  # what a run reached more of the library with


def seeds() -> Iterator[bytes]:
    """Every input once; those in corpus.hex as they are."""
    number = {name: bytes([at]) for at, name in enumerate(TARGETS)}
    for path in sorted(GOLDEN.rglob("*.safetensors")):
        data = path.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        text, rest = data[8:size], data[size:]
        if len(data) > 4096:
            continue
        yield number["shard"] + data
        yield number["header_text"] + text + b"\0" + rest
        yield number["delta"] + data
        yield number["delta_text"] + text + b"\0" + rest
        yield number["frame"] + rest
    for path in sorted(GOLDEN.rglob("*.json")):
        yield number["document"] + path.read_bytes()
        yield number["index"] + path.read_bytes()
    for checksum in Checksum:
        for lineage in (Lineage("000002", "000001"), Lineage("run-2", "run-1")):
            yield number["index"] + render_index(lineage, checksum, {"w": "a.safetensors"})
    yield number["index"] + json.dumps({"weight_map": {"w": "a.safetensors"}}).encode()
    content = bytes(range(256)) * 40 + bytes(10_000)
    for level in (1, 3, 19):
        for has_checksum in (False, True):
            writer = zstandard.ZstdCompressor(level=level, write_checksum=has_checksum)
            yield number["frame"] + writer.compress(content)
    zeros, half = zero_frame(len(content)), zstandard.ZstdCompressor(level=1).compress(content)
    yield number["frame"] + zero_frame(300_000)
    for one, two in ((zeros, half), (half, half), (zeros, zeros), (half, zeros)):
        yield number["folded"] + len(one).to_bytes(2, "little") + one + two
    for kinds in ("1aff01 0a8000 12ff01", "29ff80 09ff00 00ff55", "0cff00 1dff01", "fd1f01 2c0301"):
        yield number["written"] + bytes.fromhex(kinds) * 3
    yield from map(bytes.fromhex, FOUND.read_text().split())
