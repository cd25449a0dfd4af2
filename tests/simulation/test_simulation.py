"""300 cycles of the simulation; that a seed tells one story; that what must hold can fail."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from pathlib import Path

import pytest

from tests.simulation.loop import PROCESS, HangError, Process, SimulatedLoop
from tests.simulation.mutants import MUTANTS
from tests.simulation.story import CYCLES, tell, tell_every_kill

ROOT = Path(__file__).parents[2]
SEEDS = range(20)
KINDS_AT_LEAST = 30


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_300_publishing_cycles_under_faults() -> None:
    struck: Counter[str] = Counter()
    for seed in SEEDS:
        story = tell(seed)
        assert not story.violations, f"python -m tests.simulation --replay {seed}"
        assert story.cycles == CYCLES
        struck += story.faults
    assert len(struck) >= KINDS_AT_LEAST


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("first", "services"), [(1, 1), (4, 2)])
def test_a_kill_at_any_step_is_recovered_from(first: int, services: int) -> None:
    story = tell_every_kill(first=first, stride=9, services=services)
    assert not story.violations
    assert story.faults["killed"] > 15


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whole_cycles_under_faults() -> None:
    for seed in (1, 2):  # of one service, and of two
        story = tell(seed, is_whole=True)
        assert not story.violations, f"python -m tests.simulation --replay {seed} --as-whole"


def _spin() -> None:
    while True:
        pass


TELL = """
import sys
from tests.simulation.story import tell
story = tell(8, cycles=6, is_whole=sys.argv[1] == "whole")
print(*story.lines, story.digest, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["publishing", "whole"])
def test_a_seed_tells_one_story_in_every_process_and_under_load(kind: str) -> None:
    context = multiprocessing.get_context("spawn")
    load = [context.Process(target=_spin, daemon=True) for _ in range(2)]
    for each in load:
        each.start()
    try:
        tellers = [
            subprocess.Popen(
                [sys.executable, "-c", TELL, kind],
                cwd=ROOT,
                env={**os.environ, "PYTHONHASHSEED": hash_seed},
                stdout=subprocess.PIPE,
                text=True,
            )
            for hash_seed in ("1", "2")
        ]
        there = [teller.communicate()[0].splitlines() for teller in tellers]
    finally:
        for each in load:
            each.kill()
            each.join()
    here = tell(8, cycles=6, is_whole=kind == "whole")
    assert there == [[*here.lines, here.digest]] * 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_program_is_seen(name: str) -> None:
    mutant = MUTANTS[name]
    seen = mutant.first_seen([mutant.seed])
    assert seen is not None
    assert mutant.sees in seen[1]


# The loop.


def run(work: Callable[[SimulatedLoop], object]) -> None:
    loop = SimulatedLoop()
    try:
        loop.run_until_complete(work(loop))  # type: ignore[arg-type]
    finally:
        loop.close()


def test_time_is_a_number_and_threads_run_in_line() -> None:
    async def work(loop: SimulatedLoop) -> None:
        await asyncio.sleep(86_400)
        assert loop.time() == 86_400
        assert await asyncio.to_thread(lambda: "answer") == "answer"
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    run(work)


def test_who_waits_for_ever_is_found() -> None:
    with pytest.raises(HangError):
        run(lambda loop: asyncio.Event().wait())


@pytest.mark.parametrize("step", range(1, 6))
def test_a_killed_process_runs_nothing_any_more(step: int) -> None:
    left: list[int | str] = []

    async def write() -> None:
        try:
            for number in range(10):
                left.append(number)
                await asyncio.sleep(1)
        finally:
            left.append("tidied")

    async def work(loop: SimulatedLoop) -> None:
        process, context = Process("a.1", "a", 1), Context()
        context.run(PROCESS.set, process)
        process.surprises[step] = Process.kill
        loop.create_task(write(), context=context)
        await asyncio.sleep(100)
        assert len(left) < 10
        assert "tidied" not in left
        await loop.bury([process])  # or the garbage collector would end it, and complain

    run(work)


def test_a_stopped_process_goes_on_where_it_was() -> None:
    moments: list[float] = []

    async def write(loop: SimulatedLoop) -> None:
        for _ in range(3):
            moments.append(loop.time())
            await asyncio.sleep(1)

    async def work(loop: SimulatedLoop) -> None:
        process, context = Process("a.1", "a", 1), Context()
        context.run(PROCESS.set, process)
        process.surprises[2] = lambda stopped: loop.stop_process(stopped, 60)
        await loop.create_task(write(loop), context=context)

    run(work)
    assert moments[0] == 0
    assert moments[1] >= 60
