"""Steps at once: what a failed one leaves behind."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from hotload.concurrently import both, overlap, overlap_as_they_come


async def fail() -> None:
    await asyncio.sleep(0)
    raise ValueError("it failed")


async def never_end() -> None:
    await asyncio.Event().wait()


async def as_they_come() -> AsyncIterator[Coroutine[Any, Any, None]]:
    yield never_end()
    yield fail()


@pytest.mark.parametrize(
    "steps",
    [
        lambda: both(fail(), never_end()),
        lambda: overlap([never_end(), fail(), never_end()]),
        lambda: overlap_as_they_come(as_they_come()),
    ],
    ids=["both", "overlap", "overlap_as_they_come"],
)
async def test_who_catches_the_error_can_be_cancelled_later(
    steps: Callable[[], Coroutine[Any, Any, object]],
) -> None:
    """As by Ctrl-C: a watcher outlives many cycles that fail."""
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ValueError, match="it failed"):
        await steps()
    assert task.cancelling() == 0
