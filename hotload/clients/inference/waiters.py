"""Coroutines that wait for their turn."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class Waiters:
    """A queue of coroutines: the smallest rank first, and then in the order they came.

    Args:
        grant: takes what the first in the queue waits for, given its rank; `False` if it cannot.
        give_back: undoes a grant whose coroutine was cancelled before it ran.
    """

    def __init__(self, grant: Callable[[int], bool], give_back: Callable[[], None]) -> None:
        self._grant = grant
        self._give_back = give_back
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    async def wait(self, rank: int = 0) -> None:
        """Wait for a grant."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (rank, next(self._arrivals), turn))
        self.wake()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back()
            raise

    def wake(self) -> None:
        """Grant what can be granted, from the front; to be called whenever that may have grown."""
        while self._queue:
            rank, _, turn = self._queue[0]
            if not turn.done():  # else it was cancelled while it waited
                if not self._grant(rank):
                    return
                turn.set_result(None)
            heapq.heappop(self._queue)
