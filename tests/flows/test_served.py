"""A cycle is done when the service serves its snapshot: what the store says is not enough."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prefect import State

from blocks.account import InferenceAccount
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from flows.cycle import checkpoint_to_rollout
from hotload.clients.handoff.directory import find_rollouts
from hotload.clients.store import Store
from hotload.errors import InvalidIdentityError, StoreError
from hotload.identity import NamedVersion, SnapshotKind
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import API_KEY, NAMES, REPLICAS, Fleet, running_fleet


async def run(fleet: Fleet, version: int, **changes: Any) -> tuple[str | None, CycleReport]:
    """Run a cycle; returns the name of its state, and its report."""
    state: State[CycleReport] = await checkpoint_to_rollout(
        fleet.spec(version, **changes), return_state=True
    )
    return state.name, await state.result()


async def reset(fleet: Fleet) -> None:
    """Let the service forget what it has loaded: base weights answer."""
    service = await HotLoadService.load(fleet.name)
    await service.open().reset_ledger()
    assert fleet.served() == {None}


def requests(fleet: Fleet) -> int:
    """How many samples the service was asked for."""
    return len(fleet.samples_asked())


def stored(fleet: Fleet) -> set[str]:
    """Directories of snapshots in the bucket."""
    return {path.name for path in fleet.bucket.iterdir() if path.name != "_hotload"}


@pytest.fixture
async def second(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory, checkpoints: list[Path]
) -> AsyncIterator[Fleet]:
    """Another service that loads from the first one's bucket."""
    root, names = tmp_path_factory.mktemp("second"), {**NAMES, "deployment_id": "second"}
    settings = {"bucket": fleet.bucket.as_uri(), "deployment_id": "second"}
    with running_fleet(f"{fleet.name}-2", root, checkpoints, **settings) as other:
        account = InferenceAccount(base_url=other.url, api_key=API_KEY, **names)
        await HotLoadService(account=account).save(other.name)
        await RolloutClient(account=account).save(other.name)
        yield other


async def test_a_cycle_that_is_served_is_asked_for_in_vain(fleet: Fleet) -> None:
    name, first = await run(fleet, 1)
    assert name == "Completed"
    signals, asked = len(fleet.log()["signals"]), requests(fleet)
    assert await run(fleet, 1) == ("AlreadyServed", first)
    assert (len(fleet.log()["signals"]), requests(fleet)) == (signals, asked)


@pytest.mark.parametrize(
    ("version", "changes"),
    [(1, {}), (2, {"cadence": {"force_full": True}})],
    ids=["full", "delta, force_full"],
)
async def test_a_service_that_lost_a_snapshot_is_served_it_again(
    fleet: Fleet, version: int, changes: dict[str, Any]
) -> None:
    for one in range(1, version + 1):
        _, ended = await run(fleet, one)
    asked, known = requests(fleet), stored(fleet)
    await reset(fleet)
    name, again = await run(fleet, version, **changes)
    assert name == "ServedAgain"
    assert again.snapshot.kind is SnapshotKind.FULL
    assert fleet.served() == {again.snapshot.identity}
    assert again.rollouts == ended.rollouts
    assert requests(fleet) == asked
    if version == 1:  # the full lies in the store
        assert (again.snapshot.identity, stored(fleet)) == (ended.snapshot.identity, known)
    assert await run(fleet, version) == ("AlreadyServed", again)
    _, following = await run(fleet, version + 1)
    assert following.snapshot.previous == again.snapshot.identity
    assert fleet.log()["client_bugs"] == []


async def test_samples_that_are_missing_are_taken_when_it_is_served_again(fleet: Fleet) -> None:
    _, ended = await run(fleet, 1)
    await reset(fleet)
    shutil.rmtree(fleet.bucket / "_hotload" / "rollouts")
    asked = requests(fleet)
    name, again = await run(fleet, 1)
    assert (name, requests(fleet) - asked) == ("ServedAgain", 8)
    assert again.rollouts.samples_by_identity == ended.rollouts.samples_by_identity


async def test_a_second_service_on_the_bucket_is_served_what_lies_there(
    fleet: Fleet, second: Fleet
) -> None:
    ended = [(await run(fleet, version))[1] for version in (1, 2)]
    known, asked = stored(fleet), requests(fleet)
    places = {"service": second.name, "rollouts": second.name}
    for report in ended:
        name, again = await run(fleet, report.policy_version, **places)
        assert (name, again.snapshot.identity) == ("ServedAgain", report.snapshot.identity)
        status = await (await HotLoadService.load(second.name)).open().observe()
        assert status.describe() == f"{report.snapshot.identity} on {REPLICAS}"
        assert again.rollouts == report.rollouts
    assert stored(fleet) == known
    assert (requests(fleet), requests(second)) == (asked, 0)
    assert second.log()["client_bugs"] == []


async def test_an_older_version_is_passed_and_says_so(fleet: Fleet) -> None:
    first, second = [(await run(fleet, version))[1] for version in (1, 2)]
    assert await run(fleet, 1) == ("Superseded", first)
    assert fleet.served() == {second.snapshot.identity}


