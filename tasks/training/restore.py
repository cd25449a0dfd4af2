"""Restore: the trainer of a run that was killed, as it was after the newest record.

What reads is tried again; what steps the trainer is not, since it would step twice.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import islice

from prefect import get_run_logger, task

from hotload.clients.handoff.directory import version_before
from hotload.clients.handoff.usable_groups import (
    ChosenGroup,
    StepGroups,
    read_recorded,
    step_groups,
)
from hotload.clients.store.kept_states import keep_for_branch
from hotload.clients.store.records import SNAPSHOTS
from hotload.clients.store.step_records import read_step
from hotload.directory.files import remove_tree
from hotload.errors import (
    IdentityConflictError,
    InvalidCheckpointError,
    StoreError,
    StoreUnavailableError,
)
from hotload.identity import NamedVersion, read_identity
from hotload.training.resume import (
    ResumeLeg,
    exported_step,
    is_made_again,
    newest_state,
    plan_resume,
)
from hotload.training.settings import StateRef
from hotload.training.step_record import ExportedCheckpoint, StepRecord
from tasks import RETRIED
from tasks.training.run import TrainingRun
from tasks.training.step import ARROW, content_digest, export_version, make_step

BEYOND_EVERY_VERSION = 10**9 - 1


@task(**ARROW, task_run_name="plan-{run.run_id}", **RETRIED)
async def plan_restore(run: TrainingRun) -> list[ResumeLeg]:
    """Look whether the version that is sampled lies here as recorded, and plan by it what brings
    the trainer to the newest record.

    Raises:
        StoreError: a record is missing, or follows another than the one before it.
    """
    is_here = not is_made_again(run.records, run.lost) and await _is_here(run)
    return plan_resume(run.records, is_here=is_here, lost=run.lost)


@task(**ARROW, task_run_name="load-{run.run_id}", **RETRIED)
async def load_state(run: TrainingRun, leg: ResumeLeg) -> bool:
    """Load the state that a leg begins with, if it begins with one.

    Returns:
        whether the leg can be gone on with. Else the state is of no use, an earlier one is there,
        and so are the groups of the steps after that: plan again.

    Raises:
        StoreError: it is of no use, and nothing takes its place.
        IdentityConflictError: a branch begins with a state that is not recorded, or was removed.
    """
    state = await _beginning(run) if leg.begins else leg.state
    if state is None:
        return True
    try:
        await run.ask(run.trainer.load_state, state)
    except StoreUnavailableError:
        raise
    except StoreError as error:
        step = next((one.step for one in run.records if one.state == state), 0)
        earlier = newest_state(run.records[: step - 1], run.lost) if step and not leg.begins else 0
        if not earlier or not await _has_groups(run, run.records[earlier:step]):
            raise
        run.lost.add(step)
        get_run_logger().warning(
            "the state of step %d is of no use, so the run goes on from that of step %d, and makes "
            "the steps since then again: %s",
            step,
            earlier,
            error,
        )
        return False
    return True


async def _has_groups(run: TrainingRun, records: Sequence[StepRecord]) -> bool:
    """Whether the groups of these steps are all there still."""
    try:
        for record in records:
            await read_recorded(run.store, record)
    except StoreUnavailableError:
        raise
    except StoreError:
        return False
    return True


@task(**ARROW, task_run_name="read-{record.step}", **RETRIED)
async def read_again(run: TrainingRun, record: StepRecord) -> list[ChosenGroup]:
    """Read the groups of a recorded step.

    Raises:
        StoreError: as `read_recorded`.
    """
    return await read_recorded(run.store, record)


@task(**ARROW, task_run_name="make-again-{record.step}")
async def make_again(run: TrainingRun, record: StepRecord, groups: Sequence[ChosenGroup]) -> None:
    """Make a recorded step again of its groups, at its recorded rate.

    Raises:
        As `make_step`.
    """
    chunks = _chunks(groups, run.spec.chunk_sizes)
    await make_step(run, chunks, record.step, learning_rate=record.learning_rate)
    get_run_logger().info("step %d is made again from its groups", record.step)


@task(**ARROW, task_run_name="export-again-{run.run_id}", **RETRIED)
async def export_again(run: TrainingRun) -> None:
    """Export the weights as the version that the newest record names, as version 0 before there is
    one; other bits than were recorded (kernels of a GPU) are the next free version, since one
    version never has two contents.

    Raises:
        As `export_version`; StoreError: the store refuses.
    """
    recorded = _recorded(run)
    if recorded is None:
        await export_version(run, 0)
        return
    made = await export_version(run, recorded.policy_version)
    if made.content_sha256 == recorded.content_sha256:
        return
    version = 1 + max(recorded.policy_version, *await _used(run))
    was, becomes = map(run.spec.checkpoint_of, (recorded.policy_version, version))
    await asyncio.to_thread(remove_tree, becomes)
    await asyncio.to_thread(was.rename, becomes)
    run.go_on_as(version)
    get_run_logger().warning(
        "the steps made again came to other bits than were recorded: version %d is spent, and the "
        "run goes on as version %d",
        recorded.policy_version,
        version,
    )


def _recorded(run: TrainingRun) -> ExportedCheckpoint | None:
    step = exported_step(run.records)
    return run.records[step - 1].checkpoint if step else None


async def _is_here(run: TrainingRun) -> bool:
    """Whether the version that is sampled lies here as recorded; of version 0 no digest is."""
    recorded = _recorded(run)
    directory = run.spec.checkpoint_of(recorded.policy_version if recorded else 0)
    if not await asyncio.to_thread(directory.exists):
        return False
    if recorded is None:
        return True
    try:
        return await content_digest(run, directory) == recorded.content_sha256
    except InvalidCheckpointError:
        return False


async def _used(run: TrainingRun) -> list[int]:
    """Versions of the run that were published, or sampled from weights of an earlier one."""
    names = await run.store.names(SNAPSHOTS)
    found = (read_identity(name.removesuffix(".json")) for name in names)
    published = [one.policy_version for one in found if one and one.run_id == run.run_id]
    sampled = await version_before(run.store, NamedVersion(run.run_id, 0, BEYOND_EVERY_VERSION))
    return [*published, 0 if sampled is None else sampled.policy_version]


async def _beginning(run: TrainingRun) -> StateRef | None:
    """Find the state that a branch begins with; a trainer that was just made has the start
    weights."""
    begins = run.spec.init_from_checkpoint
    if begins is None:
        return None
    other, _, step = begins.rpartition(":")
    record = await read_step(run.store, other, int(step))
    state = None if record is None else record.state
    if state is None:
        reason = f"init_from_checkpoint: no state of step {step} is recorded in this store"
        raise IdentityConflictError(other, reason)
    await keep_for_branch(run.store, other, int(step), run.run_id)
    return state


async def _chunks(groups: Sequence[ChosenGroup], sizes: Sequence[int]) -> AsyncIterator[StepGroups]:
    """Cut groups as they were cut when they came; the last chunk has all that are left."""
    left = iter(groups)
    for size in (*sizes[:-1], len(groups)):
        if chunk := list(islice(left, size)):
            yield step_groups(chunk)
