"""Rollback: a stored snapshot is served again, and the run goes on from there."""

import json
import shutil
from pathlib import Path

import pytest

from flows.cycle import checkpoint_to_rollout
from flows.publish import publish_version
from flows.rollback import roll_back
from hotload.checkpoint.safetensors import render_header
from hotload.directory.shards import open_shard
from hotload.errors import (
    BaselineLostError,
    IdentityConflictError,
    InvalidIdentityError,
    LeaseLostError,
)
from hotload.identity import SnapshotKind
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tests.flows.fleet import REPLICAS, SERVICE, Fleet
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


def in_other_words(fleet: Fleet, version: int) -> CycleSpec:
    """A cycle whose checkpoint says the same otherwise: its config, and its shards' metadata."""
    own = Path(shutil.copytree(fleet.checkpoints[version], fleet.root / f"own-{version}"))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config, indent=7))
    for path in own.glob("*.safetensors"):
        with open_shard(path) as shard:
            header = shard.header
        head = render_header(header.tensors, {**header.metadata, "step": f"{version}"})
        path.write_bytes(head + path.read_bytes()[header.data_start :])
    return fleet.spec(version, checkpoint=str(own))


async def test_back_to_a_version_that_its_trainer_wrote_in_other_words(fleet: Fleet) -> None:
    await run(fleet, 1)
    spec = in_other_words(fleet, 2)
    second = await checkpoint_to_rollout(spec)
    assert second.snapshot.kind is SnapshotKind.DELTA
    before = answer(fleet)
    await run(fleet, 3)
    vouched = {"trust_digests": True, "link_baseline": True}  # for what the trainer writes
    back = await roll_back(fleet.spec(3, snapshot=vouched), "2")
    assert (back.kind, fleet.served()) == (SnapshotKind.DELTA, {back.identity})
    assert answer(fleet) == before
    # Its own cycle knows what it wrote: it stands, and can be served again.
    state = await checkpoint_to_rollout(spec, return_state=True)
    assert state.name == "AlreadyServed"
    for number in range(REPLICAS):
        fleet.change_replicas(action="restart", replica=number, on_base=True)
    state = await checkpoint_to_rollout(spec, return_state=True)
    assert state.name == "ServedAgain"
    assert answer(fleet) == before
    with pytest.raises(IdentityConflictError, match="other content"):
        await checkpoint_to_rollout(fleet.spec(2, checkpoint=str(fleet.checkpoints[3])))


async def test_what_was_only_published_is_held_to_its_trainers_words(fleet: Fleet) -> None:
    await run(fleet, 1)
    spec = in_other_words(fleet, 2)
    await publish_version(spec)  # it leaves no report
    await run(fleet, 3)
    back = await roll_back(fleet.spec(3), "2")
    again = await publish_version(spec)
    assert (again.snapshot.identity, fleet.served()) == (back.identity, {back.identity})


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
