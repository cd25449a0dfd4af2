"""Whole cycles through a door with other names and no control plane (protocol §22)."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from flows.adopt import adopt_base
from flows.cycle import checkpoint_to_rollout
from hotload.errors import HotLoadError, IdentityConflictError, InvalidIdentityError
from hotload.identity import SnapshotKind
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import API_KEY, NAMES, Fleet, running_fleet

ROOT = Path(__file__).parents[2]
READINESS = {
    "poll_interval_seconds": 0.05,
    "warmup_after_hotload": False,
    "replica_count": 2,
    "weight_sync_timeout": 20,
}


async def save_plain_blocks(fleet: Fleet) -> None:
    account = InferenceAccount(base_url=fleet.url, api_key=API_KEY, dialect="plain", **NAMES)
    for block in (
        HotLoadService(account=account),
        CheckpointStore(url=fleet.bucket.as_uri()),
        RolloutClient(account=account),
    ):
        await block.save(fleet.name, overwrite=True)


async def run(fleet: Fleet, version: int, **changes: Any) -> CycleReport:
    changes = {"readiness": READINESS, **changes}
    return await checkpoint_to_rollout(fleet.spec(version, **changes))


async def test_a_full_and_deltas_travel_through_a_plain_door(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet("plain", tmp_path, checkpoints, dialect="plain") as fleet:
        await save_plain_blocks(fleet)
        reports = [await run(fleet, version) for version in (1, 2, 3)]
        kinds = [report.snapshot.kind for report in reports]
        assert kinds == [SnapshotKind.FULL, SnapshotKind.DELTA, SnapshotKind.DELTA]
        assert [report.outcome for report in reports] == ["published"] * 3
        last = reports[-1].snapshot.identity
        assert reports[-1].rollouts.samples_by_identity == {last: 8}
        log = fleet.log()
        assert log["client_bugs"] == []
        assert [one["result"] for one in log["signals"]] == ["accepted"] * 3
        assert reports[-1].snapshot.replica_count == 2


BASE = "exam-1"  # a name that somebody else gave


async def adopted(fleet: Fleet, version: int = 0) -> str:
    manifest = await adopt_base(fleet.spec(version, readiness=READINESS), BASE)
    return manifest.identity


async def test_a_base_that_somebody_else_named_is_adopted(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet(
        "adopted", tmp_path, checkpoints, dialect="plain", base_identity=BASE
    ) as fleet:
        await save_plain_blocks(fleet)
        with pytest.raises(HotLoadError, match="this deployment serves base 'exam-1'"):
            await run(fleet, 1)
        assert await adopted(fleet) == BASE
        assert await adopted(fleet) == BASE  # again is no harm
        report = await run(fleet, 2)
        assert (report.outcome, report.snapshot.kind) == ("published", SnapshotKind.DELTA)
        assert report.snapshot.previous == BASE
        assert report.rollouts.samples_by_identity == {report.snapshot.identity: 8}
        assert (await run(fleet, 3)).snapshot.previous == report.snapshot.identity
        # What the manifest names lies in the store, so that a base that is lost can be built again.
        shutil.rmtree(fleet.root / "work")
        assert (await run(fleet, 4)).snapshot.kind is SnapshotKind.DELTA


async def test_other_bytes_than_the_base_s_are_never_served(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet(
        "mistaken", tmp_path, checkpoints, dialect="plain", base_identity=BASE
    ) as fleet:
        await save_plain_blocks(fleet)
        await adopted(fleet, version=3)  # the door's base is version 0
        with pytest.raises(HotLoadError, match="this deployment serves base 'exam-1'"):
            await run(fleet, 4, readiness={**READINESS, "weight_sync_timeout": 2})
        service = (await HotLoadService.load(fleet.name)).open()
        assert (await service.observe()).served_everywhere == {BASE}
        assert {one["result"] for one in fleet.log()["snapshots"]["replica-0"]} >= {"error"}


async def test_what_is_not_served_or_lies_there_otherwise_is_not_adopted(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet(
        "refused", tmp_path, checkpoints, dialect="plain", base_identity=BASE
    ) as fleet:
        await save_plain_blocks(fleet)
        spec = fleet.spec(0, readiness=READINESS)
        with pytest.raises(InvalidIdentityError, match="serves it, but exam-1 on 2"):
            await adopt_base(spec, "another-name")
        shard = next(fleet.checkpoints[0].glob("*.safetensors")).name
        (fleet.bucket / BASE).mkdir()
        (fleet.bucket / BASE / shard).write_bytes(b"somebody else's")
        with pytest.raises(IdentityConflictError, match=f"{shard} lies in the store with 15 bytes"):
            await adopt_base(spec, BASE)
        assert (fleet.bucket / BASE / shard).read_bytes() == b"somebody else's"
        (fleet.bucket / BASE / shard).unlink()
        await adopt_base(spec, BASE)
        with pytest.raises(IdentityConflictError, match="other content"):
            await adopt_base(fleet.spec(1, readiness=READINESS), BASE)


def test_adopting_is_a_command(prefect_api: str, tmp_path: Path, checkpoints: list[Path]) -> None:
    with running_fleet(
        "command", tmp_path, checkpoints, dialect="plain", base_identity=BASE
    ) as fleet:
        account = {"base_url": fleet.url, "api_key": API_KEY, "dialect": "plain", **NAMES}
        blocks = {"account": account, "store": {"url": fleet.bucket.as_uri()}}
        cycle = fleet.declared(0, readiness=READINESS)
        del cycle["service"], cycle["store"], cycle["rollouts"]
        file = tmp_path / "cycle.yaml"
        file.write_text(yaml.safe_dump({"blocks": blocks, "cycle": cycle}))

        def ended(identity: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "flows", str(file), "--adopt", identity],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )

        done = ended(BASE)
        assert done.returncode == 0, done.stderr
        assert "exam-1 is adopted as run-000000" in done.stdout
        refused = ended("another-name")
        assert refused.returncode == 1
        assert "error: " in refused.stderr.splitlines()[-1]
