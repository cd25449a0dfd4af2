"""Overlap: several steps at once, all of them or none."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")


async def overlap(steps: Iterable[Coroutine[Any, Any, A]]) -> list[A]:
    """The results of all steps in order; when one fails, the others are ended and it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(step) for step in steps]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in running]


async def both(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """The results of two steps that run at once; fails as `overlap` does."""
    try:
        async with asyncio.TaskGroup() as group:
            one, other = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return one.result(), other.result()
