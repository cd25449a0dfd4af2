"""Files that lie elsewhere, in a bucket say: the face that everything here reads them by, ahead of
who asks.

`hotload.clients` connects it; nothing is known here of networks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Protocol

FIRST_BYTES = 64 << 10  # of a file that may be asked for its header alone
PIECE_BYTES = 4 << 20
PIECES_AHEAD = 4


class RemoteFile(Protocol):
    """A file as it was when it was listed; equal ones have the same bytes. Any thread may read."""

    @property
    def name(self) -> str:
        """Its name in its directory."""

    @property
    def size_bytes(self) -> int:
        """Bytes it had when it was listed."""

    @property
    def modified_at(self) -> float:
        """Seconds since the epoch; 0 where nobody says."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on.

        Raises:
            InvalidCheckpointError: it is gone, was replaced, or may not be read.
            StoreUnavailableError: the network, or the store, is away.
        """

    def is_unchanged(self) -> bool:
        """Ask whether it is still what was listed; raises as `read_into`."""


class ReadAhead:
    """Reads bytes from afar: several pieces at once while they are asked for in their order, and
    else no more than is asked for. Any thread may read, one at a time.

    Holds at most `PIECES_AHEAD` pieces beside the one that is asked for.

    Args:
        fill: fills a view with the bytes from an offset on, in any thread.
    """

    def __init__(self, fill: Callable[[int, memoryview], object], size_bytes: int) -> None:
        self._fill, self._size_bytes = fill, size_bytes
        self._threads = ThreadPoolExecutor(PIECES_AHEAD, "read-ahead")
        self._pieces: deque[tuple[int, int, Future[bytearray]]] = deque()  # one behind the other
        self._end = 0  # of the last piece
        self._reached = -1  # by the last read
        self._lock = Lock()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on; raises as `fill`."""
        with self._lock:
            self._begin(offset, offset + len(view))
            for start, stop, piece in self._pieces:
                first, last = max(start, offset), min(stop, offset + len(view))
                if first < last:
                    part = memoryview(piece.result())[first - start : last - start]
                    view[first - offset : last - offset] = part

    def close(self) -> None:
        """Give up what nobody has asked for yet."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, offset: int, end: int) -> None:
        """Have the pieces from `offset` to `end` under way, and those behind them that will be
        asked for next."""
        while self._pieces and self._pieces[0][1] <= offset:
            self._pieces.popleft()
        if not self._pieces or not self._pieces[0][0] <= offset:
            for _, _, piece in self._pieces:
                piece.cancel()
            self._pieces.clear()
            self._end = offset
        if offset != self._reached:
            if self._end < end:
                self._read(max(end, offset + FIRST_BYTES))
        else:
            while self._end < end or (
                self._end < self._size_bytes and len(self._pieces) <= PIECES_AHEAD
            ):
                self._read(max(end, self._end + PIECE_BYTES))
        self._reached = end

    def _read(self, stop: int) -> None:
        start, self._end = self._end, min(stop, self._size_bytes)
        piece = self._threads.submit(self._filled, start, self._end)
        self._pieces.append((start, self._end, piece))

    def _filled(self, start: int, stop: int) -> bytearray:
        data = bytearray(stop - start)
        self._fill(start, memoryview(data))
        return data
