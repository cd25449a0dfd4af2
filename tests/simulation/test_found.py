"""What the simulation has found, each as the few calls that show it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hotload.clients.store.records import LINES, SNAPSHOTS
from tests.simulation.loop import Process
from tests.simulation.network import STORE, WireFault
from tests.simulation.world import Outcome, World, opened, run_in_time_of_its_own, simulated


def in_a_world(root: Path, script: Callable[[World], Awaitable[None]]) -> None:
    """Run a script in a world without faults; nothing may be violated."""

    async def work(world: World) -> None:
        async with opened(world):
            await script(world)

    with simulated(0, is_whole=False):
        world = World(0, root / "world", is_whole=False)
        run_in_time_of_its_own(work(world))
    assert not world.watch.violations


async def publish(world: World, version: int) -> Outcome:
    world.trainer.step(version)
    return await world.run(world.process("a"), world.spec(version, "a"))


@pytest.mark.parametrize("looks", range(8))
def test_a_service_that_scales_to_zero_is_never_signalled(tmp_path: Path, looks: int) -> None:
    # Seed 150 of the first catalogue: the list was empty just before a full was signalled.
    async def script(world: World) -> None:
        world.fleets[0].order("empty", fault="empty_replicas", count=1, after=looks)
        assert (await publish(world, 1)).is_done

    in_a_world(tmp_path, script)


def test_a_store_that_refuses_says_nothing_of_a_manifest(tmp_path: Path) -> None:
    # Seed 1086 of the second: 403 to a read, and a good manifest was set aside.
    async def script(world: World) -> None:
        assert (await publish(world, 1)).is_done
        kept = [path for path in world.stored() if path.startswith(SNAPSHOTS)]
        denied = WireFault("denied", STORE, "refused", ("read",), SNAPSHOTS, status=403)
        world.network.faults.append(denied)
        outcome = await publish(world, 2)
        assert (outcome.kind, denied.left) == ("StoreError", 0)
        assert [path for path in world.stored() if path.startswith(SNAPSHOTS)] == kept
        assert (await world.run(world.process("a"), world.spec(2, "a"))).detail == "Completed delta"

    in_a_world(tmp_path, script)


@pytest.mark.parametrize("step", [57, 61])
def test_a_line_does_not_begin_without_the_lease(tmp_path: Path, step: int) -> None:
    # The cycle of line 1 is stopped before its plan; that of line 0 takes the lease, plans, and is
    # stopped in its turn: line 1 then began, and line 0 published on.
    def stop(seconds: float) -> Callable[[Process], None]:
        loop = asyncio.get_running_loop()
        return lambda process: loop.stop_process(process, seconds)  # type: ignore[attr-defined]

    async def script(world: World) -> None:
        for version in (1, 2):
            assert (await publish(world, version)).is_done
        world.trainer.step(3)
        world.trainer.resume(2)
        resumed, old = world.process("a"), world.process("b")
        resumed.surprises[step], old.surprises[100] = stop(70), stop(30)
        going = asyncio.create_task(world.run(resumed, world.spec(2, "a")))
        await asyncio.sleep(62)
        assert (await world.run(old, world.spec(3, "b", line=0))).is_done
        assert (await going).kind == "LeaseLostError"
        assert not [path for path in world.stored() if path.startswith(LINES)]

    in_a_world(tmp_path, script)
