"""The loop on a real Prefect server: a numpy trainer learns from an emulated fleet."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.artifacts import Artifact
from prefect.utilities.callables import parameter_schema

from flows.async_rl_loop import async_rl_loop
from flows.cycle_file import parse_run_file
from flows.rl_loop import list_declared, promote_declared, rl_loop
from hotload.clients.store import Store
from hotload.clients.store.kept_states import keep_for_branch, mark_removed
from hotload.clients.store.step_records import read_step
from hotload.errors import IdentityConflictError, RewardError, StoreError, TrainerError
from hotload.trainers.declaration import TrainingSpec
from hotload.training.windows import Cursor
from tests.flows.fleet import Fleet
from tests.flows.training_runs import (
    ahead_of,
    bits,
    declared,
    problems_of,
    read_run,
    spec_of,
    with_problems,
)
from tests.tasks.test_send_metrics import install_client

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def parts(fleet: Fleet) -> dict[str, int]:
    """Every file of samples, and when it was written."""
    found = (fleet.bucket / "_hotload/rollouts").rglob("part-*.parquet")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_the_form_has_every_part_of_the_declaration() -> None:
    fields = parameter_schema(rl_loop).properties["spec"]
    assert "TrainingSpec" in str(fields)


async def test_a_run_is_trained_and_goes_on_elsewhere(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch here; then two epochs are declared on another machine, which has the store and the
    states: the end of an epoch is not the end of the run."""
    one = {"prompt_groups_per_step": 4, "seed": 3}
    install_client(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_SAYS", "yes")
    told = {"wandb": {"entity": "acme"}}
    last = await rl_loop(spec_of(fleet, windows=one, cycle=told, output_model_id="first"))
    (first,) = await read_run(fleet)
    _, step = json.loads((tmp_path / "learn~training.json").read_text())
    assert step == {"metrics": dict(first.figures), "step": 1}
    waits = {"perf/train_wait_time", "perf/sampler_wait_time", "async/version_offset_max"}
    assert waits <= step["metrics"].keys()
    assert last == first
    assert (first.sampled_version, first.cursor) == (0, Cursor(done_before=4))
    assert first.checkpoint is not None
    assert first.checkpoint.policy_version == 1
    assert first.figures["train/inference_k3"] < 1e-5
    assert first.figures["train/grad_norm"] > 0
    assert first.figures["rollout/raw_samples"] == 16
    assert first.figures["perf/save_time"] > 0
    page = fleet.bucket / "_hotload/training/learn/page.html"
    assert "After step <b>1</b>" in page.read_text()
    assert set(problems_of(first)) <= {f"sum-{n}" for n in range(4)}
    kept = (fleet.root / "work/training/learn/checkpoints").iterdir()
    assert sorted(one.name for one in kept) == ["000000", "000001"]
    (served,) = fleet.served()
    assert str(served).startswith("learn-000001-")
    artifact = await Artifact.aget("hotload-training-learn")
    assert artifact is not None
    assert "| k3, nats |" in str(artifact.data)

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(fleet.root / "states", elsewhere / "states")
    two = spec_of(fleet, root=elsewhere, windows=one | {"epochs": 2})
    await rl_loop(two)
    records = await read_run(fleet)
    assert records[0] == first
    assert [each.step for each in records] == [1, 2]
    assert (records[1].sampled_version, records[1].cursor.epoch) == (1, 1)
    # What it exported there for version 1 was published here, and is not published again.
    signals = [note["identity"] for note in fleet.log()["signals"]]
    assert len(signals) == len({*signals}) == 3

    # Started again, nothing is left to do, and nothing changes.
    sampled = parts(fleet)
    assert len(sampled) == 2
    await rl_loop(two)
    assert bits(await read_run(fleet)) == bits(records)
    assert len(fleet.log()["signals"]) == 3
    assert parts(fleet) == sampled

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(declared(fleet)))
    listed = await list_declared(*parse_run_file(file, TrainingSpec))
    assert len(listed) == 3
    assert listed[0].split("  ")[0] == "step"
    assert len({*map(len, listed)}) == 1  # aligned
    assert " 1 (first) " in listed[1]
    (line,) = await promote_declared(*parse_run_file(file, TrainingSpec), "second", None)
    assert line.startswith("second is version 2 of learn: learn-000002-")
    with pytest.raises(IdentityConflictError, match="'first' stands for version 1: choose another"):
        await promote_declared(*parse_run_file(file, TrainingSpec), "first", 2)

    other = spec_of(fleet, windows=one, loss={"policy_loss": "dapo"})
    with pytest.raises(IdentityConflictError, match=r"loss: recorded .*grpo.*, declared .*dapo"):
        await rl_loop(other)


