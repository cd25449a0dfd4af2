"""A tensor of more than 2 GiB, written and restored: `python -m tests.conformance … --large`.

Needs some minutes, 10 GB of disk and, with some implementations, as much memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import zstandard

from tests.conformance.adapters import Adapter
from tests.conformance.plain import Dress

SIZE = (2 << 30) + 4096
FILE = "model.safetensors"
PIECE_BYTES = 8 << 20


def write(directory: Path, *, is_target: bool) -> Path:
    """One tensor, mostly holes; the target differs here and there, and in its last byte."""
    directory.mkdir()
    head = {"w": {"dtype": "BF16", "shape": [SIZE // 2], "data_offsets": [0, SIZE]}}
    text = json.dumps(head).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with (directory / FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + SIZE)
        for offset in range(1_000_000, SIZE, 7_654_321):
            file.seek(start + offset)
            file.write(b"\x40" if is_target else b"\x3f")
        file.seek(start + SIZE - 1)
        file.write(b"\x01" if is_target else b"\x02")
    index = {"metadata": {"total_size": SIZE}, "weight_map": {"w": FILE}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return directory


def pieces(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(PIECE_BYTES):
            yield piece


def digest(path: Path, start: int) -> str:
    total = hashlib.sha256()
    for piece in pieces(path, start):
        total.update(piece)
    return total.hexdigest()


def head_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_large(large: tuple[Adapter, Adapter, Dress], tmp_path: Path) -> None:
    encoder, receiver, dress = large
    base = write(tmp_path / "base", is_target=False)
    target = write(tmp_path / "target", is_target=True)
    encoder.encode(base, target, tmp_path / "delta", dress)
    (delta,) = (tmp_path / "delta").glob("*.safetensors")
    frame = delta.read_bytes()[head_bytes(delta) :]
    assert zstandard.get_frame_parameters(frame).content_size == SIZE
    reader = zstandard.ZstdDecompressor().stream_reader(frame, closefd=False)
    before, after = (pieces(each / FILE, head_bytes(each / FILE)) for each in (base, target))
    for old, new in zip(before, after, strict=True):
        change = reader.read(len(old))
        assert int.from_bytes(change) == int.from_bytes(old) ^ int.from_bytes(new)
    assert not reader.read(1)
    receiver.apply(base, tmp_path / "delta", tmp_path / "restored")
    restored = tmp_path / "restored" / FILE
    assert digest(restored, head_bytes(restored)) == digest(
        target / FILE, head_bytes(target / FILE)
    )
