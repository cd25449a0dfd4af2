"""The cycle against a real Prefect server, emulator and bucket: what is published, and why."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from examples.tiny_trainer import TinyTrainer
from flows.cycle import checkpoint_to_rollout
from flows.publish import publish_version
from hotload.clients.store.publisher_leases import publisher_lease
from hotload.directory.files import sha256_file
from hotload.directory.shards import read_checkpoint
from hotload.errors import (
    FullSnapshotFailedError,
    IdentityConflictError,
    InvalidCheckpointError,
    InvalidIdentityError,
    InvalidProblemsError,
    LeaseLostError,
    RewardError,
    ServiceRefusedError,
    SnapshotRejectedError,
)
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import SnapshotPlan
from hotload.publish.workspace import Workspace
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tasks.baseline import Baseline
from tasks.plan import plan_snapshot
from tasks.validate import validate_checkpoint
from tests.flows.fleet import NAMES, SERVICE, Fleet, running_fleet, save_blocks
from tests.waiting import PATIENCE_SECONDS


async def run(fleet: Fleet, version: int, **changes: Any) -> CycleReport:
    return await checkpoint_to_rollout(fleet.spec(version, **changes))


def published(fleet: Fleet) -> set[str]:
    """Identities of every manifest in the store."""
    return {path.stem for path in (fleet.bucket / "_hotload" / "snapshots").glob("*.json")}


def copied(fleet: Fleet, version: int) -> Path:
    """A checkpoint of the test's own, to be damaged."""
    return Path(
        shutil.copytree(
            fleet.checkpoints[version], fleet.root / f"own-{version}", dirs_exist_ok=True
        )
    )


async def test_a_full_then_deltas_then_a_fallback_then_a_delta(fleet: Fleet) -> None:
    first = await run(fleet, 1)
    assert (first.outcome, first.snapshot.kind) == ("published", SnapshotKind.FULL)
    assert set(first.seconds_by_stage) == {"upload", "publish", "signal", "converge"}

    second = await run(fleet, 2)
    assert second.snapshot.kind is SnapshotKind.DELTA
    assert set(second.seconds_by_stage) - set(first.seconds_by_stage) == {"encode"}
    assert second.snapshot.previous == first.snapshot.identity
    assert second.snapshot.ratio > 10

    fleet.fault(fault="torn_apply", replica="replica-1", count=1)
    third = await run(fleet, 3)
    assert (third.outcome, third.snapshot.kind) == ("fell back", SnapshotKind.FULL)
    assert "1 of 2 replicas report an error" in str(third.fallback_reason)
    assert "1 replica: on run-000002-" in str(third.fallback_reason)
    assert ", ready, error for run-000003-" in str(third.fallback_reason)

    fourth = await run(fleet, 4)
    assert fourth.snapshot.kind is SnapshotKind.DELTA
    assert fleet.served() == {fourth.snapshot.identity}
    assert fourth.rollouts.samples_by_identity == {fourth.snapshot.identity: 8}
    assert fleet.log()["client_bugs"] == []


async def test_the_replicas_answer_with_the_very_weights_of_the_checkpoint(
    fleet: Fleet, tmp_path: Path
) -> None:
    for version in (1, 2):
        await run(fleet, version)
    direct = tmp_path / "direct"
    direct.mkdir()
    with running_fleet("direct", direct, fleet.checkpoints[2:3]) as other:
        assert answer(fleet) == answer(other)


def answer(fleet: Fleet) -> list[float]:
    """Log-probabilities of a greedy answer by the service's weights."""
    body = {
        "model": "accounts/local/models/policy",
        "prompt": [5, 6, 7],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
    }
    headers = {
        "Authorization": "Bearer key-that-must-not-be-shown",
        "fireworks-deployment": "accounts/local/deployments/rollouts",
    }
    found = httpx.post(
        f"{fleet.url}/inference/v1/completions",
        json=body,
        headers=headers,
        timeout=PATIENCE_SECONDS,
    )
    choice = found.raise_for_status().json()["choices"][0]
    return [token["logprob"] for token in choice["logprobs"]["content"]]


async def test_a_repeated_trigger_gets_the_report_and_changes_nothing(fleet: Fleet) -> None:
    first = await run(fleet, 1)
    signals = len(fleet.log()["signals"])
    assert await run(fleet, 1) == first
    assert len(fleet.log()["signals"]) == signals
    assert len(fleet.samples_asked()) == 8


async def test_the_same_version_with_other_content_is_refused(fleet: Fleet) -> None:
    await run(fleet, 1)
    with pytest.raises(IdentityConflictError, match="other content"):
        await run(fleet, 1, checkpoint=str(fleet.checkpoints[2]))
    # The same where the cycle never ended: only its manifest is in the store.
    shutil.rmtree(fleet.bucket / "_hotload" / "reports")
    with pytest.raises(IdentityConflictError, match="other content"):
        await run(fleet, 1, checkpoint=str(fleet.checkpoints[2]))
    assert len(published(fleet)) == 1


async def test_an_older_version_is_refused(fleet: Fleet) -> None:
    await run(fleet, 2)
    with pytest.raises(InvalidIdentityError, match="already serves version 2"):
        await run(fleet, 1)


