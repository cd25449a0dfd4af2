"""A delta shard under way: frames one after the other, then the header before them."""

from __future__ import annotations

from hotload.delta.byte_io import Bytes, Writable, read_bytes
from hotload.delta.frame import PIECE_BYTES


class DeltaFile:
    """Frames are appended behind room for the longest header there can be; `close` moves them up.

    Headers tell where every frame ends, so they are known last and written first.
    """

    def __init__(self, out: Writable, room: int) -> None:
        self._out, self._room, self._end = out, room, room

    def append(self, data: Bytes) -> None:
        """Put `data` behind what is there."""
        self._out.write_at(self._end, data)
        self._end += len(data)

    def close(self, head: bytes) -> int:
        """Write `head` right before the frames, and tell the size of the file in bytes."""
        self._out.write_at(0, head)
        to = len(head)
        if to == self._room:
            return self._end
        for at in range(self._room, self._end, PIECE_BYTES):
            piece = read_bytes(self._out, at, min(PIECE_BYTES, self._end - at))
            self._out.write_at(to, piece)
            to += len(piece)
        self._out.truncate(to)
        return to
