"""A slime receiver in a page, from wire-format §5 alone: what a delta of ours meets elsewhere.

It shares no code with the library. Like the real one it believes the index, takes every
`*.safetensors` it finds, decodes streams, changes its files in place, compares checksums as text
and moves its version only after that.
"""

import json
import shutil
import struct
import zlib
from pathlib import Path

import blake3
import numpy as np
import xxhash
import zstandard

BLOCK_BYTES = 64 << 10


class Adler32:
    def __init__(self) -> None:
        self.value = 1

    def update(self, data: bytes) -> None:
        self.value = zlib.adler32(data, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"


CHECKSUMS = {"adler32": Adler32, "xxh3-128": xxhash.xxh3_128, "blake3": blake3.blake3}


def seed(local: Path, base: Path) -> None:
    """Start from the engine's own checkpoint, which is version 0."""
    shutil.copytree(base, local)
    (local / ".weight_sync").mkdir()
    _remember(local, "000000")


def pull(local: Path, source: Path, target_version: int) -> None:
    """Bring `local` up to `target_version`, one `weight_v…` directory after the other."""
    for version in range(int(applied(local)) + 1, target_version + 1):
        _apply(local, source / f"weight_v{version:06d}")


def applied(local: Path) -> str:
    return json.loads((local / ".weight_sync" / "state.json").read_text())["version"]


def _remember(local: Path, version: str) -> None:
    (local / ".weight_sync" / "state.json").write_text(json.dumps({"version": version}))


def _apply(local: Path, delta: Path) -> None:
    index = json.loads((delta / "model.safetensors.index.json").read_text())
    metadata = index["metadata"]
    assert metadata["delta_encoding"] == "xor"
    assert metadata["compression_format"] == "zstd"
    if metadata["base_version"] != applied(local):
        raise RuntimeError(f"at {applied(local)}, the delta follows {metadata['base_version']}")
    for file in index["weight_map"].values():
        if not (delta / file).is_file():
            raise FileNotFoundError(file)
    places = {name: place for path in local.glob("*.safetensors") for name, place in _places(path)}
    wrong = []
    for path in sorted(delta.glob("*.safetensors")):
        checksums = _header(path)[0]["__metadata__"]
        for name, (_, start, end) in _places(path):
            frame = path.read_bytes()[start:end]
            found = _change(places[name], frame, metadata["checksum_format"])
            if found != checksums[name]:
                wrong.append(name)
    if wrong:
        raise RuntimeError(f"checksum mismatch: {wrong}")
    _remember(local, metadata["version"])


def _change(place: tuple[Path, int, int], frame: bytes, checksum_format: str) -> str:
    path, start, end = place
    checksum = CHECKSUMS[checksum_format]()
    stream = zstandard.ZstdDecompressor().stream_reader(frame)
    with path.open("r+b") as file:
        for at in range(start, end, BLOCK_BYTES):
            file.seek(at)
            old = np.frombuffer(file.read(min(BLOCK_BYTES, end - at)), np.uint8)
            new = (old ^ np.frombuffer(stream.read(len(old)), np.uint8)).tobytes()
            file.seek(at)
            file.write(new)
            checksum.update(new)
    return checksum.hexdigest()


def _header(path: Path) -> tuple[dict, int]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def _places(path: Path) -> list[tuple[str, tuple[Path, int, int]]]:
    header, data_start = _header(path)
    return [
        (name, (path, *(data_start + offset for offset in entry["data_offsets"])))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
