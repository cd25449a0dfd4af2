"""Step: one optimizer step, arrow by arrow, in the order that survives a kill (docs/resume.md)."""

import asyncio
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
from prefect import task
from prefect.cache_policies import NO_CACHE

from hotload.clients.handoff.usable_groups import GroupsAhead, RowKey, StepGroups, UsableGroups
from hotload.clients.store import Store
from hotload.clients.store.step_records import promote, write_step
from hotload.clock import monotonic, utc_now
from hotload.dataset.trainer_batch import make_batch, trainable
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import remove_tree
from hotload.directory.finite import find_not_finite
from hotload.directory.relayout import CheckpointView, view_checkpoint
from hotload.trainers.step_samples import StepSamples
from hotload.trainers.training_step import AccumulatedStep
from hotload.training.loss_inputs import PerToken
from hotload.training.settings import StateRef
from hotload.training.step_record import ExportedCheckpoint, Promotion, StepRecord
from tasks import RETRIED
from tasks.training.run import StepPlace, TrainingRun, WindowedRun
from tasks.validate import read_content

NOT_FINITE = (
    "nothing of it is published. A smaller schedule.learning_rate or a step.adam.grad_clip_norm "
    "may keep it finite"
)
ARROW: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


@dataclass(frozen=True, slots=True, eq=False)
class TrainedStep:
    """An optimizer step that is made."""

    step: int
    chunks: tuple[StepGroups, ...]
    learning_rate: float
    row_logprobs: Mapping[RowKey, PerToken]
    """The trainer's before the step, of the rows that were trained on."""
    figures: Mapping[str, float]
    trained_at: datetime | None


@dataclass(frozen=True, slots=True, eq=False)
class PlacedStep(TrainedStep):
    """A step that is made and not yet recorded, and where it stands in its run. `trained_at` is
    None where nothing was trained on."""

    place: StepPlace


async def make_step(
    run: TrainingRun,
    chunks: AsyncIterable[StepGroups],
    step: int,
    *,
    learning_rate: float | None = None,
) -> TrainedStep:
    """Make an optimizer step of these groups, for the first time or, at its recorded rate, again.

    Args:
        chunks: of the groups; the gradient of each is added when it is there.

    Raises:
        TrainerError, ValueError: as `hotload.trainers.training_step.train_step`.
    """
    spec, run.step_under_way = run.spec, step
    total = max(step, spec.windows.step_limit(len(run.problems)))
    rate = learning_rate or spec.schedule.at(step, total)
    work = AccumulatedStep(run.trainer, spec.loss, spec.step, reference=run.reference)
    seconds, count, made, rows = 0.0, 0, list[StepGroups](), list[RowKey]()
    async for groups in chunks:
        began = monotonic()
        samples, keys = await asyncio.to_thread(_samples_of, groups.frame)
        await run.ask(work.add, samples, rate)
        seconds += monotonic() - began
        made.append(groups)
        count += len(samples)
        rows += keys
    began = monotonic()
    outcome = await run.ask(work.finish, rate)
    frame = pl.concat([groups.frame for groups in made])
    figures = {
        **outcome.figures,
        "rollout/filtered_reward": _mean_reward(frame),
        "rollout/filtered_samples": float(count),
        **run.lag_figures(frame),
        "perf/train_time": seconds + monotonic() - began,
    }
    logprobs = dict(zip(rows, outcome.logprobs, strict=True))
    return TrainedStep(step, tuple(made), rate, logprobs, figures, trained_at=utc_now())


def _samples_of(frame: pl.DataFrame) -> tuple[StepSamples, list[RowKey]]:
    """Take the rows to train on as samples, and name each."""
    keys = trainable(frame).select("problem_id", "sample_number", "segment_number").rows()
    return StepSamples.of_batch(make_batch(frame)), keys


@task(**ARROW, task_run_name="train-{step}")
async def train(run: TrainingRun, step: int, groups: UsableGroups | GroupsAhead) -> PlacedStep:
    """Take the next groups, and make an optimizer step of them.

    Raises:
        As `make_step` and `RolloutReader.next`.
    """
    made = await make_step(run, groups.chunks(run.spec.chunk_sizes), step)
    run.asked_seconds = 0.0
    place = await run.place(made.chunks)
    figures = {
        **made.figures,
        **groups.raw_rewards(),
        "perf/train_wait_time": groups.waited_seconds(),
        "perf/sampler_wait_time": run.sampler_waited(),
    }
    return PlacedStep(
        made.step,
        made.chunks,
        made.learning_rate,
        made.row_logprobs,
        figures,
        made.trained_at,
        place,
    )


def closing_step(run: WindowedRun) -> PlacedStep:
    """Make what closes the records of a run whose last step neither saved nor exported: nothing is
    trained on."""
    run.asked_seconds = 0.0
    return PlacedStep(run.next_step, (), 0.0, {}, {}, None, run.closing_place())


