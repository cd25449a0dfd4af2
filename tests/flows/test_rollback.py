"""Rollback: a stored snapshot is served again, and the run goes on from there."""

import shutil

import pytest

from flows.cycle import checkpoint_to_rollout
from flows.rollback import roll_back
from hotload.errors import BaselineLostError, InvalidIdentityError, LeaseLostError
from hotload.identity import SnapshotKind
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import SERVICE, Fleet
from tests.flows.test_cycle import answer


async def run(fleet: Fleet, version: int) -> CycleReport:
    return await checkpoint_to_rollout(fleet.spec(version))


async def test_back_by_a_delta_and_on_again(fleet: Fleet) -> None:
    reports, answers = {}, {}
    for version in (1, 2, 3, 4):
        reports[version] = await run(fleet, version)
        answers[version] = answer(fleet)
    back = await roll_back(fleet.spec(4), reports[1].snapshot.identity)
    assert (back.policy_version, back.kind) == (1, SnapshotKind.DELTA)
    assert back.previous == reports[4].snapshot.identity
    assert back.identity not in {report.snapshot.identity for report in reports.values()}
    assert fleet.served() == {back.identity}
    assert answer(fleet) == answers[1]
    assert not (fleet.root / "work" / "restored" / "local" / "rollouts").exists()
    # The next version goes on from there, and so does a second way back.
    assert (await roll_back(fleet.spec(4), "3")).previous == back.identity
    assert answer(fleet) == answers[3]
    following = await run(fleet, 5)
    assert following.snapshot.kind is SnapshotKind.DELTA
    assert fleet.served() == {following.snapshot.identity}
    assert fleet.log()["client_bugs"] == []


async def test_back_to_what_is_served_changes_nothing(fleet: Fleet) -> None:
    report = await run(fleet, 1)
    signals = len(fleet.log()["signals"])
    assert (await roll_back(fleet.spec(1), "1")).identity == report.snapshot.identity
    assert len(fleet.log()["signals"]) == signals


async def test_back_on_another_machine_after_the_service_lost_everything(fleet: Fleet) -> None:
    await run(fleet, 1)
    report = await run(fleet, 2)
    before = answer(fleet)
    shutil.rmtree(fleet.root / "work")
    for number in range(2):
        fleet.change_replicas(action="restart", replica=number, on_base=True)
    gone = fleet.spec(2).model_copy(update={"checkpoint": str(fleet.root / "gone")})
    back = await roll_back(gone, report.snapshot.identity)
    assert (back.policy_version, back.kind) == (2, SnapshotKind.FULL)
    assert answer(fleet) == before


async def test_what_the_store_does_not_have_is_refused(fleet: Fleet) -> None:
    report = await run(fleet, 1)
    for name in ("7", "run-000009-0123abcd", "../x"):
        with pytest.raises(InvalidIdentityError):
            await roll_back(fleet.spec(1), name)
    await run(fleet, 2)
    shutil.rmtree(fleet.bucket / report.snapshot.identity)
    gone = fleet.spec(2).model_copy(update={"checkpoint": str(fleet.root / "gone")})
    shutil.rmtree(fleet.root / "work")
    with pytest.raises(BaselineLostError):
        await roll_back(gone, "1")
    assert len(fleet.log()["signals"]) == 2


async def test_nobody_rolls_back_under_a_publisher(fleet: Fleet) -> None:
    from blocks.checkpoint_store import CheckpointStore
    from hotload.clients.store import publisher_lease

    for version in (1, 2):
        await run(fleet, version)
    store = (await CheckpointStore.load(fleet.name)).open()
    async with publisher_lease(store, SERVICE, "another-cycle"):
        with pytest.raises(LeaseLostError, match="another-cycle"):
            await roll_back(fleet.spec(2), "1")
    assert len(fleet.log()["signals"]) == 2
