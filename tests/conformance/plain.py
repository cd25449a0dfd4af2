"""The plain way to write and read a delta, straight from docs/wire-format.md §1 to §5.

Slow, whole tensors in memory, and nothing of `hotload` in it: what is right here is right by the
contract, not by agreement with the code under test.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import xxhash
import zstandard

try:
    import zstd  # what the vendor's package reads with
except ImportError:
    zstd = None

INDEX = "model.safetensors.index.json"
SPEC = "model.weight.spec.json"
SUFFIX = ".safetensors"
BLOCK_BYTES = 1 << 17  # no zstd block holds more
WINDOW_BYTES = 8 << 20  # every zstd decoder has to offer this much, and none more

CHECKSUMS: dict[str, Callable[[bytes], str]] = {
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
    "xxh3-128": lambda data: xxhash.xxh3_128(data).hexdigest(),
    "blake3": lambda data: blake3.blake3(data).hexdigest(),
}


@dataclass(frozen=True)
class Tensor:
    """`dtype` is the safetensors tag, `data` the raw little-endian storage."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)


Shard = dict[str, Tensor]
Shards = dict[str, Shard]  # by file name
Sides = dict[str, bytes]  # config, tokenizer: by file name


@dataclass(frozen=True)
class Dress:
    """What a receiver wants around the payloads (wire-format §3)."""

    dialect: str  # fireworks, slime, coreweave
    checksum: str = "adler32"
    version: str = ""  # Fireworks is told both in the signal, the others in the index
    base_version: str = ""

    def __str__(self) -> str:
        return f"{self.dialect}/{self.checksum}"

    def spell(self, data: bytes) -> str:
        text = CHECKSUMS[self.checksum](data)
        return str(int(text, 16)) if self.dialect == "fireworks" else text

    def step(self, number: int) -> Dress:
        """The dress of delta `number`, from 1 on: its version and the one it follows."""
        name = "{:06d}" if self.dialect == "slime" else "run-{:06d}-0badcafe"
        return Dress(self.dialect, self.checksum, name.format(number), name.format(number - 1))


# safetensors files


