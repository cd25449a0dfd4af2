"""Blocks of a zstd frame from explicit sequences, through the system's libzstd.

The XOR of two snapshots is zeros with islands. A match finder is wasted on that: where the islands
lie is known from one scan, and libzstd's entropy stage alone (`ZSTD_compressSequences`) makes
frames of two thirds of what level 1 needs, sooner (docs/decisions/0010). Any zstd decoder
reads them.

A sequence is an island and one zero as literals, then a match at offset 1 over the zeros up to the
next island. That offset is always the most recent one, so it costs nothing; and since a piece uses
no other, pieces compressed apart may follow each other in one frame.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import numpy as np
import numpy.typing as npt
import zstandard

ByteArray = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.signedinteger]
Rows = npt.NDArray[np.uint32]

BLOCK_BYTES = 1 << 17  # the most a zstd block holds
PIECE_LIMIT_BYTES = 2 << 20

_NAMES = ("libzstd.so.1", "libzstd.1.dylib", "libzstd.dll")
_OLDEST = 10500  # before 1.5.0 the function was another
_GAP_BYTES = 4  # islands closer than this share a literal run
_SHORTEST_MATCH = 3
_PASSING_BYTES = 16 << 20
_FRAME_HEAD_BYTES = 6  # magic, descriptor, window: no content size, no checksum
_BLOCK_HEAD_BYTES = 3
_REPEATED = 1  # a block's type
# Names and numbers of zstd.h. The level only sets tables here; no match is searched.
_PARAMETERS = {
    "compressionLevel": (100, 1),
    "windowLog": (101, 17),
    "minMatch": (105, _SHORTEST_MATCH),
    "contentSizeFlag": (200, 0),
    "checksumFlag": (201, 0),
    "blockDelimiters": (1008, 1),
}
_SEARCH_REPEATED_OFFSETS = (1016, 1)  # on by itself before 1.5.5, which does not know the name


class SequenceCoder:
    """Compresses pieces of an XOR to blocks; threads may share it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._local = threading.local()
        number = library.ZSTD_versionNumber()
        self.version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"

    def blocks(
        self, difference: ByteArray, *, is_last: bool, self_check: bool = False
    ) -> bytes | None:
        """Compress `difference` into zstd blocks; None where it is all zeros.

        `difference` has at most `PIECE_LIMIT_BYTES`. Its blocks may follow those of another piece;
        `is_last` marks the last of them as the last of its frame. With `self_check` they are
        decoded again, which is sound apart: their first offset is the one of any piece before.

        Raises:
            OSError: libzstd refuses, as for want of memory.
            ValueError: the blocks do not decode to `difference`.
        """
        size = len(difference)
        padded = difference
        if size % 8:
            padded = np.zeros(-(-size // 8) * 8, np.uint8)
            padded[:size] = difference
        sequences = _sequences(padded.view(np.uint64), size)
        if sequences is None:
            return None
        frame = self._compress(difference, sequences)
        if self_check:
            self._context().require(frame, difference)
        if not is_last:
            _unmark_last_block(frame)
        return bytes(frame[_FRAME_HEAD_BYTES:])

    def _compress(self, difference: ByteArray, sequences: Rows) -> memoryview:
        """Make a frame of its own of a piece; overwritten by this thread's next."""
        context = self._context()
        out = context.out
        size = self._library.ZSTD_compressSequences(
            context.pointer,
            out.ctypes.data,
            len(out),
            sequences.ctypes.data,
            len(sequences),
            difference.ctypes.data,
            len(difference),
        )
        _check(self._library, size)
        return out.data[:size]

    def _context(self) -> _Context:
        context = getattr(self._local, "context", None)
        if context is None:
            context = self._local.context = _Context(self._library)
        return context


class _Context:
    """A compression context, its output and a decoder for it; one thread's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._free = library.ZSTD_freeCCtx
        self.pointer = library.ZSTD_createCCtx()
        if not self.pointer:
            raise MemoryError("no memory for a compression context")
        for number, value in _PARAMETERS.values():
            _check(library, library.ZSTD_CCtx_setParameter(self.pointer, number, value))
        library.ZSTD_CCtx_setParameter(self.pointer, *_SEARCH_REPEATED_OFFSETS)
        self.out = np.empty(library.ZSTD_compressBound(PIECE_LIMIT_BYTES), np.uint8)
        self._decoder = zstandard.ZstdDecompressor()
        self._decoded: ByteArray | None = None
        # glibc returns memory to the system at every free until it has seen a larger one: a piece's
        # passing arrays would be faulted in anew each time, at half the speed.
        np.empty(_PASSING_BYTES, np.uint8)

    def require(self, frame: memoryview, content: ByteArray) -> None:
        """Return if `frame` decodes to `content`.

        Raises:
            ValueError: it does not.
        """
        if self._decoded is None:
            self._decoded = np.empty(PIECE_LIMIT_BYTES + 1, np.uint8)
        room = self._decoded[: len(content) + 1]
        try:
            count = self._decoder.stream_reader(frame).readinto(room.data)
        except zstandard.ZstdError as error:
            raise ValueError(f"a piece does not decode again: {error}") from None
        if not _is_equal(room[:count], content):
            raise ValueError("a piece decodes to other bytes than were compressed")

    def __del__(self) -> None:
        self._free(getattr(self, "pointer", None))


def _is_equal(one: ByteArray, other: ByteArray) -> bool:
    """Compare word by word, where there are whole words."""
    size = len(one) // 8 * 8
    words, others = one[:size].view(np.uint64), other[:size].view(np.uint64)
    return np.array_equal(words, others) and np.array_equal(one[size:], other[size:])


@cache
def sequence_coder() -> SequenceCoder | None:
    """Find the coder of this process; None where no libzstd makes frames that decode again."""
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
            _declare(library)
            if library.ZSTD_versionNumber() >= _OLDEST and _proves(coder := SequenceCoder(library)):
                return coder
        except (OSError, AttributeError):
            continue  # no such library, no such function, or parameters it does not take
    return None


def frame_head(size_bytes: int) -> bytes:
    """Write what stands before the blocks: magic, content size, a window of one block."""
    is_long = size_bytes >= 1 << 32
    descriptor, width = (0xC0, 8) if is_long else (0x80, 4)
    window = bytes([descriptor, 7 << 3])  # 2 ** (10 + 7) bytes
    return zstandard.FRAME_HEADER + window + size_bytes.to_bytes(width, "little")


def zero_blocks(size_bytes: int, *, is_last: bool) -> bytes:
    """Write blocks that decode to zeros: four bytes for each 128 KiB."""
    whole, rest = divmod(size_bytes, BLOCK_BYTES)
    if is_last and not rest and whole:
        whole, rest = whole - 1, BLOCK_BYTES
    last = _zero_block(rest, is_last=is_last) if rest else b""
    return _zero_block(BLOCK_BYTES, is_last=False) * whole + last


def _zero_block(size_bytes: int, *, is_last: bool) -> bytes:
    """One byte, to be repeated."""
    head = size_bytes << 3 | _REPEATED << 1 | is_last
    return head.to_bytes(_BLOCK_HEAD_BYTES, "little") + b"\0"


def _sequences(words: npt.NDArray[np.uint64], size: int) -> Rows | None:
    """Rows of (offset, literals, match, 0) for the bytes of `words`; None where all are zero.

    Every block of 128 KiB begins with an island, if need be of one zero, and ends with a row that
    has no match: what remains of its literals, mostly none.
    """
    starts = np.arange(0, size, BLOCK_BYTES)
    # Two passes: words of eight bytes first, for nearly all of them are zero, then single bytes of
    # the few that are not.
    is_hot = words != 0
    is_hot[starts >> 3] = True
    hot = np.flatnonzero(is_hot)
    if len(hot) == len(starts) and not words[hot].any():
        return None
    if 3 * len(hot) > 2 * len(words):
        # Dense: literals alone are as small as many short matches, and made far sooner.
        literals = np.diff(starts, append=size)
        return np.stack([0 * literals, literals, 0 * literals, 0 * literals], 1).astype(np.uint32)
    is_nonzero = words[hot].view(np.uint8) != 0
    is_nonzero[np.searchsorted(hot, starts >> 3) << 3] = True
    inner = np.flatnonzero(is_nonzero).astype(np.int32)
    # `inner` counts bytes among the hot words alone; `places` are their positions in the piece.
    places = (hot.astype(np.int32)[inner >> 3] << 3) + (inner & 7)
    # An island goes on over short gaps: a match costs more than the few zeros it would spare.
    is_break = places[1:] - places[:-1] > _GAP_BYTES
    is_break[np.searchsorted(places, starts[1:]) - 1] = True
    return _rows(places, np.flatnonzero(is_break), starts, size)


def _rows(places: Positions, breaks: Positions, block_starts: Positions, size: int) -> Rows:
    """The rows of the islands that `breaks`, indices of their last bytes, make of `places`."""
    # A row says: `literals` bytes as they are (the island), then `match` bytes copied from `offset`
    # back. Offset 1 repeats the byte before, which is why each island keeps one zero at its end.
    count = len(breaks) + 1
    starts = np.empty(count + 1, places.dtype)  # and where the piece ends
    starts[0], starts[1:-1], starts[-1] = places[0], places[breaks + 1], size
    ends = np.empty(count, places.dtype)
    ends[:-1], ends[-1] = places[breaks], places[-1]
    ends += 2  # with the zero that the match repeats
    matches = starts[1:] - ends
    firsts = [*np.searchsorted(starts, block_starts).tolist(), count]
    lasts = np.array(firsts[1:]) - 1
    is_short = matches[lasts] < _SHORTEST_MATCH
    ends[lasts[is_short]] = starts[lasts[is_short] + 1]
    matches[lasts[is_short]] = 0
    islands = np.zeros((count, 4), np.uint32)
    islands[:, 0] = matches > 0
    islands[:, 1] = ends - starts[:-1]
    islands[:, 2] = matches
    # A block whose last island has no match ends with it; every other one with a row of zeros.
    rows = np.zeros((count + len(lasts) - int(np.count_nonzero(is_short)), 4), np.uint32)
    at = 0
    for first, following, ends_itself in zip(firsts, firsts[1:], is_short.tolist(), strict=False):
        rows[at : at + following - first] = islands[first:following]
        at += following - first + (not ends_itself)
    return rows


def _unmark_last_block(frame: memoryview) -> None:
    at = _FRAME_HEAD_BYTES
    while not frame[at] & 1:
        head = int.from_bytes(frame[at : at + _BLOCK_HEAD_BYTES], "little")
        at += _BLOCK_HEAD_BYTES + (1 if head >> 1 & 3 == _REPEATED else head >> 3)
    frame[at] &= 0xFE


def _declare(library: ctypes.CDLL) -> None:
    size, pointer, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("ZSTD_versionNumber", ctypes.c_uint, []),
        ("ZSTD_isError", ctypes.c_uint, [size]),
        ("ZSTD_getErrorName", ctypes.c_char_p, [size]),
        ("ZSTD_compressBound", size, [size]),
        ("ZSTD_createCCtx", pointer, []),
        ("ZSTD_freeCCtx", size, [pointer]),
        ("ZSTD_CCtx_setParameter", size, [pointer, integer, integer]),
        ("ZSTD_compressSequences", size, [pointer, pointer, size, pointer, size, pointer, size]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _check(library: ctypes.CDLL, result: int) -> None:
    if library.ZSTD_isError(result):
        name = library.ZSTD_getErrorName(result).decode("ascii", "replace")
        raise OSError(f"libzstd refuses: {name}")


def _proves(coder: SequenceCoder) -> bool:
    """Whether two pieces of this coder, one after the other, decode to what went in."""
    content = np.zeros(PIECE_LIMIT_BYTES + 4096, np.uint8)
    content[np.arange(5, len(content), 977)] = 1
    content[700_000:700_009] = 255
    pieces = content[:PIECE_LIMIT_BYTES], content[PIECE_LIMIT_BYTES:]
    first, last = coder.blocks(pieces[0], is_last=False), coder.blocks(pieces[1], is_last=True)
    frame = frame_head(len(content)) + (first or b"") + (last or b"")
    try:
        return zstandard.ZstdDecompressor().decompress(frame) == content.tobytes()
    except zstandard.ZstdError:
        return False
