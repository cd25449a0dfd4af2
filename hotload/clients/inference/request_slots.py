"""The window's slots among coroutines (protocol §15)."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from hotload.rollout.window import Attempt, Window


class RequestSlots:
    """The window's slots, handed out in the order they were asked for."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        """Wait for a slot."""
        if not self._waiting and self.window.try_acquire():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.abandon()  # the slot was ours just before we were cancelled
            raise

    def release(self, attempt: Attempt) -> None:
        """Give a slot back and tell the window how its attempt ended."""
        self.window.release(attempt, time.monotonic())
        self._wake()

    def abandon(self) -> None:
        """Give a slot back whose attempt was cancelled."""
        self.window.abandon()
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # cancelled while it waited
                self._waiting.popleft()
            elif self.window.try_acquire():
                self._waiting.popleft().set_result(None)
            else:
                return
