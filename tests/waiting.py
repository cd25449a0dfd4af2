"""Waits for real servers and processes, so long that only what hangs fails a test."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_SECONDS = 180.0
"""Prefect's server on SQLite may stand still for a minute: deployments/README.md, "SQLite"."""
_LOOK_SECONDS = 0.02


def wait_until(is_so: Callable[[], object]) -> None:
    """Look until something is so; TimeoutError if it is not in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_LOOK_SECONDS)


async def until(look: Callable[[], Awaitable[T]], patience_seconds: float = PATIENCE_SECONDS) -> T:
    """Look until the answer is true, and return it; TimeoutError if none is in time."""
    async with asyncio.timeout(patience_seconds):
        while not (found := await look()):  # noqa: ASYNC110 - it is asked, and says nothing by itself
            await asyncio.sleep(_LOOK_SECONDS)
        return found
