"""What reads bytes of strangers, each as a function that takes any bytes at all.

A target returns, or raises what is a defect: another error than the documented ones, a result that
another reader of the same bytes does not have, or more memory than input and tensors need.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import zstandard

from hotload.checkpoint.safetensors import (
    ShardHeader,
    header_size,
    read_header,
    read_json_object,
    render_header,
)
from hotload.delta import Payload, apply_shard, decode_tensor, encode_tensor, payloads
from hotload.delta.byte_io import Bytes, InMemory
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Dialect, envelope_of, parse_index
from hotload.delta.envelope import ARC_V2
from hotload.delta.fold import fold_shard
from hotload.delta.frame import FrameMethod, content_size, is_zero_frame, read_frame
from hotload.errors import DeltaError, InvalidCheckpointError

FILE = "x.safetensors"
ENVELOPES = (ARC_V2, *(envelope_of(Dialect.SLIME, checksum) for checksum in Checksum))
V0 = (Path(__file__).parents[1] / "golden" / "v0.safetensors").read_bytes()
TENSOR_LIMIT_BYTES = 1 << 20


class Growing:
    """An output in memory that no target may make longer than what it restores."""

    def __init__(self, limit_bytes: int) -> None:
        self.data, self.limit_bytes = bytearray(), limit_bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.data[offset : offset + len(view)]

    def write_at(self, offset: int, data: Bytes) -> None:
        assert offset + len(data) <= self.limit_bytes, "writes past the restored shard"
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def truncate(self, size_bytes: int) -> None:
        del self.data[size_bytes:]


def is_told(error: Exception) -> None:
    """Hold the sentence of a refusal to what a person can read."""
    assert len(str(error)) < 2000


def opened(data: bytes) -> ShardHeader:
    size = header_size(data[:8], file=FILE, size_bytes=len(data))
    assert size <= len(data)
    return read_header(data[:size], file=FILE, size_bytes=len(data))


def shard(data: bytes) -> None:
    """A file is a shard or a finding; what it says covers it without a gap, and reads back."""
    try:
        header = opened(data)
    except InvalidCheckpointError as error:
        is_told(error)
        return
    assert sum(tensor.size_bytes for tensor in header.tensors) == len(data) - header.data_start
    again = render_header(header.tensors, header.metadata)
    rendered = again + data[header.data_start :]
    assert opened(rendered).tensors == header.tensors
    assert opened(rendered).metadata == header.metadata


def header_text(data: bytes) -> None:
    """As `shard`, but the input is JSON, a NUL and the tensors, so that mutations get further."""
    text, _, tensors = data.partition(b"\0")
    shard(len(text).to_bytes(8, "little") + text + tensors)


def document(data: bytes) -> None:
    with suppress(InvalidCheckpointError):
        assert isinstance(read_json_object(data, file="x.json"), dict)


def index(data: bytes) -> None:
    try:
        found = parse_index(data)
    except DeltaError as error:
        is_told(error)
        return
    for name, file in found.weight_map.items():
        assert isinstance(name, str)
        assert "/" not in file
        assert "\\" not in file
        assert file not in ("", ".", "..")
    assert (found.lineage is None) == (found.dialect is Dialect.FIREWORKS)


def frame(data: bytes) -> None:
    """A payload has one size and one content, whoever reads it, or is refused."""
    try:
        size = content_size(InMemory(data), 0, len(data), "w")
    except DeltaError:
        is_zero_frame(InMemory(data), 0, len(data), 12)
        return
    if size > TENSOR_LIMIT_BYTES:  # which tensor could have it is the caller's to say
        return
    buffer = np.empty(min(size, 1 << 16), np.uint8)
    try:
        pieces = read_frame(InMemory(data), 0, len(data), size, buffer, "w")
        content = b"".join(piece.tobytes() for piece in pieces)
    except DeltaError:
        return
    assert content == unzip(data)
    assert not is_zero_frame(InMemory(data), 0, len(data), size) or not any(content)
    with suppress(DeltaError):  # a checksum the input cannot know
        decode_tensor(bytes(size), data, adler32=1, subject="w")


def delta(data: bytes) -> None:
    """A delta shard on v0, in every envelope: applied as a whole, or refused."""
    try:
        header = opened(data)
    except InvalidCheckpointError:
        return
    for envelope in ENVELOPES:
        out = Growing(len(V0))
        try:
            found = payloads(InMemory(data), header, envelope)
            assert all(isinstance(payload, Payload) for payload in found.values())
            apply_shard(InMemory(V0), opened(V0), found, out)
        except DeltaError as error:
            is_told(error)
            continue
        assert opened(bytes(out.data)).tensors == opened(V0).tensors


def folded(data: bytes) -> None:
    """Two payloads fold into one frame over the XOR of their contents, or are refused."""
    size = int.from_bytes(data[:2], "little")
    sources = InMemory(data[2 : 2 + size]), InMemory(data[2 + size :])
    links = [{"w": Payload(one, FILE, 0, one.size_bytes, "00000001", ARC_V2)} for one in sources]
    try:
        contents = [
            content_size(payload.source, 0, payload.end, "w")
            for link in links
            for payload in link.values()
        ]
        if max(contents) > TENSOR_LIMIT_BYTES:
            return
        out = Growing(2 * len(data) + 4 * TENSOR_LIMIT_BYTES)
        fold_shard(links, out, ARC_V2, on_bytes=lambda _: None)
    except DeltaError:
        return
    header = opened(bytes(out.data))
    try:
        first, second = (unzip(source._data) for source in sources)
    except zstandard.ZstdError:  # a single change is copied as it is; applying it will tell
        return
    result = unzip(out.data[header.data_start :])
    assert result == bytes(a ^ b for a, b in zip(first, second, strict=True))


def written(data: bytes) -> None:
    """Whatever changed between two tensors, every decoder reads it in the frame we write."""
    parts = [np.empty(0, np.uint8)]
    for at in range(0, min(len(data) - 2, 27), 3):
        kind, count, value = data[at : at + 3]
        part = np.zeros(min(count << (kind & 15), TENSOR_LIMIT_BYTES // 8), np.uint8)
        part[:: kind >> 4 or len(part) or 1] = value
        parts.append(part)
    difference = np.concatenate(parts)
    for writer in FrameMethod:
        frame, adler32 = encode_tensor(bytes(len(difference)), difference.tobytes(), writer=writer)
        assert unzip(frame) == difference.tobytes()
        content = decode_tensor(bytes(len(difference)), frame, adler32=adler32, subject="w")
        assert content == difference.tobytes()


def unzip(data: Bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(bytes(data), allow_extra_data=False)


def delta_text(data: bytes) -> None:
    """As `delta`, of JSON, a NUL and the payloads."""
    text, _, frames = data.partition(b"\0")
    delta(len(text).to_bytes(8, "little") + text + frames)


TARGETS: dict[str, Callable[[bytes], None]] = {
    found.__name__: found
    for found in (shard, header_text, document, index, frame, folded, delta, delta_text, written)
}


def any_of(data: bytes) -> None:
    """The first byte chooses the target, so that one corpus serves all."""
    if data:
        names = list(TARGETS)
        TARGETS[names[data[0] % len(names)]](data[1:])
