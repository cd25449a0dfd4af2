"""A receiver of slime's disk deltas, rebuilt from wire-format §3 to §5; it is in no package.

It globs the shards, as the original does, streams each frame over the old bytes in place and
compares the checksum at the end. The original writes into its local checkpoint; this one into a
copy, which takes the name of the output when all is well.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import xxhash
import zstandard
from safetensors import safe_open

from tests.conformance.adapters import complete

READS = ("slime/adler32", "slime/xxh3-128", "slime/blake3")
INDEX = "model.safetensors.index.json"


class Adler32:
    def __init__(self) -> None:
        self.value = 1

    def update(self, data: bytes) -> None:
        self.value = zlib.adler32(data, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"


CHECKSUMS: dict[str, Any] = {
    "adler32": Adler32,
    "xxh3-128": xxhash.xxh3_128,
    "blake3": blake3.blake3,
}


def apply(base: Path, delta: Path, out: Path) -> None:
    index = json.loads((delta / INDEX).read_bytes())
    metadata, homes = index["metadata"], index["weight_map"]
    if metadata["delta_encoding"] != "xor" or metadata["compression_format"] != "zstd":
        raise ValueError(f"cannot read {metadata}")
    paths = sorted(delta.glob("*.safetensors"))
    if absent := set(homes.values()) - {path.name for path in paths}:
        raise ValueError(f"no such file: {absent}")
    with complete(out) as copy:
        shutil.copytree(base, copy)
        places = {name: place for path in copy.glob("*.safetensors") for name, place in spans(path)}
        seen = set()
        for path in paths:
            with safe_open(path, framework="np") as shard:
                texts = shard.metadata() or {}
                for name in shard.keys():  # noqa: SIM118
                    checksum = CHECKSUMS[metadata["checksum_format"]]()
                    install(shard.get_tensor(name).tobytes(), *places[name], checksum)
                    if checksum.hexdigest() != texts[name]:
                        raise ValueError(f"{name}: checksum")
                    seen.add(name)
        if missing := homes.keys() - seen:
            raise ValueError(f"no payload for {sorted(missing)}")


def spans(path: Path) -> list[tuple[str, tuple[Path, int, int]]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
    head.pop("__metadata__", None)
    ends = {name: entry["data_offsets"] for name, entry in head.items()}
    return [(name, (path, 8 + size + start, end - start)) for name, (start, end) in ends.items()]


def install(frame: bytes, path: Path, offset: int, size: int, checksum: Any) -> None:
    with path.open("r+b") as file, zstandard.ZstdDecompressor().stream_reader(frame) as reader:
        for at in range(0, size, 1 << 20):
            length = min(1 << 20, size - at)
            change = reader.read(length)
            if len(change) != length:
                raise ValueError(f"frame ends after {at + len(change)} of {size} bytes")
            file.seek(offset + at)
            old = np.frombuffer(file.read(length), np.uint8)
            new = (old ^ np.frombuffer(change, np.uint8)).tobytes()
            checksum.update(new)
            file.seek(offset + at)
            file.write(new)
        if reader.read(1):
            raise ValueError(f"frame holds more than {size} bytes")
