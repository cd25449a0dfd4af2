"""Whole cycles through CoreWeave's hot-loads (protocol §23): deltas of changed tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from flows.cycle import checkpoint_to_rollout
from hotload.checkpoint.names import INDEX_FILE
from hotload.clients.store.records import read_snapshot_manifest
from hotload.clients.store.verification import verify_snapshot
from hotload.delta.dialects import Dialect, Lineage
from hotload.directory.operations import encode_directory
from hotload.errors import HotLoadError, ServiceRefusedError
from hotload.identity import SnapshotKind
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import API_KEY, NAMES, Fleet, running_fleet

FULL, DELTA = SnapshotKind.FULL, SnapshotKind.DELTA
READINESS = {
    "poll_interval_seconds": 0.05,
    "warmup_after_hotload": False,
    "replica_count": 2,
    "weight_sync_timeout": 20,
}


async def save_coreweave_blocks(fleet: Fleet) -> None:
    account = InferenceAccount(base_url=fleet.url, api_key=API_KEY, dialect="coreweave", **NAMES)
    for block in (
        HotLoadService(account=account),
        CheckpointStore(url=fleet.bucket.as_uri()),
        RolloutClient(account=account),
    ):
        await block.save(fleet.name, overwrite=True)


async def run(fleet: Fleet, version: int, **changes: Any) -> CycleReport:
    return await checkpoint_to_rollout(fleet.spec(version, **{"readiness": READINESS, **changes}))


async def test_a_full_and_deltas_travel_as_hot_loads(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet("coreweave", tmp_path, checkpoints, dialect="coreweave") as fleet:
        await save_coreweave_blocks(fleet)
        reports = [await run(fleet, version) for version in (1, 2, 3)]
        assert [report.snapshot.kind for report in reports] == [FULL, DELTA, DELTA]
        last = reports[-1].snapshot
        assert reports[-1].rollouts.samples_by_identity == {last.identity: 8}
        assert last.replica_count == 2
        log = fleet.log()
        assert (log["client_bugs"], len(log["signals"])) == ([], 3)
        # The delta says itself what it follows, and is what the codec's own command makes.
        made = tmp_path / "made"
        lineage = Lineage(last.identity, str(last.previous))
        encode_directory(
            checkpoints[2], checkpoints[3], made, dialect=Dialect.COREWEAVE, lineage=lineage
        )
        stored = fleet.bucket / last.identity
        assert {path.name: path.read_bytes() for path in stored.iterdir()} == {
            path.name: path.read_bytes() for path in made.iterdir()
        }
        store = (await CheckpointStore.load(fleet.name)).open()
        manifest = await read_snapshot_manifest(store, last.identity)
        assert manifest is not None
        assert await verify_snapshot(store, manifest, lambda _: None) == []
        # A late joiner replays the chain, and a lost base is built again from the store.
        fleet.change_replicas(action="add")
        shutil.rmtree(tmp_path / "work")
        again = await run(fleet, 4, readiness={**READINESS, "replica_count": 3})
        assert (again.snapshot.kind, again.snapshot.replica_count) == (DELTA, 3)


async def test_a_load_that_fails_on_one_replica_is_followed_by_a_full_of_another_name(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet("torn", tmp_path, checkpoints, dialect="coreweave") as fleet:
        await save_coreweave_blocks(fleet)
        await run(fleet, 1)
        fleet.fault(fault="torn_apply", replica="replica-1", count=1)
        report = await run(fleet, 2)
        assert report.outcome == "fell back"
        assert "of 2 replicas report an error for it" in str(report.fallback_reason)
        assert report.snapshot.kind is FULL
        assert (await run(fleet, 3)).snapshot.previous == report.snapshot.identity


async def test_an_unchanged_checkpoint_is_no_empty_delta(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet("empty", tmp_path, checkpoints, dialect="coreweave") as fleet:
        await save_coreweave_blocks(fleet)
        await run(fleet, 1)
        report = await run(fleet, 2, checkpoint=str(checkpoints[1]))
        assert (report.outcome, report.snapshot.kind) == ("fell back", FULL)
        assert "takes no empty delta" in str(report.fallback_reason)


async def test_an_unchanged_shard_is_not_stored_and_comes_from_its_base(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet("kept", tmp_path, checkpoints, dialect="coreweave") as fleet:
        await save_coreweave_blocks(fleet)
        await run(fleet, 1)
        partly = tmp_path / "partly"
        shutil.copytree(checkpoints[2], partly)
        kept = min(path.name for path in partly.glob("*.safetensors"))
        shutil.copyfile(checkpoints[1] / kept, partly / kept)
        report = await run(fleet, 2, checkpoint=str(partly))
        assert report.snapshot.kind is DELTA
        stored = fleet.bucket / report.snapshot.identity
        assert not (stored / kept).exists()
        assert kept not in json.loads((stored / INDEX_FILE).read_bytes())["weight_map"].values()
        shutil.rmtree(tmp_path / "work")
        shutil.rmtree(partly)
        assert (await run(fleet, 3)).snapshot.kind is DELTA  # on a base that the store gave


async def test_one_kind_of_delta_is_made_in_a_cycle(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet("mixed", tmp_path, checkpoints, dialect="coreweave") as fleet:
        await save_coreweave_blocks(fleet)
        vendor = InferenceAccount(
            base_url=fleet.url, api_key=API_KEY, **{**NAMES, "deployment_id": "second"}
        )
        await HotLoadService(account=vendor).save("second-kind", overwrite=True)
        with pytest.raises(ServiceRefusedError, match="different deltas, arc_v2 and coreweave"):
            await run(fleet, 1, other_services=["second-kind"])


async def test_a_stored_delta_of_another_kind_is_not_signalled(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    # The block of a cycle that was killed between manifest and signal now names another dialect.
    with running_fleet("changed", tmp_path, checkpoints, dialect="coreweave") as fleet:
        await save_coreweave_blocks(fleet)
        await run(fleet, 1)
        fleet.fault(fault="respond", operation="signal", status=403, count=1)
        with pytest.raises(HotLoadError, match="403"):
            await run(fleet, 2)
        (path,) = (fleet.bucket / "_hotload" / "snapshots").glob("run-000002-*.json")
        manifest = json.loads(path.read_bytes())
        del manifest["delta_index"]
        path.write_text(json.dumps(manifest | {"codec": "arc_v2"}))
        for mark in (fleet.bucket / "_hotload" / "signals").rglob("run-000002-*"):
            mark.unlink()
        report = await run(fleet, 2)
        assert report.snapshot.kind is FULL
        assert "it is a delta in arc_v2, the service takes coreweave" in str(report.fallback_reason)