async def test_old_states_go_and_what_is_needed_stays(fleet: Fleet, tmp_path: Path) -> None:
    """Of four states two stay, and one that a branch begins with; a removal that was broken off is
    finished, and what is gone is told where it is asked for."""
    with_problems(fleet, 4)
    windows = {"prompt_groups_per_step": 1, "seed": 3}
    await rl_loop(spec_of(fleet, windows=windows))
    states, store = fleet.root / "states", Store(fleet.bucket.as_uri())
    first, second, *_ = saved = [one.state for one in await read_run(fleet) if one.state]
    assert len(saved) >= 2
    await keep_for_branch(store, "learn", 2, "branch")
    await mark_removed(store, "learn", [1])
    longer = spec_of(fleet, windows=windows | {"epochs": 2}, keep_states=2)
    await rl_loop(longer)
    records = await read_run(fleet)
    kept = [second, *(one.state for one in records[-2:])]
    assert {path.name for path in states.iterdir()} == {one.path for one in kept if one}
    listed = await list_declared(longer, {})
    assert " removed " in listed[1]
    assert f"{second.path}  the beginning of branch" in listed[2]
    assert listed[-1].endswith(" newest")
    assert bits(records)[0][0] == first.sha256  # the records stay as they were
    await rl_loop(longer)  # nothing is left to do
    branch = spec_of(fleet, cycle={"run_id": "late"}, init_from_checkpoint="learn:1")
    with pytest.raises(IdentityConflictError, match="state of step 1 was removed"):
        await rl_loop(branch)


