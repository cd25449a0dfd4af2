"""Restore: the trainer of a run that was killed, as it was after the newest record."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import islice

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.handoff.usable_groups import (
    ChosenGroup,
    StepGroups,
    read_recorded,
    step_groups,
)
from hotload.clients.store.records import SNAPSHOTS
from hotload.clients.store.step_records import read_steps
from hotload.directory.files import remove_tree
from hotload.errors import IdentityConflictError
from hotload.identity import read_identity
from hotload.training.resume import StepState, plan_resume, replayed_checkpoint
from hotload.training.step_record import ExportedCheckpoint, StepRecord
from tasks import RETRIED
from tasks.training.run import TrainingRun
from tasks.training.step import content_digest, export_version, make_step


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="restore-{run.run_id}", **RETRIED)
async def restore_run(run: TrainingRun) -> None:
    """Bring the trainer to where the newest record left it, and the version that is sampled into
    its directory: loaded from the newest state, the steps after it made again from their groups.

    What the last record is owed, acknowledging and publishing, is done by its window: both change
    nothing where they are done.

    Raises:
        StoreError: a state, a part or a record is not there, or is not what was recorded.
        IdentityConflictError: a branch begins with a state that is not recorded.
    """
    await _begin(run)
    exported = next((one for one in reversed(run.records) if one.checkpoint is not None), None)
    until = run.records[: exported.step] if exported is not None else []
    recorded = None if exported is None else exported.checkpoint
    made = 0
    if recorded is None or await _must_export(run, recorded, until):
        made = await _bring_to(run, until, made)
        await _export(run, recorded)
    else:
        run.exported_version = recorded.policy_version
    await _bring_to(run, run.records, made)


async def _must_export(
    run: TrainingRun, recorded: ExportedCheckpoint, until: Sequence[StepRecord]
) -> bool:
    """Whether the version is not there as it was recorded, or steps before it are made again, which
    may lead elsewhere."""
    directory = run.spec.checkpoint_of(recorded.policy_version)
    if plan_resume(until, StepState.RECORDED).replayed:
        return True
    if not await asyncio.to_thread(directory.exists):
        return True
    return await content_digest(run, directory) != recorded.content_sha256


async def _export(run: TrainingRun, recorded: ExportedCheckpoint | None) -> None:
    """Export the weights as the version that a record names, or as version 0."""
    if recorded is None:
        await export_version(run, 0)
        return
    made = await export_version(run, recorded.policy_version)
    spent = [recorded.policy_version, *await _published(run)]
    named = replayed_checkpoint(recorded, made.content_sha256, next_version=1 + max(spent))
    run.exported_version = named.policy_version
    if named == recorded:
        return
    places = (recorded.policy_version, named.policy_version)
    was, becomes = map(run.spec.checkpoint_of, places)
    await asyncio.to_thread(remove_tree, becomes)
    await asyncio.to_thread(was.rename, becomes)
    run.go_on_as(named.policy_version)
    get_run_logger().warning(
        "the steps made again came to other bits than were recorded: version %d is spent, and the "
        "run goes on as version %d",
        *places,
    )


async def _published(run: TrainingRun) -> list[int]:
    names = await run.store.names(SNAPSHOTS)
    found = (read_identity(name.removesuffix(".json")) for name in names)
    return [one.policy_version for one in found if one and one.run_id == run.run_id]


async def _bring_to(run: TrainingRun, records: Sequence[StepRecord], made: int) -> int:
    """Make the steps of these records that the trainer has not made, from the newest state on that
    saves any of them; returns how many it has made.
    """
    plan = plan_resume(records, StepState.RECORDED if records else None)
    saved = len(records) - len(plan.replayed)
    if plan.state is not None and made < saved:
        await run.ask(run.trainer.load_state, plan.state)
        made = saved
    for record in records[made:]:
        chunks = _chunks(await read_recorded(run.store, record), run.spec.chunk_sizes)
        await make_step(run, chunks, record.step, learning_rate=record.learning_rate)
        get_run_logger().info("step %d is made again from its groups", record.step)
    return len(records)


async def _chunks(groups: Sequence[ChosenGroup], sizes: Sequence[int]) -> AsyncIterator[StepGroups]:
    """Cut groups as they were cut when they came; the last chunk has all that are left."""
    left = iter(groups)
    for size in (*sizes[:-1], len(groups)):
        if chunk := list(islice(left, size)):
            yield step_groups(chunk)


async def _begin(run: TrainingRun) -> None:
    """Take the state that a branch begins with; a trainer that was just made has the start
    weights."""
    begins = run.spec.init_from_checkpoint
    if begins is None:
        return
    other, _, step = begins.rpartition(":")
    state = next(
        (one.state for one in await read_steps(run.store, other) if one.step == int(step)), None
    )
    if state is None:
        reason = f"init_from_checkpoint: no state of step {step} is recorded in this store"
        raise IdentityConflictError(other, reason)
    await run.ask(run.trainer.load_state, state)
