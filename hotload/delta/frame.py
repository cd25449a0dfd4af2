"""One zstd frame, written and read in pieces (wire-format §4).

"One frame per tensor, content size in the header, nothing after it." What the reader gets comes
from a store: the frame's structure is walked first, so that a second frame, trailing bytes, a cut
or another size is refused before anything is decoded or allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from threading import local
from typing import Any

import zstandard

from hotload.delta.byte_io import Bytes, Readable, read_bytes
from hotload.delta.libzstd import (
    BLOCK_BYTES,
    PIECE_LIMIT_BYTES,
    ByteArray,
    frame_head,
    sequence_coder,
    zero_blocks,
)
from hotload.errors import DeltaError

PIECE_BYTES = PIECE_LIMIT_BYTES  # a piece, its base and what is made of them stay in the cache
WINDOW_LIMIT_BYTES = 1 << 27  # the most a frame may make its decoder allocate

_SMALL_BYTES = 1 << 12  # in a smaller frame, tables cost what sequences gain
_EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")
HEADER_LIMIT_BYTES = 18
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4
_HEADS_BYTES = 4096  # blocks of a sparse tensor are short: several heads to a read
_RLE, _COMPRESSED, _RESERVED = 1, 2, 3
_SCRATCH = local()  # a thread's, since making one takes longer than a small tensor's frame


class FrameMethod(StrEnum):
    """A way to make frames: the smaller and faster one, and the one that always works."""

    SEQUENCES = "sequences"
    LEVEL_ONE = "zstd level 1"


def best_method() -> FrameMethod:
    """Choose sequences where the system has a libzstd for them, else level 1."""
    return FrameMethod.SEQUENCES if sequence_coder() else FrameMethod.LEVEL_ONE


def describe_method(writer: FrameMethod) -> str:
    """Name the method with the library behind it, for a report."""
    coder = sequence_coder()
    if writer is FrameMethod.SEQUENCES and coder:
        return f"{writer} (libzstd {coder.version})"
    return f"{writer} (zstandard {zstandard.__version__})"


def pack_piece(
    difference: ByteArray, *, writer: FrameMethod, is_last: bool, self_check: bool = False
) -> bytes | None:
    """Compress a piece of at most `PIECE_BYTES` for `FrameWriter.add`; None where it is all zeros.

    Pieces may be packed in any thread and any order. With sequences that is the heavy part; level 1
    compresses, and is checked, where they are added.

    Raises:
        OSError: sequences, and there is no libzstd for them, or it refuses.
        DeltaError: `self_check` was asked for, and it does not decode to `difference`.
    """
    if writer is FrameMethod.LEVEL_ONE:
        return difference.tobytes() if difference.any() else None
    if (coder := sequence_coder()) is None:
        raise OSError("no libzstd that writes sequences")
    try:
        return coder.blocks(difference, is_last=is_last, self_check=self_check)
    except ValueError as error:
        raise DeltaError("a frame", str(error)) from None


def method_for(size_bytes: int, writer: FrameMethod) -> FrameMethod:
    """Choose `writer`, or level 1 where the whole content is small."""
    return writer if size_bytes > _SMALL_BYTES else FrameMethod.LEVEL_ONE


class FrameWriter:
    """Puts packed pieces, in their order, into one frame over `size_bytes` of content.

    Nothing is written until the first piece that is not all zeros; where none comes, `end` writes
    the zero frame. With `self_check`, what level 1 writes is decoded again as it is written, and
    DeltaError raised where it is not what was added.
    """

    def __init__(
        self,
        size_bytes: int,
        write: Callable[[Bytes], object],
        *,
        writer: FrameMethod,
        self_check: bool = False,
    ) -> None:
        self.size_bytes = 0
        self._content_bytes, self._reached = size_bytes, 0
        self._write_to, self._writer = write, writer
        self._stream: Any = None
        is_level_one = writer is FrameMethod.LEVEL_ONE
        self._check = _Check() if self_check and is_level_one else None
        self._is_begun = False

    def add(self, packed: bytes | None, size_bytes: int) -> None:
        """Add the next `size_bytes` of content."""
        if packed is not None and not self._is_begun:
            self._is_begun = True
            self._begin()
        self._reached += size_bytes
        if self._is_begun:
            self._put(packed, size_bytes)

    def end(self, *, keep_zeros: bool = True) -> int:
        """Close the frame, and tell its bytes; without `keep_zeros` a frame of zeros has none."""
        if self._stream is not None:
            self._write(self._stream.flush())
            if self._check:
                self._check.end()
        elif not self._is_begun and keep_zeros:
            self._write(zero_frame(self._content_bytes))
        return self.size_bytes

    def _begin(self) -> None:
        zeros = self._reached
        if self._writer is FrameMethod.SEQUENCES:
            self._write(frame_head(self._content_bytes) + zero_blocks(zeros, is_last=False))
            return
        if not hasattr(_SCRATCH, "compressor"):
            _SCRATCH.compressor = zstandard.ZstdCompressor(level=1)
        # Its size is stated in the header. A thread writes one frame after the other.
        self._stream = _SCRATCH.compressor.compressobj(size=self._content_bytes)
        for start in range(0, zeros, PIECE_BYTES):
            self._compress(bytes(min(PIECE_BYTES, zeros - start)))

    def _put(self, packed: bytes | None, size_bytes: int) -> None:
        if self._stream is not None:
            self._compress(packed or bytes(size_bytes))
        else:
            is_last = self._reached == self._content_bytes
            self._write(packed or zero_blocks(size_bytes, is_last=is_last))

    def _compress(self, content: bytes) -> None:
        if self._check:
            self._check.expect(content)
        self._write(self._stream.compress(content))

    def _write(self, data: bytes) -> None:
        if self._check and self._stream is not None:
            self._check.see(data)
        self._write_to(data)
        self.size_bytes += len(data)


class _Check:
    """Decodes a frame as it is written; holds what went in until it has come out again."""

    def __init__(self) -> None:
        if not hasattr(_SCRATCH, "decompressor"):
            _SCRATCH.decompressor = zstandard.ZstdDecompressor()
        self._decoder = _SCRATCH.decompressor.decompressobj()
        self._expected = bytearray()

    def expect(self, content: bytes) -> None:
        self._expected += content

    def see(self, data: bytes) -> None:
        try:
            found = self._decoder.decompress(data)
        except zstandard.ZstdError as error:
            raise DeltaError("a frame", f"does not decode again: {error}") from None
        if not self._expected.startswith(found):
            raise DeltaError("a frame", "decodes to other bytes than were compressed")
        del self._expected[: len(found)]

    def end(self) -> None:
        if self._expected or not self._decoder.eof:
            raise DeltaError("a frame", "decodes to less than was compressed")


def zero_frame(size_bytes: int) -> bytes:
    """Write the frame of a tensor that did not change: 4 bytes for each 128 KiB.

    Known by comparison, so that nothing has to be decoded to see that a tensor is unchanged.
    """
    if size_bytes == 0:
        return _EMPTY_FRAME
    return frame_head(size_bytes) + zero_blocks(size_bytes, is_last=True)


def is_zero_frame(source: Readable, start: int, end: int, size_bytes: int) -> bool:
    """Tell whether the payload is the zero frame of `size_bytes`, as written here."""
    expected_bytes = zero_frame_bytes(size_bytes)
    return end - start == expected_bytes and read_bytes(
        source, start, expected_bytes
    ) == zero_frame(size_bytes)


def zero_frame_bytes(size_bytes: int) -> int:
    """Return the length of `zero_frame(size_bytes)`, which a hostile size would make long."""
    if size_bytes == 0:
        return len(_EMPTY_FRAME)
    return len(frame_head(size_bytes)) + 4 * -(-size_bytes // BLOCK_BYTES)


def content_size(
    source: Readable, start: int, end: int, subject: str, *, expected: int | None = None
) -> int:
    """Read the size that the one frame from `start` to `end` states; nothing is decoded.

    Raises:
        DeltaError: anything but one whole frame that states its content size, or another size than
        `expected`.
    """
    frame, blocks_start = _read_head(source, start, end, subject)
    if expected is not None and frame.content_size != expected:
        found = f"frame states {frame.content_size} bytes"
        raise DeltaError(subject, f"{found}, the tensor has {expected}")
    if frame.window_size > WINDOW_LIMIT_BYTES:
        limit = f"limit {WINDOW_LIMIT_BYTES}"
        raise DeltaError(subject, f"frame needs a window of {frame.window_size} bytes, {limit}")
    _walk_blocks(source, blocks_start, end, frame.has_checksum, subject)
    return int(frame.content_size)


def read_frame(
    source: Readable, start: int, end: int, size_bytes: int, buffer: ByteArray, subject: str
) -> Iterator[ByteArray]:
    """Decode the frame that fills `start` to `end`, in pieces that fill `buffer` in turn.

    Raises:
        DeltaError: anything but one whole frame that states `size_bytes`; `subject` names it.
    """
    content_size(source, start, end, subject, expected=size_bytes)
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
        if "not enough memory" in str(error):
            raise MemoryError(f"{subject}: no memory to decode its frame") from None
        raise DeltaError(subject, f"frame does not decode: {error}") from None


class _Span:
    """The part of a `Readable` that holds a frame, as the file a zstd reader wants."""

    def __init__(self, source: Readable, start: int, end: int) -> None:
        self._source, self._at, self._end = source, start, end

    def read(self, size: int) -> bytes:
        data = read_bytes(self._source, self._at, min(size, self._end - self._at))
        self._at += len(data)
        return data


def _read_head(source: Readable, start: int, end: int, subject: str) -> tuple[Any, int]:
    """The frame's parameters and where its blocks begin."""
    head = read_bytes(source, start, min(HEADER_LIMIT_BYTES, end - start))
    if not head.startswith(zstandard.FRAME_HEADER):
        raise DeltaError(subject, "payload does not begin with a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(head)
        blocks_start = start + zstandard.frame_header_size(head)
    except zstandard.ZstdError as error:
        raise DeltaError(subject, f"frame header does not parse: {error}") from None
    if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise DeltaError(subject, "frame does not state its content size")
    return frame, blocks_start


def _walk_blocks(source: Readable, at: int, end: int, has_checksum: bool, subject: str) -> None:
    heads, heads_start = b"", at
    is_last = False
    while not is_last:
        if at + _BLOCK_HEADER_BYTES > end:
            raise DeltaError(subject, "frame is cut off")
        if at + _BLOCK_HEADER_BYTES > heads_start + len(heads):
            heads, heads_start = read_bytes(source, at, min(_HEADS_BYTES, end - at)), at
        place = at - heads_start
        block = int.from_bytes(heads[place : place + _BLOCK_HEADER_BYTES], "little")
        is_last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == _RESERVED:
            raise DeltaError(subject, "frame has a block of a reserved type")
        if not size and kind == _COMPRESSED:  # libzstd's stream reader skips it, its other refuses
            raise DeltaError(subject, "frame has a compressed block of no bytes")
        if not size and not is_last:  # nobody writes such, and millions fit into a small file
            raise DeltaError(subject, "frame has an empty block before its last")
        at += _BLOCK_HEADER_BYTES + (1 if kind == _RLE else size)
    at += _CHECKSUM_BYTES if has_checksum else 0
    if at > end:
        raise DeltaError(subject, "frame is cut off")
    if at < end:
        raise DeltaError(subject, f"{end - at} bytes follow the frame")
