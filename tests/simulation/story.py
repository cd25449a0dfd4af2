"""A world's story: version after version under faults from a seed, and then a calm end in which the
newest must come to be served.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation.engine import Replaced
from tests.simulation.faults import INFERENCE, KINDS, Cycle, Rival, order
from tests.simulation.loop import HangError, Process
from tests.simulation.world import Outcome, World, opened, run_in_time_of_its_own, simulated

CYCLES = 15
LIVES = 4
CALM_STARTS = 3
IN_A_ROW = 12
"""Cycles of both kinds, full and delta, that end before their kill: later there is nothing."""
SERVICES = (
    {},
    {"transition": "SYNC"},
    {"chain_error": "409"},
    {"chain_error": "load_error"},
    {"seconds_per_state": 0.0},
    {"seconds_per_state": 5.0},
)


@dataclass
class Story:
    """What became of a world: counts by kind, and the digest of its trace."""

    seed: int
    is_whole: bool
    cycles: int = 0
    lives: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    digest: str = ""
    longest_seconds: float = 0.0
    cpu_seconds: float = 0.0
    lines: list[str] = field(default_factory=list)


def tell_every_kill(
    *, first: int = 1, stride: int = 1, is_whole: bool = False, services: int = 1
) -> Story:
    """Kill the cycle of one version after the other, each a `stride` of steps later than the one
    before, until one ends before its kill; started again, each must end well."""
    story, began = Story(first, is_whole), time.process_time()
    with (
        tempfile.TemporaryDirectory(dir=_memory()) as directory,
        simulated(first, is_whole=is_whole),
    ):
        world = World(first, Path(directory) / "world", is_whole=is_whole, services=services)
        run_in_time_of_its_own(_kill_at_every_step(story, world, first, stride))
        story.faults, story.violations = world.struck, world.watch.violations
        story.digest, story.lines = world.trace.hexdigest(), world.lines
        story.longest_seconds = world.longest_seconds
    story.cpu_seconds = time.process_time() - began
    return story


async def _kill_at_every_step(story: Story, world: World, first: int, stride: int) -> None:
    async with opened(world):
        version, step, unharmed = 0, first, 0
        while unharmed < IN_A_ROW and not world.watch.violations:
            version += 1
            world.trainer.step(version)
            cycle = Cycle(world, version)
            cycle.surprises.append((step, Process.kill))
            outcome = await _run(story, cycle)
            unharmed = 0 if outcome.kind == "killed" else unharmed + 1
            world.struck["killed"] += outcome.kind == "killed"
            if not outcome.is_done:
                outcome = await _run(story, cycle)
            if not outcome.is_done:
                world.watch.violated(f"killed at step {step}, and then {outcome}")
            story.cycles, step = version, step + stride


def tell(
    seed: int,
    *,
    cycles: int = CYCLES,
    is_whole: bool = False,
    kinds: Sequence[str] = (),
    mutate: Callable[[Replaced], None] | None = None,
    root: Path | None = None,
) -> Story:
    """Run the world of a seed; the same seed tells the same story, wherever it runs.

    Args:
        kinds: faults to choose from; all without any.
        mutate: breaks the program on purpose.
    """
    story, began = Story(seed, is_whole), time.process_time()
    with (
        tempfile.TemporaryDirectory(dir=root or _memory()) as directory,
        simulated(seed, is_whole=is_whole) as replaced,
    ):
        if mutate is not None:
            mutate(replaced)
        world = World(
            seed, Path(directory) / "world", is_whole=is_whole, services=services_of(seed)
        )
        try:
            run_in_time_of_its_own(_tell(story, world, cycles, list(kinds) or kinds_for(is_whole)))
        except HangError:
            world.watch.violations.append("a hang: nothing is ready and nothing is scheduled")
        story.faults, story.violations = world.struck, world.watch.violations
        story.digest, story.lines = world.trace.hexdigest(), world.lines
        story.longest_seconds = world.longest_seconds
    story.cpu_seconds = time.process_time() - began
    return story


def services_of(seed: int) -> int:
    """Count the services of a seed's world: every third has two."""
    return 2 if seed % 3 == 2 else 1