def render_shard(shard: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in shard.items():
        start, end = end, end + len(tensor.data)
        head[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + b"".join(t.data for t in shard.values())


def read_shard(path: Path) -> tuple[Shard, dict[str, str]]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0, f"{path.name}: a header of {size} bytes is not padded to 8"
    head: dict[str, Any] = json.loads(data[8 : 8 + size])
    metadata = head.pop("__metadata__", {})
    assert all(isinstance(value, str) for value in metadata.values()), path.name
    body = memoryview(data)[8 + size :]
    shard, end = {}, 0
    for name, entry in sorted(head.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        assert start == end, f"{path.name}: {name} starts at {start}, the one before ends at {end}"
        shard[name] = Tensor(entry["dtype"], tuple(entry["shape"]), bytes(body[start:stop]))
        end = stop
    assert end == len(body), f"{path.name}: {len(body) - end} bytes belong to no tensor"
    return shard, metadata


def write_checkpoint(directory: Path, shards: Shards, sides: Sides) -> Path:
    directory.mkdir(parents=True)
    for file, shard in shards.items():
        (directory / file).write_bytes(render_shard(shard, {"format": "pt"}))
    for file, data in sides.items():
        (directory / file).write_bytes(data)
    return directory


def read_checkpoint(directory: Path) -> Shards:
    paths = sorted(directory.glob(f"*{SUFFIX}"))
    return {path.name: read_shard(path)[0] for path in paths}


# zstd frames


def unzip(frame: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(frame)


def level_1(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(content)


def frame_head(size: int) -> bytes:
    """Magic and header of a single-segment frame that states `size`."""
    if size < 256:
        text = b"\x20" + size.to_bytes(1, "little")
    elif size < 65_792:
        text = b"\x60" + (size - 256).to_bytes(2, "little")
    elif size < 1 << 32:
        text = b"\xa0" + size.to_bytes(4, "little")
    else:
        text = b"\xe0" + size.to_bytes(8, "little")
    return b"\x28\xb5\x2f\xfd" + text


def raw_block(content: bytes, *, is_last: bool) -> bytes:
    return (is_last | len(content) << 3).to_bytes(3, "little") + content


def run_block(byte: int, size: int, *, is_last: bool) -> bytes:
    return (is_last | 1 << 1 | size << 3).to_bytes(3, "little") + bytes([byte])


def by_hand(content: bytes, block_bytes: int = BLOCK_BYTES) -> bytes:
    """A frame of raw blocks, and of runs where a block holds one byte over and over."""
    blocks = []
    for start in range(0, len(content) or 1, block_bytes):
        piece = content[start : start + block_bytes]
        is_last = start + block_bytes >= len(content)
        if piece and piece.count(piece[0]) == len(piece):
            blocks.append(run_block(piece[0], len(piece), is_last=is_last))
        else:
            blocks.append(raw_block(piece, is_last=is_last))
    return frame_head(len(content)) + b"".join(blocks)


def unframe(frame: bytes, size: int, subject: str) -> bytes:
    """The content of one frame of `size` bytes, the same by every reader there is (§4)."""
    head = zstandard.get_frame_parameters(frame)
    assert head.content_size == size, f"{subject}: states {head.content_size} bytes, not {size}"
    assert head.window_size <= max(WINDOW_BYTES, 1024), f"{subject}: window of {head.window_size}"
    content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    assert len(content) == size, f"{subject}: holds {len(content)} bytes, not {size}"
    with zstandard.ZstdDecompressor().stream_reader(frame, closefd=False) as reader:
        streamed = reader.read(size) if size else b""
        assert streamed == content, f"{subject}: a stream reads other bytes"
        assert not reader.read(1), f"{subject}: a stream reads on after the last byte"
    if zstd is not None:
        assert zstd.decompress(frame) == content, f"{subject}: python-zstd reads other bytes"
    return content


# Deltas


def xor(one: bytes, other: bytes) -> bytes:
    assert len(one) == len(other)
    return (np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).tobytes()


@dataclass
class Delta:
    """A delta directory before it is written; a test may spoil any part of it."""

    frames: dict[str, dict[str, bytes]]  # file, tensor: payload
    texts: dict[str, dict[str, str]]  # file: __metadata__
    index: dict[str, Any]  # of its own; Fireworks has the parent's among the sides
    sides: Sides
    spoil: dict[str, bytes | None] = field(default_factory=dict)  # files instead; None: left out

    def file_of(self, tensor: str) -> str:
        return next(file for file, frames in self.frames.items() if tensor in frames)

    def write(self, directory: Path) -> Path:
        files = dict(self.sides)
        if self.index:
            files[INDEX] = json.dumps(self.index, indent=1).encode()
        for file, frames in self.frames.items():
            payloads = {name: Tensor("U8", (len(data),), data) for name, data in frames.items()}
            files[file] = render_shard(payloads, self.texts[file])
        for file, data in (files | self.spoil).items():
            if data is not None:
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
                (directory / file).write_bytes(data)
        return directory


def make_delta(
    dress: Dress,
    base: Shards,
    target: Shards,
    sides: Sides,
    *,
    frame: Callable[[bytes], bytes] = level_1,
    has_every_tensor: bool = False,
) -> Delta:
    """The delta from `base` to `target`; of `sides` only Fireworks wants any (§2, §3)."""
    frames: dict[str, dict[str, bytes]] = {}
    texts: dict[str, dict[str, str]] = {}
    is_fireworks = dress.dialect == "fireworks"
    for file, shard in base.items():
        for name, old in shard.items():
            new = target[file][name]
            if is_fireworks or has_every_tensor or old.data != new.data:
                frames.setdefault(file, {})[name] = frame(xor(old.data, new.data))
                texts.setdefault(file, {})[name] = dress.spell(new.data)
    if is_fireworks:
        return Delta(frames, texts, {}, sides)
    names = {
        file: f"model-{number:05d}-of-{len(frames):05d}{SUFFIX}"
        for number, file in enumerate(frames)
    }
    index = {
        "metadata": {
            "version": dress.version,
            "base_version": dress.base_version,
            "delta_encoding": "xor",
            "compression_format": "zstd",
            "checksum_format": dress.checksum,
        },
        "weight_map": {name: names[file] for file in frames for name in frames[file]},
    }
    return Delta(
        {names[file]: payloads for file, payloads in frames.items()},
        {names[file]: found for file, found in texts.items()},
        index,
        {},
    )


def fold(deltas: Iterable[Delta]) -> Delta:
    """One delta for a chain of them: the XOR of their payloads, checksums of the last (§1).

    Every one holds the same tensors.
    """
    first, *others = deltas
    frames = first.frames
    for delta in others:
        frames = {
            file: {
                name: level_1(xor(unzip(frames[file][name]), unzip(new))) for name, new in f.items()
            }
            for file, f in delta.frames.items()
        }
    index = json.loads(json.dumps(others[-1].index))
    if index:
        index["metadata"]["base_version"] = first.index["metadata"]["base_version"]
    return Delta(frames, others[-1].texts, index, others[-1].sides)


def check_delta(directory: Path, dress: Dress, base: Path, target: Path) -> None:
    """Hold what an encoder wrote to the contract; an AssertionError says what is wrong."""
    before, after = read_checkpoint(base), read_checkpoint(target)
    files = {path.name for path in directory.iterdir()}
    assert all(path.is_file() for path in directory.iterdir()), "a sub-directory (§7)"
    if dress.dialect == "fireworks":
        _check_fireworks(directory, files, before, base)
        homes = {name: file for file, shard in before.items() for name in shard}
    else:
        homes = _check_indexed(directory, files, dress)
        changed = {
            name
            for file, shard in before.items()
            for name, tensor in shard.items()
            if tensor.data != after[file][name].data
        }
        assert homes.keys() >= changed, f"left out: {sorted(changed - homes.keys())} (§3)"
    shards = {file: read_shard(directory / file) for file in set(homes.values())}
    for file, shard in before.items():
        for name, old in shard.items():
            if name not in homes:
                continue
            payloads, texts = shards[homes[name]]
            payload, new = payloads[name], after[file][name]
            assert payload.dtype == "U8", f"{name}: payload is {payload.dtype} (§1)"
            assert payload.shape == (len(payload.data),), f"{name}: payload of {payload.shape} (§1)"
            assert texts.get(name) == dress.spell(new.data), f"{name}: checksum text (§3)"
            content = unframe(payload.data, len(old.data), name)
            assert content == xor(old.data, new.data), f"{name}: other bytes than base XOR target"


def _check_fireworks(directory: Path, files: set[str], before: Shards, base: Path) -> None:
    expected = {path.name for path in base.iterdir()}
    assert files == expected, f"files: {sorted(files ^ expected)} are not on both sides (§2)"
    for file in files:
        if not file.endswith(SUFFIX):
            assert (directory / file).read_bytes() == (base / file).read_bytes(), f"{file} (§2)"
        else:
            found = read_shard(directory / file)[0].keys()
            assert found == before[file].keys(), f"{file}: other tensors than the base's (§2)"


def _check_indexed(directory: Path, files: set[str], dress: Dress) -> dict[str, str]:
    index = json.loads((directory / INDEX).read_bytes())
    expected = {
        "version": dress.version,
        "base_version": dress.base_version,
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": dress.checksum,
    }
    found = {key: index["metadata"].get(key) for key in expected}
    assert found == expected, f"index metadata is {found} (§5)"
    homes: dict[str, str] = index["weight_map"]
    shards = {file for file in files if file.endswith(SUFFIX)}
    assert shards == set(homes.values()), f"shards {sorted(shards)} and weight_map differ (§3)"
    held = {file: set(read_shard(directory / file)[0]) for file in shards}
    assert held == {file: {n for n, f in homes.items() if f == file} for file in shards}, "(§3)"
    return homes