@task(cache_policy=NO_CACHE, task_run_name="save-state-{made.step}", **RETRIED)
async def save_state(run: TrainingRun, made: PlacedStep) -> StateRef | None:
    """Save the trainer's state, where this step has one to save.

    Raises:
        StoreError: it cannot be written.
    """
    interval = run.spec.dcp_save_interval
    if not interval or (made.step % interval and not made.place.is_end):
        return None
    return await run.ask(run.trainer.save_state, f"{run.run_id}-{made.step:09d}")


@task(**ARROW, task_run_name="export-{made.step}", **RETRIED)
async def export_checkpoint(run: TrainingRun, made: PlacedStep) -> ExportedCheckpoint | None:
    """Export the weights as the run's next version, where this step is not within a window.

    Raises:
        TrainerError: the weights cannot be exported, or one of them is no number.
        InvalidCheckpointError: what was exported cannot be read.
    """
    version = made.place.exports_as
    return None if version is None else await export_version(run, version)


async def export_version(run: TrainingRun, policy_version: int) -> ExportedCheckpoint:
    """Export the weights as they are now under a version that no record names yet.

    Raises:
        As `export_checkpoint`.
    """
    directory = run.spec.checkpoint_of(policy_version)
    # What a killed process left: no record names it, so nobody relies on it.
    await asyncio.to_thread(remove_tree, directory)
    await asyncio.to_thread(directory.parent.mkdir, parents=True, exist_ok=True)
    await run.ask(run.trainer.export, directory)
    if wrong := await asyncio.to_thread(find_not_finite, _view(run, directory)):
        raise run.trainer_error(f"exported {wrong}; {NOT_FINITE}")
    digest = await content_digest(run, directory)
    return ExportedCheckpoint(policy_version=policy_version, content_sha256=digest)


async def content_digest(run: TrainingRun, directory: Path) -> str:
    """Digest a checkpoint's content as a cycle publishes it.

    Raises:
        InvalidCheckpointError: it is none, or cannot be read.
    """
    view = await asyncio.to_thread(_view, run, directory)
    return (await read_content(directory.name, view, FileDigests())).sha256


def _view(run: TrainingRun, directory: Path) -> CheckpointView:
    style = run.spec.cycle.snapshot.spec_dtype_style
    return view_checkpoint(directory, spec_dtype_style=style)


@task(**ARROW, task_run_name="record-{made.step}", **RETRIED)
async def record_step(
    run: TrainingRun,
    made: PlacedStep,
    state: StateRef | None,
    checkpoint: ExportedCheckpoint | None,
) -> StepRecord:
    """Record the step, only if nobody has: what it names is there, and now it counts.

    Raises:
        IdentityConflictError: another process of the run has recorded this step.
        StoreError: the store refuses.
    """
    parent, facts, place = run.records[-1] if run.records else None, run.trainer_facts, made.place
    record = StepRecord(
        run_id=run.run_id,
        step=made.step,
        parent_sha256=parent and parent.sha256,
        facts=run.facts,
        state=state,
        checkpoint=checkpoint,
        sampled_version=place.sampled_version,
        window_began=place.window_began,
        window_size=place.window_size,
        groups=tuple(part for groups in made.chunks for part in groups.groups),
        cursor=place.cursor,
        open_windows=place.open_windows,
        learning_rate=made.learning_rate,
        trainer={
            "name": run.spec.trainer.name,
            "parameter_count": facts.parameter_count,
            "lora_rank": facts.lora_rank,
            "is_deterministic": facts.is_deterministic,
            **facts.details,
        },
        figures={**made.figures, "perf/save_time": run.asked_seconds},
        trained_at=made.trained_at,
    )
    await write_step(run.store, record)
    run.add(record)
    return record


@task(cache_policy=NO_CACHE, task_run_name="acknowledge-{made.step}", **RETRIED)
async def acknowledge(groups: UsableGroups | GroupsAhead, made: TrainedStep) -> None:
    """Acknowledge the step's groups, and those beside them that teach nothing.

    Raises:
        LeaseLostError: another consumer reads the run's groups.
        StoreError: the store refuses.
    """
    await groups.acknowledge(made.row_logprobs)


@task(**ARROW, task_run_name="promote-{name}", **RETRIED)
async def promote_version(
    store: Store, run_id: str, name: str, policy_version: int | None
) -> Promotion:
    """Give a published version a name, as `hotload.clients.store.step_records.promote`."""
    return await promote(store, run_id, name, policy_version)


def _mean_reward(frame: pl.DataFrame) -> float:
    rewards = frame.filter(pl.col("reward").is_not_null() & (pl.col("segment_number") == 0))
    return float(rewards["reward"].mean())  # type: ignore[arg-type]