async def test_a_version_that_samples_beside_later_ones_is_served_again_too(fleet: Fleet) -> None:
    beside = {"sampling": {**fleet.declared(1)["sampling"], "max_head_offpolicy_versions": 1}}
    _, ended = await run(fleet, 1, **beside)
    (fleet.bucket / "_hotload" / "reports" / f"{ended.name}.json").unlink()
    await reset(fleet)
    name, again = await run(fleet, 1, **beside)
    # Its samples are complete, and only the report was missing.
    assert (name, again.rollouts) == ("Completed", ended.rollouts)
    assert fleet.served() == {again.snapshot.identity}


@pytest.mark.parametrize("damage", [b"{", b'{"identity": "x"}'])
async def test_a_manifest_that_cannot_be_read_is_a_doubt(
    fleet: Fleet, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = await run(fleet, 1)
    manifest = fleet.bucket / "_hotload" / "snapshots" / f"{first.snapshot.identity}.json"
    manifest.write_bytes(damage)
    _, second = await run(fleet, 2)
    assert second.snapshot.kind is SnapshotKind.FULL
    assert fleet.served() == {second.snapshot.identity}
    assert f"manifest of {first.snapshot.identity}" in caplog.text
    assert not manifest.exists()
    aside = fleet.bucket / "_hotload" / "set-aside" / manifest.name
    assert aside.read_bytes() == damage
    assert (await run(fleet, 3))[1].snapshot.kind is SnapshotKind.DELTA


async def test_a_broken_manifest_within_the_chain_is_a_doubt(fleet: Fleet) -> None:
    for version in (1, 2):
        _, report = await run(fleet, version)
    previous = fleet.bucket / "_hotload" / "snapshots" / f"{report.snapshot.previous}.json"
    previous.write_text(json.dumps({"identity": "other"}))
    shutil.rmtree(fleet.root / "work")
    _, third = await run(fleet, 3)
    assert third.snapshot.kind is SnapshotKind.FULL
    assert "manifest of" in third.snapshot.reason


async def test_another_declaration_is_said_and_sampled_beside_on_request(fleet: Fleet) -> None:
    _, ended = await run(fleet, 1)
    other = {"sampling": {"completions_per_prompt": 3, "max_completion_tokens": 4}}
    state: State[CycleReport] = await checkpoint_to_rollout(
        fleet.spec(1, **other), return_state=True
    )
    assert (state.name, await state.result()) == ("AlreadyServed", ended)
    assert "`again: rollouts` takes others beside them" in str(state.message)
    signals = len(fleet.log()["signals"])
    for _ in range(2):  # the second finds what the first has sampled
        name, again = await run(fleet, 1, again="rollouts", **other)
        assert (name, again.rollouts.sample_count) == ("SampledAgain", 12)
        assert requests(fleet) == 8 + 12
    assert len(fleet.log()["signals"]) == signals
    first, second = (Path(one.rollouts.parts_uri.removeprefix("file://")) for one in (ended, again))
    assert second.parent == first
    assert list(first.glob("*.parquet"))
    newest, before = await find_rollouts(Store(fleet.bucket.as_uri()), NamedVersion("run", 0, 1))
    assert newest.manifest.summary == again.rollouts
    assert before.manifest.summary == ended.rollouts


@pytest.mark.parametrize("is_newer", [False, True])
async def test_an_attempt_whose_record_is_broken_is_not_made_again(
    fleet: Fleet, is_newer: bool
) -> None:
    await run(fleet, 1)
    _, second = await run(fleet, 2)
    records = fleet.bucket / "_hotload"
    broken = records / "snapshots" / f"{second.snapshot.identity}.json"
    broken.write_text(json.dumps({"schema_number": 99}) if is_newer else "{")
    (records / "reports" / f"{second.name}.json").unlink()
    for number in range(REPLICAS):
        fleet.change_replicas(action="restart", replica=number, on_base=True)
    if is_newer:
        with pytest.raises(StoreError, match="newer version of this program"):
            await run(fleet, 2)
        assert broken.exists()
        return
    _, again = await run(fleet, 2)
    assert again.snapshot.kind is SnapshotKind.FULL
    assert again.snapshot.identity != second.snapshot.identity
    assert [one["identity"] for one in fleet.log()["signals"]].count(second.snapshot.identity) == 1


async def test_a_version_that_is_no_longer_served_is_not_sampled_anew(fleet: Fleet) -> None:
    """Also where the next may publish meanwhile: the samples would be of other weights."""
    ahead = {"completions_per_prompt": 2, "max_completion_tokens": 4}
    ahead |= {"max_head_offpolicy_versions": 2}
    for version in (1, 2):
        await run(fleet, version, sampling=ahead)
    asked = requests(fleet)
    with pytest.raises(InvalidIdentityError, match="already serves version 2"):
        await run(fleet, 1, sampling=ahead, again="rollouts")
    assert requests(fleet) == asked
    name, _ = await run(fleet, 2, sampling=ahead, again="rollouts")
    assert name == "SampledAgain"
