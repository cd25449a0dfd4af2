"""Overlap: several steps at once, all of them or none."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def overlap(steps: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all steps in order; when one fails, the others are ended and it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(step) for step in steps]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in running]
