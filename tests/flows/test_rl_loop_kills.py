"""A training run killed with SIGKILL at every arrow of a step ends in the same bits as a straight
one; and runs of other kinds than test_rl_loop.py has. `make train-kills` runs them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.rl_loop import rl_loop
from hotload.clients.store import Store
from hotload.clients.store.step_records import TRAINING, read_steps
from hotload.errors import IdentityConflictError
from hotload.training.step_record import StepRecord
from tests.flows.fleet import Fleet, running_fleet, save_blocks
from tests.flows.killed_cycle import FlowProcess
from tests.flows.training_runs import (
    DIES,
    Kill,
    bits,
    declared,
    problems_of,
    read_run,
    run_killed,
    spec_of,
    with_problems,
)

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Moment = Callable[[FlowProcess], bool]


def start(fleet: Fleet, document: Any, **environment: str) -> FlowProcess:
    return FlowProcess("flows.rl_loop", fleet.root / "run.yaml", document, **environment)


def has_said(words: str) -> Moment:
    return lambda process: process.has_said(words)


# Problems, so many that every kill comes before the end; and the declaration.
STORIES: dict[str, tuple[int, dict[str, Any]]] = {
    "windows of one step": (12, {"windows": {"prompt_groups_per_step": 2, "seed": 3}}),
    # With one request in flight the groups arrive in one order, so that the steps are the same.
    "windows of two, a state every third step": (
        20,
        {
            "windows": {"prompt_groups_per_step": 2, "weight_sync_interval": 2, "seed": 3},
            "dcp_save_interval": 3,
        },
    ),
}


@pytest.mark.parametrize("story", STORIES)
async def test_killed_at_every_arrow(prefect_api: str, tmp_path: Path, story: str) -> None:
    checkpoints = tmp_path / "base"
    from examples.tiny_trainer import TinyTrainer

    TinyTrainer().save(checkpoints)
    problems, changes = STORIES[story]
    sampling = {
        "completions_per_prompt": 4,
        "max_completion_tokens": 4,
        "seed": 5,
        "concurrency": {"mode": "fixed", "initial_window": 1},
    }
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    with running_fleet(f"s{uuid.uuid4().hex[:12]}", tmp_path / "straight", [checkpoints]) as fleet:
        await save_blocks(fleet)
        with_problems(fleet, problems)
        await rl_loop(spec_of(fleet, cycle={"sampling": sampling}, **changes))
        straight = await read_run(fleet)

    with running_fleet(f"k{uuid.uuid4().hex[:12]}", tmp_path / "killed", [checkpoints]) as fleet:
        await save_blocks(fleet)
        with_problems(fleet, problems)
        document = declared(fleet, cycle={"sampling": sampling}, **changes)
        kills: list[Kill] = [
            ("'roll-out-0'", {}),
            ("", {DIES: "backward 0"}),
            ("", {DIES: "save_state! 0"}),
            ("", {DIES: "export 1"}),
            ("", {DIES: "export! 1"}),
            ("'record-", {}),
            ("'acknowledge-", {}),
            ("'manifests-learn-", {}),
            ("'signal-learn-", {}),
            ("", {DIES: "step! 1"}),
            ("'record-", {}),
            ("'publish-learn-", {}),
        ]
        count, _ = run_killed("flows.rl_loop", fleet, document, kills)
        killed = await read_run(fleet)
        assert bits(killed) == bits(straight)
        trained = [problem for one in killed for problem in problems_of(one)]
        assert len(trained) == len({*trained})
        assert fleet.log()["client_bugs"] == []
    assert count >= len(kills) - 2


async def test_an_interval_of_0_publishes_the_start_and_the_end(fleet: Fleet) -> None:
    windows = {"prompt_groups_per_step": 2, "weight_sync_interval": 0, "epochs": 2, "seed": 3}
    await rl_loop(spec_of(fleet, windows=windows))
    records = await read_run(fleet)
    # One window an epoch, the second sampled from the same weights under a version of its own.
    assert {one.sampled_version for one in records} == {0, 1}
    assert [one.checkpoint is not None for one in records] == [False] * (len(records) - 1) + [True]
    signals = [note["identity"] for note in fleet.log()["signals"]]
    assert [one.rpartition("-")[0] for one in signals] == ["learn-000000", "learn-000002"]
    assert max(one.figures["async/version_offset_max"] for one in records) >= 1


async def test_a_replay_that_comes_to_other_bits_spends_the_version(fleet: Fleet) -> None:
    """As kernels of a GPU may; here the record names another digest than the steps come to."""
    spec = spec_of(fleet, windows={"prompt_groups_per_step": 4, "seed": 3}, dcp_save_interval=5)
    await rl_loop(spec)
    (record,) = await read_run(fleet)
    assert record.checkpoint is not None
    assert record.state is not None
    other = record.checkpoint.model_copy(update={"content_sha256": "0" * 64})
    changed = record.model_copy(update={"checkpoint": other, "state": None})
    store = Store(fleet.bucket.as_uri())
    await store.put_bytes(changed.render(), f"{TRAINING}/learn/steps/000000001.json")
    await rl_loop(
        spec.model_copy(update={"windows": spec.windows.model_copy(update={"epochs": 2})})
    )
    second: StepRecord = (await read_run(fleet))[1]
    assert second.sampled_version == 2
    assert second.checkpoint is not None
    assert second.checkpoint.policy_version == 3
    names = {note["identity"].rpartition("-")[0] for note in fleet.log()["signals"]}
    assert names == {f"learn-00000{version}" for version in range(4)}


async def test_a_branch_begins_with_a_state_of_another_run(fleet: Fleet) -> None:
    await rl_loop(spec_of(fleet))
    last = (await read_run(fleet))[-1]
    dapo = {"policy_loss": "dapo", "kl_beta": 0}
    cycle = {"run_id": "branch"}
    await rl_loop(spec_of(fleet, cycle=cycle, loss=dapo, init_from_checkpoint=f"learn:{last.step}"))
    signals = [note["identity"] for note in fleet.log()["signals"]]
    assert any(one.startswith("branch-000000-") for one in signals)
    # What it began with is not needed any more.
    shutil.rmtree(fleet.bucket / TRAINING / "learn")
    states = [one.state for one in await read_steps(Store(fleet.bucket.as_uri()), "branch")]
    kept = {one.path for one in states if one is not None}
    for path in (fleet.root / "states").iterdir():
        if path.name not in kept:
            path.unlink()
    longer = spec_of(
        fleet,
        cycle=cycle,
        loss=dapo,
        init_from_checkpoint=f"learn:{last.step}",
        windows={"prompt_groups_per_step": 2, "seed": 3, "epochs": 2},
    )
    await rl_loop(longer)
    assert len(await read_steps(Store(fleet.bucket.as_uri()), "branch")) > len(states)
    with pytest.raises(IdentityConflictError, match="no state of step 9 is recorded"):
        await rl_loop(spec_of(fleet, cycle={"run_id": "b"}, init_from_checkpoint="learn:9"))