async def test_a_state_that_is_damaged_gives_way_to_the_one_before(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps since then are made again of their groups, here and on another machine, to the same
    bits; without those groups, or without an earlier state, the damage is told."""
    with_problems(fleet, 4)
    windows = {"prompt_groups_per_step": 1, "seed": 3}
    await rl_loop(spec_of(fleet, windows=windows))
    records = await read_run(fleet)
    assert len(records) >= 3
    states = [fleet.root / "states" / one.state.path for one in records if one.state]
    for path in states[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    signals = fleet.log()["signals"]
    with caplog.at_level("WARNING"):
        await rl_loop(spec_of(fleet, windows=windows))
        shutil.copytree(fleet.root / "states", tmp_path / "elsewhere/states")
        await rl_loop(spec_of(fleet, root=tmp_path / "elsewhere", windows=windows))
    assert fleet.log()["signals"] == signals
    assert bits(await read_run(fleet)) == bits(records)
    assert f"the state of step {len(records)} is of no use" in caplog.text
    assert "the run goes on from that of step 1" in caplog.text
    store, step = Store(fleet.bucket.as_uri()), "_hotload/training/learn/steps/000000003.json"
    whole = await store.read_bytes(step, limit_bytes=1 << 20)
    await store.put_bytes(whole[:-20], step)
    with pytest.raises(
        StoreError, match=f"{store.url}/{step}: not a step record: .* the store acts"
    ):
        await rl_loop(spec_of(fleet, windows=windows))
    begun = await read_step(store, "learn", 1)  # as a branch reads it
    assert begun == records[0]
    await store.put_bytes(whole, step)

    states[0].unlink()
    with pytest.raises(StoreError, match="no state to load"):
        await rl_loop(spec_of(fleet, windows=windows))
    shutil.rmtree(fleet.bucket / "_hotload/rollouts")
    with pytest.raises(StoreError, match="not the state that was saved"):
        await rl_loop(spec_of(fleet, windows=windows))


async def test_a_cycle_that_fails_ends_the_run_and_so_does_a_trainer(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither waits for the other, which will not come."""
    nowhere = spec_of(fleet, cycle={"reward": {"name": "tests.flows.training_runs:nowhere"}})
    with pytest.raises(RewardError, match="training_runs:nowhere"):
        await rl_loop(nowhere)
    monkeypatch.setenv("HOTLOAD_TEST_API_KEY", "hush-hush")
    raising = spec_of(fleet).trainer.model_copy(
        update={"name": "tests.flows.training_runs:open_raising_trainer"}
    )
    with pytest.raises(TrainerError, match="step 1: raised RuntimeError: out of memory") as failed:
        await rl_loop(spec_of(fleet, trainer=raising.model_dump()))
    assert "hush-hush" not in str(failed.value)
    assert str(failed.value).endswith("start the run again: it goes on from its beginning")
    signals = fleet.log()["signals"]
    diverging = spec_of(fleet).trainer.model_copy(
        update={"name": "tests.flows.training_runs:open_diverging_trainer"}
    )
    lost = r"step 1: exported tensor model.norm.weight of .*: 2 of 128 values are infinite or"
    with pytest.raises(TrainerError, match=lost):
        await rl_loop(spec_of(fleet, trainer=diverging.model_dump()))
    assert fleet.log()["signals"] == signals
    assert await read_run(fleet) == []


async def test_a_store_that_fails_while_steps_are_made_again_makes_none_of_them_twice(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a state all are made again; the disk fails once, in the third one's groups."""
    windows = {"prompt_groups_per_step": 1, "seed": 3}
    spec = spec_of(fleet, windows=windows, dcp_save_interval=0)
    await rl_loop(spec)
    records = await read_run(fleet)
    assert len(records) >= 3
    signals = fleet.log()["signals"]
    read: list[Path] = []
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.match("part-*.parquet"):
            read.append(path)
            if len(read) == 3:
                raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    await rl_loop(spec)
    # Each once, and that one again.
    assert len(read) == len(records) + 1
    # Other bits would have been published as another version.
    assert fleet.log()["signals"] == signals
    assert bits(await read_run(fleet)) == bits(records)


async def test_a_run_that_learns_nothing_ends_with_what_to_look_at(fleet: Fleet) -> None:
    reward = {"cycle": {"reward": {"name": "tests.flows.training_runs:always_right"}}}
    found = r"always_right': nothing was trained: \d groups of 4 samples .* mean reward is 1\."
    for _ in range(2):  # started again, it comes to the same
        with pytest.raises(RewardError, match=found):
            await rl_loop(spec_of(fleet, **reward))
        assert await read_run(fleet) == []
        assert len(fleet.log()["signals"]) == 1
    with pytest.raises(RewardError, match=found):
        await async_rl_loop(ahead_of(fleet, cycle=reward["cycle"] | {"run_id": "ahead"}))


async def test_what_was_learnt_is_published_also_where_the_last_epoch_teaches_nothing(
    fleet: Fleet,
) -> None:
    records = fleet.bucket / "_hotload/training/learn/steps"
    reward = {
        "name": "tests.flows.training_runs:right_once_trained",
        "arguments": {"records": str(records)},
    }
    windows = {"prompt_groups_per_step": 4, "weight_sync_interval": 0, "epochs": 2, "seed": 3}
    changes = {"cycle": {"reward": reward}, "dcp_save_interval": 5, "output_model_id": "result"}
    for _ in range(2):  # started again, it comes to the same
        await rl_loop(spec_of(fleet, windows=windows, **changes))
        step, closing = await read_run(fleet)
        assert (step.checkpoint, step.state) == (None, None)
        assert (closing.groups, closing.learning_rate) == ((), 0)
        assert closing.state is not None
        assert closing.checkpoint is not None
        signals = [note["identity"] for note in fleet.log()["signals"]]
        assert [one.rpartition("-")[0] for one in signals] == ["learn-000000", "learn-000002"]
    page = fleet.bucket / "_hotload/training/learn/page.html"
    assert "After step <b>1</b>" in page.read_text()
    listed = await list_declared(spec_of(fleet, windows=windows, **changes), {})
    assert " 2 (result) " in listed[2]
