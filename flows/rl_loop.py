"""The loop: a trainer that learns from what a fleet samples from its own weights.

resume → for each window: a cycle (publish, sample, score) beside optimizer steps on its groups →
save state → export → record → acknowledge → the next window publishes

    python -m flows.rl_loop run.yaml      # begin it, or go on where it was killed

docs/loop.md says what the file holds and what a kill leaves.
"""

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from prefect import flow
from prefect.blocks.core import Block

from blocks.checkpoint_store import CheckpointStore
from flows.command_line import read_input, run_command
from flows.cycle import checkpoint_to_rollout
from flows.cycle_file import TrainingSpecT, parse_run_file, save_inline_blocks
from flows.publish import publish_version
from hotload.cli.wording import text_table
from hotload.clients.handoff.usable_groups import GroupsAhead, UsableGroups
from hotload.clients.store.kept_states import read_branches, read_removed
from hotload.clients.store.step_records import read_promotions, read_steps
from hotload.concurrently import both
from hotload.report.training_table import run_rows
from hotload.spec import CycleSpec
from hotload.trainers.declaration import TrainingSpec
from hotload.training.kept_states import decide_states
from hotload.training.step_record import StepRecord
from tasks.training.restore import (
    export_again,
    load_state,
    make_again,
    plan_restore,
    read_again,
)
from tasks.training.retain_states import retain_states
from tasks.training.run import TrainingRun, WindowedRun, opened_run
from tasks.training.show_training import show_training, tell_what_taught_nothing, write_page
from tasks.training.step import (
    PlacedStep,
    acknowledge,
    closing_step,
    export_checkpoint,
    promote_version,
    record_step,
    save_state,
    train,
)


@flow(name="rl-loop", flow_run_name="{spec.cycle.run_id}", persist_result=False)
async def rl_loop(spec: TrainingSpec) -> StepRecord:
    """Train a policy on what is sampled from it, window by window.

    Safe to kill anywhere and to start again, here or on another machine with the store and the
    newest state: the step records say what is done.

    Args:
        spec: what is trained, on which problems, and how it is sampled.

    Returns:
        the record of the last step.

    Raises:
        RewardError: nothing could be learnt from.
    """
    store = (await CheckpointStore.load(spec.cycle.store)).open()
    async with opened_run(spec, store, WindowedRun) as run:
        await restore_run(run)
        while (window := run.at.window) is not None:
            cycle = await run.declare_cycle(window)
            await both(sample_window(run, cycle), train_window(run))
        await close_records(run)
        return await conclude_run(run)


async def restore_run(run: TrainingRun) -> None:
    """Bring the trainer to where the newest record left it, and the version that is sampled into
    its directory (docs/resume.md).

    What the last record is owed, acknowledging and publishing, is done by its window: both change
    nothing where they are done.
    """
    for leg in await plan_restore(run):
        if not await load_state(run, leg):
            await restore_run(run)  # planned without that state
            return
        for record in leg.replayed:
            await make_again(run, record, await read_again(run, record))
        if leg.exports:
            await export_again(run)


async def sample_window(run: WindowedRun, cycle: CycleSpec) -> None:
    """Publish the weights that were exported last, and sample the window's problems from them."""
    await checkpoint_to_rollout(cycle)
    run.note_sampled()


async def train_window(run: WindowedRun) -> None:
    """Make the window's optimizer steps, as its groups come; the last one exports a version.

    Nothing is trained in a window without a usable group, and nothing published after it.
    """
    groups, steps = run.groups, len(run.records)
    while await groups.has_more():
        await make_next_step(run, groups)
    if len(run.records) == steps:
        run.leave_window(groups.counts)


async def make_next_step(run: TrainingRun, groups: UsableGroups | GroupsAhead) -> None:
    """Make the run's next step, in the order that survives a kill (docs/resume.md)."""
    made = await train(run, run.next_step, groups)
    await keep_step(run, made)
    await both(acknowledge(groups, made), show_training(run))


async def keep_step(run: TrainingRun, made: PlacedStep) -> None:
    """Save the state, export the weights, and record both: from then on the step counts, and older
    states may go."""
    state = await save_state(run, made)
    checkpoint = await export_checkpoint(run, made)
    await record_step(run, made, state, checkpoint)
    if state is not None and run.spec.keep_states is not None:
        await retain_states(run)


async def close_records(run: WindowedRun) -> None:
    """Keep what the last step made where no window's end has: at interval 0, where what was left of
    the problems taught nothing."""
    if run.records and run.records[-1].checkpoint is None:
        await keep_step(run, closing_step(run))


