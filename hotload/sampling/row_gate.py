"""The gate: rows wait here until they may be begun (protocol §16). `rollout.admission` decides."""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hotload.rollout.admission import Admission


class Gate:
    """Lets rows in, those of earlier parts first, so that parts end one after the other.

    Args:
        limit: C at this moment: samples that may be begun and not ended.
    """

    def __init__(self, admission: Admission, limit: Callable[[], int]) -> None:
        self._admission = admission
        self._limit = limit
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._beginning: set[int] = set()
        self._tickets = itertools.count()

    @property
    def in_flight(self) -> int:
        """Draws that were begun and have not ended."""
        return self._admission.in_flight

    @property
    def is_stale(self) -> bool:
        """Whether what is begun now comes too late."""
        return self._admission.is_stale

    @contextmanager
    def beginning(self, part_number: int) -> Iterator[None]:
        """For as long as a part has rows to begin; rows of later parts wait until it has not."""
        self._beginning.add(part_number)
        try:
            yield
        finally:
            self._beginning.remove(part_number)
            self._wake()

    async def enter(self, part_number: int) -> None:
        """Wait until a row may be begun, and begin it."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (part_number, next(self._tickets), turn))
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was let in just before
                self.turn_back(is_kept=False)
            raise

    def turn_back(self, *, is_kept: bool) -> None:
        """A row that was let in is settled without a draw."""
        self._admission.end_draws(self._admission.group_size)
        self._admission.end_row()
        self.leave(is_kept=is_kept)

    def begin(self, count: int) -> None:
        """Draws of a row that is in are asked for again, or hedged."""
        self._admission.begin_draws(count)

    def end(self) -> None:
        """A draw ended."""
        self._admission.end_draws()
        self._wake()

    def end_row(self) -> None:
        """The last draw of a row ended; it waits to be settled."""
        self._admission.end_row()

    def leave(self, *, is_kept: bool) -> None:
        """A row that has ended is settled."""
        self._admission.settle_row(is_kept=is_kept)
        self._wake()

    def publish(self, version: int) -> bool:
        """Whether the version that every replica serves now is a newer one."""
        is_newer = self._admission.publish(version)
        self._wake()
        return is_newer

    def _wake(self) -> None:
        first = min(self._beginning, default=None)
        while self._waiting:
            part_number, _, turn = self._waiting[0]
            if turn.done():  # cancelled while it waited
                heapq.heappop(self._waiting)
            elif first is not None and part_number > first:
                return
            elif self._admission.is_stale or self._admission.admits(self._limit()):
                heapq.heappop(self._waiting)
                self._admission.begin_row()
                turn.set_result(None)
            else:
                return
