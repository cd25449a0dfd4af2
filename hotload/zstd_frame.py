"""One zstd frame, written and read in pieces (wire-format §4).

"One frame per tensor, content size in the header, nothing after it, level 1." What the reader gets
comes from a store: the frame's structure is walked first, so that a second frame, trailing bytes, a
cut or another size is refused before anything is decoded or allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import zstandard

from hotload.errors import DeltaError

LEVEL = 1
WINDOW_LIMIT_BYTES = 1 << 27  # the most a frame may make its decoder allocate

_HEADER_LIMIT_BYTES = 18
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4
_RLE, _RESERVED = 1, 3

Bytes = bytes | bytearray | memoryview
Array = npt.NDArray[np.uint8]


class Readable(Protocol):
    """Bytes at positions: a file on disk, or `InMemory`."""

    @property
    def size_bytes(self) -> int:
        """Bytes there are."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on, or raise."""
        ...


class InMemory:
    """A `Readable` over bytes somebody already holds."""

    def __init__(self, data: Bytes) -> None:
        self._data = memoryview(data).cast("B")

    @property
    def size_bytes(self) -> int:
        """Bytes there are."""
        return len(self._data)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view.

        Raises:
            ValueError: it reaches past the end.
        """
        view[:] = self._data[offset : offset + len(view)]


def read_bytes(source: Readable, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on."""
    data = bytearray(size)
    source.read_into(offset, memoryview(data))
    return bytes(data)


def write_frame(
    pieces: Iterable[Array],
    size_bytes: int,
    out: BinaryIO,
    compressor: zstandard.ZstdCompressor,
) -> int:
    """Write one frame over the pieces, `size_bytes` in all, and tell the bytes written."""
    frame = compressor.compressobj(size=size_bytes)  # states the content size in the header
    length = 0
    for piece in pieces:
        length += out.write(frame.compress(piece.data))
    return length + out.write(frame.flush())


def read_frame(
    source: Readable, start: int, end: int, size_bytes: int, buffer: Array, subject: str
) -> Iterator[Array]:
    """The content of the frame that fills `start` to `end`, in pieces that fill `buffer` in turn.

    Raises:
        DeltaError: anything but one whole frame that states `size_bytes`; `subject` names it.
    """
    _check_frame(source, start, end, size_bytes, subject)
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT_BYTES)
    span: Any = _Span(source, start, end)  # read() is all the reader asks of it
    reader = decompressor.stream_reader(span, closefd=False)
    try:
        for at in range(0, size_bytes, len(buffer) or 1):
            piece = buffer[: size_bytes - at]
            filled = 0
            while filled < len(piece):
                count = reader.readinto(piece.data[filled:])
                if not count:
                    reached = f"frame ends after {at + filled} bytes"
                    raise DeltaError(subject, f"{reached}, the tensor has {size_bytes}")
                filled += count
            yield piece
        # The decoder sees the end of the frame, and a checksum in it, only when asked for more.
        if reader.read(1):
            raise DeltaError(subject, f"frame holds more than the {size_bytes} bytes it states")
    except zstandard.ZstdError as error:
        raise DeltaError(subject, f"frame does not decode: {error}") from None


class _Span:
    """The part of a `Readable` that holds a frame, as the file a zstd reader wants."""

    def __init__(self, source: Readable, start: int, end: int) -> None:
        self._source, self._at, self._end = source, start, end

    def read(self, size: int) -> bytes:
        data = read_bytes(self._source, self._at, min(size, self._end - self._at))
        self._at += len(data)
        return data


def _check_frame(source: Readable, start: int, end: int, size_bytes: int, subject: str) -> None:
    head = read_bytes(source, start, min(_HEADER_LIMIT_BYTES, end - start))
    if not head.startswith(zstandard.FRAME_HEADER):
        raise DeltaError(subject, "payload does not begin with a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(head)
        at = start + zstandard.frame_header_size(head)
    except zstandard.ZstdError as error:
        raise DeltaError(subject, f"frame header does not parse: {error}") from None
    if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise DeltaError(subject, "frame does not state its content size")
    if frame.content_size != size_bytes:
        found = f"frame states {frame.content_size} bytes"
        raise DeltaError(subject, f"{found}, the tensor has {size_bytes}")
    if frame.window_size > WINDOW_LIMIT_BYTES:
        limit = f"limit {WINDOW_LIMIT_BYTES}"
        raise DeltaError(subject, f"frame needs a window of {frame.window_size} bytes, {limit}")
    is_last = False
    while not is_last:
        if at + _BLOCK_HEADER_BYTES > end:
            raise DeltaError(subject, "frame is cut off")
        block = int.from_bytes(read_bytes(source, at, _BLOCK_HEADER_BYTES), "little")
        is_last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == _RESERVED:
            raise DeltaError(subject, "frame has a block of a reserved type")
        at += _BLOCK_HEADER_BYTES + (1 if kind == _RLE else size)
    at += _CHECKSUM_BYTES if frame.has_checksum else 0
    if at > end:
        raise DeltaError(subject, "frame is cut off")
    if at < end:
        raise DeltaError(subject, f"{end - at} bytes follow the frame")
