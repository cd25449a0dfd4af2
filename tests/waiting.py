"""Waits for real servers and processes: a minute, so that only what hangs fails a test."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.02


def wait_until(is_so: Callable[[], object]) -> None:
    """Look until something is so; TimeoutError if it is not within a minute."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_LOOK_SECONDS)


async def until(look: Callable[[], Awaitable[T]], patience_seconds: float = PATIENCE_SECONDS) -> T:
    """Look until the answer is true, and return it; TimeoutError if none is within a minute."""
    async with asyncio.timeout(patience_seconds):
        while not (found := await look()):  # noqa: ASYNC110 - it is asked, and says nothing by itself
            await asyncio.sleep(_LOOK_SECONDS)
        return found
