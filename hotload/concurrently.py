"""Overlap: several steps at once, all of them or none; and what they do one after the other."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

A = TypeVar("A")
B = TypeVar("B")

# A module's logger, or the one of an engine's run, whose lines a person reads there.
RunLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]

logger = logging.getLogger(__name__)


_TURNS: ContextVar[defaultdict[str, asyncio.Lock]] = ContextVar("_TURNS")


@contextmanager
def taking_turns() -> Iterator[None]:
    """Let the steps that are begun within do what they do under one name one after the other."""
    token = _TURNS.set(defaultdict(asyncio.Lock))
    try:
        yield
    finally:
        _TURNS.reset(token)


@asynccontextmanager
async def turn(name: str) -> AsyncIterator[None]:
    """Wait until no other step of these is at what goes by `name`."""
    async with _TURNS.get()[name]:
        yield


@asynccontextmanager
async def all_or_none() -> AsyncIterator[asyncio.TaskGroup]:
    """Run tasks beside each other until the block and all of them have ended.

    When one fails, the others are ended and its error is raised; what else failed is logged.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failed:
        # To end the block a group cancels the task it is in, and before Python 3.13 it may leave
        # that standing: who catches the error would then take the next Ctrl-C for it.
        if task.cancelling() > before:
            task.uncancel()
        raise_first(failed)


async def overlap(steps: Iterable[Coroutine[Any, Any, A]]) -> list[A]:
    """Run all steps at once; returns their results in order, and fails as `all_or_none` does."""
    async with all_or_none() as group:
        running = [group.create_task(step) for step in steps]
    return [task.result() for task in running]


async def overlap_as_they_come(steps: AsyncIterable[Coroutine[Any, Any, object]]) -> None:
    """Run steps, each from when it comes on, beside those before it; fails as `overlap` does."""
    async with all_or_none() as group:
        async for step in steps:
            group.create_task(step)


async def both(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """Run two steps at once; returns both results, and fails as `overlap` does."""
    async with all_or_none() as group:
        one, other = group.create_task(first), group.create_task(second)
    return one.result(), other.result()


@asynccontextmanager
async def beside(
    logger: RunLogger, **endless: Callable[[], Awaitable[None]] | None
) -> AsyncIterator[None]:
    """Run what serves a block as long as that runs; should one of it end, the block goes on without
    it, and the log says so by its name.
    """

    async def run(name: str, serve: Callable[[], Awaitable[None]]) -> None:
        try:
            await serve()
        except Exception:  # nobody waits for it
            logger.exception("%s came to an end", name.replace("_", " "))

    running = [asyncio.create_task(run(name, one)) for name, one in endless.items() if one]
    try:
        yield
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def raise_first(failed: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raise the first error of a task group, and log the others."""
    first, *others = failed.exceptions
    for other in others:
        logger.error("failed as well: %s: %s", type(other).__name__, other)
    raise first from None
