"""The clock: time that passes when told, and a tick that returns when nothing is left to do."""

from __future__ import annotations

import asyncio

import pytest

from emulator.control.clock import Clock


async def test_a_tick_goes_from_moment_to_moment() -> None:
    clock, seen = Clock(is_real=False), []

    async def walk(name: str, seconds: float) -> None:
        with clock.busy():
            for _ in range(3):
                await clock.sleep(seconds)
                seen.append((name, clock.now()))

    walkers = [asyncio.create_task(walk("a", 1.0)), asyncio.create_task(walk("b", 1.5))]
    assert await clock.tick(3.0) == 3.0
    assert seen == [("a", 1.0), ("b", 1.5), ("a", 2.0), ("b", 3.0), ("a", 3.0)]
    assert await clock.tick(10.0) == 13.0
    assert seen[-1] == ("b", 4.5)
    await asyncio.gather(*walkers)


async def test_a_wait_ends_by_its_event_or_its_deadline() -> None:
    clock, event, results = Clock(is_real=False), asyncio.Event(), []

    async def wait() -> None:
        with clock.busy():
            results.append(await clock.wait(event, 5.0))

    first = asyncio.create_task(wait())
    await clock.tick(4.0)
    assert results == []
    await clock.tick(1.0)
    assert results == [False]
    second = asyncio.create_task(wait())
    await clock.tick(1.0)
    event.set()
    await clock.tick(0)
    assert results == [False, True]
    await clock.tick(100)  # the deadline that was left behind changes nothing
    assert results == [False, True]
    await asyncio.gather(first, second)


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = Clock(is_real=False)

    async def sleep() -> None:
        with clock.busy():
            await clock.sleep(5.0)

    sleeper = asyncio.create_task(sleep())
    await clock.tick(1.0)
    sleeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeper
    assert await clock.tick(10.0) == 11.0


async def test_a_real_clock_moves_by_itself_and_by_ticks() -> None:
    clock = Clock(is_real=True)
    with clock.busy():
        await clock.sleep(0.01)
    assert clock.now() >= 0.01
    before = clock.now()

    async def sleep() -> None:
        with clock.busy():
            await clock.sleep(1000.0)

    sleeper = asyncio.create_task(sleep())
    assert await clock.tick(1000.1) >= before + 1000
    await sleeper