def edit_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 10_000.5}))


def edit_tokenizer(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))


@flow
async def plan_only(spec: CycleSpec) -> SnapshotPlan:
    service = (await HotLoadService.load(spec.service)).open()
    store = (await CheckpointStore.load(spec.store)).open()
    workspace = Workspace(Path(spec.work_dir), NAMES["account_id"], NAMES["deployment_id"])
    baseline = Baseline(workspace, store, Path(spec.checkpoint))
    content = await validate_checkpoint(spec, [service], baseline.digests)
    async with publisher_lease(store, SERVICE, spec.name) as lease:
        return await plan_snapshot(spec, service, baseline, content, lease)


@pytest.mark.parametrize(
    ("edit", "words"), [(edit_config, "config.json"), (edit_tokenizer, "tokenizer_config.json")]
)
async def test_a_changed_side_file_makes_a_full_and_says_why(
    fleet: Fleet, edit: Any, words: str
) -> None:
    await run(fleet, 1)
    own = copied(fleet, 2)
    edit(own)
    # The emulator would refuse the config itself; what matters here is the plan.
    plan = await plan_only(fleet.spec(2, checkpoint=str(own)))
    assert plan.kind is SnapshotKind.FULL
    assert words in plan.reason


async def test_the_cadence_is_honoured(fleet: Fleet) -> None:
    cadence = {"full_every": 2}
    kinds = [(await run(fleet, n, cadence=cadence)).snapshot.kind for n in (1, 2, 3)]
    assert kinds == [SnapshotKind.FULL, SnapshotKind.DELTA, SnapshotKind.FULL]


async def test_a_version_that_is_not_due_samples_what_is_served(fleet: Fleet) -> None:
    cadence = {"weight_sync_interval": 2}
    first = await run(fleet, 2, cadence=cadence)
    second = await run(fleet, 3, cadence=cadence)
    assert (second.outcome, second.seconds_by_stage) == ("not due", {})
    assert second.snapshot.identity == first.snapshot.identity
    assert second.rollouts.samples_by_identity == {first.snapshot.identity: 8}
    assert second.rollouts.parts_uri != first.rollouts.parts_uri
    third = await run(fleet, 4, cadence=cadence)
    assert third.snapshot.previous == first.snapshot.identity


async def test_force_full(fleet: Fleet) -> None:
    await run(fleet, 1)
    report = await run(fleet, 2, cadence={"force_full": True})
    assert (report.outcome, report.snapshot.kind) == ("published", SnapshotKind.FULL)


async def test_a_new_machine_goes_on_with_a_delta(fleet: Fleet) -> None:
    for version in (1, 2):
        await run(fleet, version)
    report = await run(fleet, 3, work_dir=str(fleet.root / "new-machine"))
    assert report.snapshot.kind is SnapshotKind.DELTA
    assert fleet.served() == {report.snapshot.identity}


async def test_the_baseline_is_the_served_snapshot_byte_for_byte(fleet: Fleet) -> None:
    for version in (1, 2):
        report = await run(fleet, version)
    baselines = fleet.root / "work" / "local" / "rollouts" / "baseline"
    (kept,) = baselines.iterdir()
    assert kept.name == report.snapshot.identity
    target = fleet.checkpoints[2]
    assert {file.name: sha256_file(file) for file in kept.iterdir()} == {
        file.name: sha256_file(file) for file in target.iterdir()
    }


async def test_nothing_of_a_snapshot_is_missing_or_extra_in_the_store(fleet: Fleet) -> None:
    report = await run(fleet, 1)
    stored = fleet.bucket / report.snapshot.identity
    assert {file.name for file in stored.iterdir()} == {
        file.name for file in fleet.checkpoints[1].iterdir()
    }
    assert len(read_checkpoint(stored).shards) == 9


async def test_a_full_that_the_service_refuses_stops_at_once(fleet: Fleet) -> None:
    own = copied(fleet, 1)
    edit_config(own)
    with pytest.raises(SnapshotRejectedError, match="rope_theta"):
        await run(fleet, 1, checkpoint=str(own))
    assert len(published(fleet)) == 1
    assert fleet.served() == {None}


async def test_the_base_model_is_compared_before_anything_is_uploaded(fleet: Fleet) -> None:
    own = copied(fleet, 1)
    edit_config(own)
    with pytest.raises(InvalidCheckpointError, match="rope_theta"):
        await run(fleet, 1, checkpoint=str(own), base_model=str(fleet.checkpoints[0]))
    assert published(fleet) == set()


async def test_the_ladder_ends_with_who_must_act(fleet: Fleet) -> None:
    await run(fleet, 1)
    fleet.fault(fault="restart_to_base", replica="replica-1")
    readiness = {"poll_interval_seconds": 0.05, "weight_sync_timeout": 0.5}
    with pytest.raises(FullSnapshotFailedError, match="look at the replicas"):
        await run(fleet, 2, readiness=readiness)
    # A delta and two fulls were tried, each under an identity of its own.
    assert len([identity for identity in published(fleet) if "-000002-" in identity]) == 3


