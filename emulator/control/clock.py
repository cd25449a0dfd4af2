"""The emulator's clock: real time, ticks, or both; it knows when everything waits.

Whatever waits, for a moment or for an event, says so. A tick can therefore move from one due moment
to the next and return when nothing is left to do until later: no test waits for time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from hotload.clock import monotonic

LOOP_PASSES = 12  # enough for an event to wake a task that wakes a task


class Clock:
    """Seconds since its start. With `is_real` they pass by themselves, and `tick` jumps ahead."""

    def __init__(self, *, is_real: bool) -> None:
        self._is_real = is_real
        self._started_at = monotonic()
        self._skipped = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    def now(self) -> float:
        """Return the seconds since the start."""
        passed = monotonic() - self._started_at if self._is_real else 0.0
        return passed + self._skipped

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the caller as at work: a tick does not return before it waits or ends."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Let the caller, busy, wait for an event that no work of its own will bring."""
        self._change(-1)
        try:
            yield
        finally:
            self._change(1)

    async def sleep(self, seconds: float) -> None:
        """Return `seconds` later; only from a busy caller."""
        if seconds <= 0:
            return
        await self._sleep_until(self.now() + seconds)

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Wait until `event` is set or `seconds` are over; tell which. Only from a busy caller."""
        if event.is_set():
            return True
        deadline = self._sleeper(self.now() + seconds)
        waiter = asyncio.ensure_future(event.wait())
        self._change(-1)
        try:
            await asyncio.wait((waiter, deadline), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A deadline that came has counted itself busy again; one that did not is forgotten.
            if not deadline.done():
                deadline.cancel()
                self._change(1)
            elif deadline.cancelled():
                self._change(1)
            waiter.cancel()
        return event.is_set()

    async def tick(self, seconds: float) -> float:
        """Let `seconds` pass, moment by moment; returns the time when all is done."""
        target = self.now() + seconds
        await self._settle()
        while self._sleepers and self._sleepers[0][0] <= target:
            self._skipped += max(0.0, self._sleepers[0][0] - self.now())
            self._wake_due()
            await self._settle()
        self._skipped += max(0.0, target - self.now())
        return self.now()

    async def _sleep_until(self, due: float) -> None:
        sleeper = self._sleeper(due)
        self._change(-1)
        try:
            await sleeper
        except asyncio.CancelledError:
            if not sleeper.done() or sleeper.cancelled():
                self._change(1)
            raise

    def _sleeper(self, due: float) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._sleepers, (due, next(self._numbers), sleeper))
        if self._is_real:
            loop.call_later(due - self.now() + 1e-4, self._wake_due)
        return sleeper

    def _wake_due(self) -> None:
        while self._sleepers and self._sleepers[0][0] <= self.now():
            _, _, sleeper = heapq.heappop(self._sleepers)
            if not sleeper.done():
                # Busy from now on, not from when the loop gets to it: no tick may return between.
                self._change(1)
                sleeper.set_result(None)

    async def _settle(self) -> None:
        # Events set just now have woken nobody yet: let the loop pass over them.
        for _ in range(LOOP_PASSES):
            await asyncio.sleep(0)
        while self._busy:
            await self._quiet.wait()
            for _ in range(LOOP_PASSES):
                await asyncio.sleep(0)

    def _change(self, by: int) -> None:
        self._busy += by
        if self._busy:
            self._quiet.clear()
        else:
            self._quiet.set()
