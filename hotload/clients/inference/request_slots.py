"""The window's slots among coroutines (protocol §15)."""

from __future__ import annotations

from hotload.clients.inference.waiters import Waiters
from hotload.clock import monotonic
from hotload.rollout.window import Attempt, Window


class RequestSlots:
    """The window's slots, handed out in the order they were asked for."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._waiters = Waiters(lambda _: window.try_acquire(), self.abandon)

    async def acquire(self) -> None:
        """Wait for a slot."""
        await self._waiters.wait()

    def wake(self) -> None:
        """Hand out the slots that are free."""
        self._waiters.wake()

    def release(self, attempt: Attempt) -> None:
        """Give a slot back and let the window learn how its attempt ended."""
        self.window.release(attempt, monotonic())
        self._waiters.wake()

    def abandon(self) -> None:
        """Give a slot back whose attempt was cancelled."""
        self.window.abandon()
        self._waiters.wake()
