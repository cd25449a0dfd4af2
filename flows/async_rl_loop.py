"""The asynchronous loop: sampler and trainer wait for each other only at the staleness bound.

resume → cycles, each publishing while those before it sample ∥ optimizer steps on the groups of all
of them, oldest first → save state → export → record → acknowledge → the next cycle

    python -m flows.async_rl_loop run.yaml      # begin it, or go on where it was killed

docs/loop.md says how far the sampler is ahead, and what a kill leaves.
"""

import sys

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from flows.cycle import checkpoint_to_rollout
from flows.rl_loop import conclude_run, make_next_step, restore_run, run_loop_command
from hotload.concurrently import both, overlap_as_they_come
from hotload.trainers.declaration import AsyncTrainingSpec
from hotload.training.step_record import StepRecord
from hotload.training.windows import OpenWindow
from tasks.training.ahead import AheadRun
from tasks.training.run import opened_run


@flow(name="async-rl-loop", flow_run_name="{spec.cycle.run_id}", persist_result=False)
async def async_rl_loop(spec: AsyncTrainingSpec) -> StepRecord:
    """Train a policy on what is sampled from it, while the next groups are sampled.

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
    async with opened_run(spec, store, AheadRun) as run:
        await restore_run(run)
        run.open_windows()
        await both(sample_ahead(run), train_ahead(run))
        return await conclude_run(run)


async def sample_ahead(run: AheadRun) -> None:
    """Run the cycle of every window: it publishes its version, and samples while later ones do."""
    await overlap_as_they_come(sample_version(run, window) async for window in run.windows())


async def sample_version(run: AheadRun, window: OpenWindow) -> None:
    """Publish a version, and sample its window from it and, as they come, from newer ones."""
    await checkpoint_to_rollout(await run.declare_cycle(window))
    run.end_cycle(window)


async def train_ahead(run: AheadRun) -> None:
    """Make optimizer steps as groups come, of whatever versions; each exports the next version."""
    while await run.has_more():
        await make_next_step(run, run.groups)


def main() -> int:
    """Run an asynchronous training loop, or look at one; exit codes as `python -m flows`."""
    return run_loop_command("flows.async_rl_loop", AsyncTrainingSpec, async_rl_loop)


if __name__ == "__main__":
    sys.exit(main())