@pytest.mark.parametrize(
    ("rows", "words"),
    [("", "no rows"), ('{"id": "a"}\n', "row 1"), ("{\n", "row 1"), ("[1]\n", "row 1")],
)
async def test_bad_problems_cost_no_upload(fleet: Fleet, rows: str, words: str) -> None:
    (fleet.root / "problems.jsonl").write_text(rows)
    with pytest.raises(InvalidProblemsError, match=words):
        await run(fleet, 1)
    assert published(fleet) == set()


async def test_an_unknown_reward_costs_no_upload(fleet: Fleet) -> None:
    with pytest.raises(RewardError):
        await run(fleet, 1, reward={"name": "no_such_reward"})
    assert published(fleet) == set()


async def test_a_broken_checkpoint_costs_no_upload(fleet: Fleet) -> None:
    own = copied(fleet, 1)
    shard = next(own.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InvalidCheckpointError, match=shard.name):
        await run(fleet, 1, checkpoint=str(own))
    assert published(fleet) == set()


async def test_a_tied_head_of_other_bytes_costs_no_upload(fleet: Fleet) -> None:
    own = copied(fleet, 1)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(InvalidCheckpointError, match=r"tied_head.*other bytes"):
        await run(fleet, 1, checkpoint=str(own))
    assert published(fleet) == set()


async def test_what_a_trainer_leaves_at_every_step_keeps_no_delta_away(fleet: Fleet) -> None:
    reports = []
    for version in (1, 2):
        own = copied(fleet, version)
        (own / f"global_step{version}").mkdir()
        (own / "latest").write_text(f"global_step{version}")
        (own / "random_states_0.pkl").write_bytes(bytes([version]))
        reports.append(await run(fleet, version, checkpoint=str(own)))
    assert [report.snapshot.kind for report in reports] == [SnapshotKind.FULL, SnapshotKind.DELTA]
    stored = {path.name for path in (fleet.bucket / reports[0].snapshot.identity).iterdir()}
    assert stored == {path.name for path in fleet.checkpoints[1].iterdir()}
    told = " ".join(reports[1].snapshot.warnings)
    assert "global_step2" in told
    assert "latest, random_states_0.pkl" in told


async def test_a_second_publisher_is_refused_while_the_first_lives(fleet: Fleet) -> None:
    store = (await CheckpointStore.load(fleet.name)).open()
    async with publisher_lease(store, SERVICE, "another-cycle"):
        with pytest.raises(LeaseLostError, match="another-cycle"):
            await run(fleet, 1)
    assert published(fleet) == set()
    await run(fleet, 1)


@pytest.mark.parametrize("status", [401, 404])
async def test_a_service_that_refuses_us_stops_the_cycle(fleet: Fleet, status: int) -> None:
    fleet.fault(fault="respond", operation="deployment", status=status)
    with pytest.raises(ServiceRefusedError, match=str(status)):
        await run(fleet, 1)


async def test_a_sync_service_is_carried_to_as_well(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    with running_fleet("fleet-sync", tmp_path, checkpoints, transition="SYNC") as fleet:
        await save_blocks(fleet)
        for version in (1, 2):
            report = await run(fleet, version)
        assert fleet.served() == {report.snapshot.identity}


async def test_another_tensor_layout_makes_a_full_and_says_why(fleet: Fleet) -> None:
    await run(fleet, 1)
    own = fleet.root / "resharded"
    TinyTrainer().save(own)
    first, second = sorted(own.glob("*.safetensors"))[:2]
    swapped = own / "swap"
    first.rename(swapped)
    second.rename(first)
    swapped.rename(second)
    index = own / "model.safetensors.index.json"
    text = index.read_text().replace(first.name, "@").replace(second.name, first.name)
    index.write_text(text.replace("@", second.name))
    report = await run(fleet, 2, checkpoint=str(own))
    assert (report.outcome, report.snapshot.kind) == ("published", SnapshotKind.FULL)
    assert first.name in report.snapshot.reason


async def test_a_work_directory_that_keeps_nothing_is_said_and_priced(fleet: Fleet) -> None:
    workspace = Workspace(fleet.root / "work", NAMES["account_id"], NAMES["deployment_id"])
    workspace.root.mkdir(parents=True)
    workspace.baselines.touch()  # as a full disk: no directory can be made there
    for version in (1, 2):
        state = await checkpoint_to_rollout(fleet.spec(version), return_state=True)
        report = await state.result()
        assert state.name == "CompletedWithoutBaseline"
        assert report.snapshot.kind is SnapshotKind.FULL
        assert "the next snapshot is full, " in str(state.message)
        assert report.rows()[-2] == {"what": "baseline", "value": state.message}
    state = await publish_version(fleet.spec(3), return_state=True)
    assert state.name == "CompletedWithoutBaseline"
    assert "the next snapshot is full, " in str(state.message)
    workspace.baselines.unlink()
    for version, kind in ((4, SnapshotKind.DELTA), (5, SnapshotKind.DELTA)):
        state = await checkpoint_to_rollout(fleet.spec(version), return_state=True)
        assert (state.name, (await state.result()).snapshot.kind) == ("Completed", kind)
