"""The gate: rows wait here until they may be begun (protocol §16). `rollout.admission` decides."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hotload.clients.inference.waiters import Waiters
from hotload.rollout.admission import Admission


class Gate:
    """Lets rows in, those of earlier parts first, so that parts end one after the other.

    Args:
        limit: C at this moment: samples that may be begun and not ended.
    """

    def __init__(self, admission: Admission, limit: Callable[[], int]) -> None:
        self._admission = admission
        self._limit = limit
        self._waiters = Waiters(self._begin_row, lambda: self.turn_back(is_kept=False))
        self._beginning: set[int] = set()

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
            self._waiters.wake()

    async def enter(self, part_number: int) -> None:
        """Wait until a row may be begun, and begin it."""
        await self._waiters.wait(part_number)

    def wake(self) -> None:
        """Let in the rows that may be begun."""
        self._waiters.wake()

    def turn_back(self, *, is_kept: bool) -> None:
        """Settle a row that was let in without a draw."""
        self._admission.end_draws(self._admission.group_size)
        self._admission.end_row()
        self.leave(is_kept=is_kept)

    def begin(self, count: int) -> None:
        """Draws of a row that is in are asked for again, or hedged."""
        self._admission.begin_draws(count)

    def end(self) -> None:
        """Count a draw as ended."""
        self._admission.end_draws()
        self._waiters.wake()

    def end_row(self) -> None:
        """Count a row's last draw as ended; the row waits to be settled."""
        self._admission.end_row()

    def leave(self, *, is_kept: bool) -> None:
        """Settle a row that has ended."""
        self._admission.settle_row(is_kept=is_kept)
        self._waiters.wake()

    def publish(self, version: int) -> bool:
        """Take note of the version that every replica serves now; tell whether it is newer."""
        is_newer = self._admission.publish(version)
        self._waiters.wake()
        return is_newer

    def supersede(self) -> None:
        """Take note that the run was taken back: what is begun now comes too late."""
        self._admission.is_superseded = True
        self._waiters.wake()

    def _begin_row(self, part_number: int) -> bool:
        """Begin a row of this part, if one may be begun."""
        if part_number > min(self._beginning, default=part_number):
            return False
        if not (self._admission.is_stale or self._admission.admits(self._limit())):
            return False
        self._admission.begin_row()
        return True