def kinds_for(is_whole: bool) -> list[str]:
    """Name the faults that can strike."""
    return [name for name in KINDS if is_whole or name not in INFERENCE]


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


async def _tell(story: Story, world: World, cycles: int, kinds: list[str]) -> None:
    async with opened(world, **world.random.choice(SERVICES)):
        version = 0
        world.trainer.step(1)
        for turn in range(1, cycles + 1):
            version += 1
            world.trainer.step(version + 1)
            cycle = Cycle(world, version)
            if turn < cycles:
                count = world.random.choices((0, 1, 2, 3), (2, 4, 3, 1))[0]
                for name in world.random.sample(kinds, min(count, len(kinds))):
                    order(name, cycle)
                await _live(story, cycle)
                _calm(world)
            else:
                await _end_well(story, cycle)
            version = cycle.version
            story.cycles += 1
            if world.watch.violations:
                return


def _calm(world: World) -> None:
    for fleet in world.fleets:
        fleet.count_orders(take_back=True)
    world.network.faults.clear()


async def _live(story: Story, cycle: Cycle) -> None:
    """Start a version's cycle again and again, as an operator does, but not for ever."""
    rivals = [
        asyncio.get_running_loop().create_task(_run_rival(story, cycle, rival))
        for rival in cycle.rivals
    ]
    await asyncio.sleep(cycle.delay_seconds)
    for _ in range(LIVES):
        outcome = await _run(story, cycle)
        for change in cycle.before_next_life:
            change()
        cycle.before_next_life.clear()
        if outcome.is_done or cycle.world.watch.violations:
            break
        if outcome.kind not in ("killed", "cancelled") and cycle.random.random() < 0.5:
            break
        if cycle.is_killed_again and cycle.random.random() < 0.7:
            cycle.surprise("killed again and again", Process.kill)
    for rival in rivals:
        await rival


async def _run_rival(story: Story, cycle: Cycle, rival: Rival) -> None:
    await asyncio.sleep(rival.delay_seconds)
    await _run(story, cycle, rival)


async def _run(story: Story, cycle: Cycle, rival: Rival | None = None) -> Outcome:
    world, who = cycle.world, rival or cycle
    process = world.process(who.host, ahead_seconds=0.0 if rival else cycle.ahead_seconds)
    process.surprises.update(who.surprises)
    who.surprises.clear()
    spec = world.spec(who.version, who.host, line=who.line, **cycle.changes)
    outcome = await world.run(process, spec, rival.work if rival else "")
    for fleet in world.fleets:
        fleet.count_orders(take_back=False)
    story.lives += 1
    story.outcomes[outcome.kind] += 1
    return outcome


async def _end_well(story: Story, cycle: Cycle) -> None:
    """With nothing in its way, a started cycle ends, and every replica of every service serves its
    version."""
    world = cycle.world
    await asyncio.sleep(400)  # for what is still under way, and for leases of the dead
    world.mend()
    said: list[str] = []
    for _ in range(CALM_STARTS):
        outcome = await _run(story, cycle)
        said.append(f"{outcome.kind} {outcome.detail}")
        if outcome.is_done:
            break
    if not outcome.is_done:
        world.watch.violated(f"nothing is wrong any more, and the cycle ends with {said}")
    for fleet in world.fleets if outcome.is_done else ():
        served = {replica.current for replica in fleet.replicas}
        found = [world.watch.manifests.get(str(one)) for one in served]
        versions = [(one.line, one.policy_version) if one else None for one in found]
        if versions != [(world.trainer.line, cycle.version)]:
            world.watch.violated(f"the cycle is done, and the replicas of {fleet.name} {served}")
    for replica in world.replicas():
        world.watch.look_at(replica)