async def conclude_run(run: TrainingRun) -> StepRecord:
    """Publish the weights that were exported last, write the page of the run, and give its result
    the declared name; returns the last record.

    Raises:
        RewardError: nothing was ever trained.
    """
    spec, version = run.spec, run.exported_version
    if version:
        await publish_version(spec.cycle_of(version, version))
    await write_page(run)
    tell_what_taught_nothing(run)
    if spec.output_model_id is not None:
        await promote_version(run.store, run.run_id, spec.output_model_id, None)
    return run.records[-1]


async def load_run_file(spec: TrainingSpecT, blocks: dict[str, Block]) -> TrainingSpecT:
    """Save the inline blocks of a run file, and name them in its cycle."""
    return spec.model_copy(update={"cycle": await save_inline_blocks(spec.cycle, blocks)})


async def loop_declared(
    spec: TrainingSpecT,
    blocks: dict[str, Block],
    loop: Callable[[TrainingSpecT], Awaitable[object]],
) -> list[str]:
    """Begin a run, or go on with it; returns what it came to."""
    spec = await load_run_file(spec, blocks)
    await loop(spec)
    return await list_declared(spec, {})


async def resume_declared(
    spec: TrainingSpecT,
    blocks: dict[str, Block],
    loop: Callable[[TrainingSpecT], Awaitable[object]],
) -> list[str]:
    """Go on with a run that has begun.

    Raises:
        ValueError: it has no step here.
    """
    spec = await load_run_file(spec, blocks)
    store = (await CheckpointStore.load(spec.cycle.store)).open()
    if not await read_steps(store, spec.cycle.run_id):
        raise ValueError(f"{store.url} has no step of run {spec.cycle.run_id} to go on from")
    return await loop_declared(spec, {}, loop)


async def list_declared(spec: TrainingSpec, blocks: dict[str, Block]) -> list[str]:
    """List the steps of a run with their states and versions, and the names that were given."""
    spec = await load_run_file(spec, blocks)
    store = (await CheckpointStore.load(spec.cycle.store)).open()
    run_id = spec.cycle.run_id
    records, promotions = await read_steps(store, run_id), await read_promotions(store, run_id)
    removed, begun = await read_removed(store, run_id), await read_branches(store, run_id)
    kept = decide_states(
        records,
        newest=spec.keep_states,
        every=spec.keep_states_every,
        promoted=[one.step for one in promotions],
        branches=begun,
        lost=removed,
    )
    if not records:
        return [f"run {run_id}: no step is recorded"]
    return list(text_table(*run_rows(records, promotions, kept, removed)))


async def promote_declared(
    spec: TrainingSpec, blocks: dict[str, Block], name: str, version: int | None
) -> list[str]:
    """Give a version of a run a name; returns a line about it."""
    spec = await load_run_file(spec, blocks)
    store = (await CheckpointStore.load(spec.cycle.store)).open()
    given = await promote_version.fn(store, spec.cycle.run_id, name, version)
    return [f"{given.name} is version {given.policy_version} of {given.run_id}: {given.identity}"]


def show_lines(lines: list[str]) -> int:
    """Print what a command has to say."""
    print("\n".join(lines))
    return 0


def run_loop_command(
    module: str, model: type[TrainingSpecT], loop: Callable[[TrainingSpecT], Awaitable[object]]
) -> int:
    """Run the loop that a run file declares, or look at one; returns the exit code.

    Args:
        module: what the command is called by.
        model: what the file declares.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description="Train a policy on what a fleet samples from it, as a run file declares.",
        epilog="A killed run goes on where it was when started again with the same file.",
    )
    parser.add_argument("run_file", type=Path, help="YAML with `cycle:`, `training:`, `blocks:`")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--resume", action="store_true", help="go on, or fail if nothing has begun")
    does.add_argument("--list", action="store_true", help="its steps, states, versions and names")
    does.add_argument("--promote", metavar="NAME", help="give a published version a name, once")
    parser.add_argument(
        "--version", type=int, metavar="N", help="which version to promote (the last)"
    )
    given = parser.parse_args()
    if given.version is not None and given.promote is None:
        parser.error("--version goes with --promote")
    spec, blocks = read_input(lambda: parse_run_file(given.run_file, model))
    if given.promote is not None:
        return run_command(promote_declared(spec, blocks, given.promote, given.version), show_lines)
    if given.list:
        return run_command(list_declared(spec, blocks), show_lines)
    work = resume_declared if given.resume else loop_declared
    return run_command(work(spec, blocks, loop), show_lines)


def main() -> int:
    """Run a training loop, or look at one; exit codes as `python -m flows`."""
    return run_loop_command("flows.rl_loop", TrainingSpec, rl_loop)


if __name__ == "__main__":
    sys.exit(main())
