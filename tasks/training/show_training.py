"""Show: what a person sees of a training run in Prefect while it runs, and its page."""

import asyncio

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from hotload.clients.store.run_records import read_history
from hotload.clients.store.step_records import training_page_path
from hotload.clock import monotonic
from hotload.errors import RewardError, StoreError
from hotload.identity import slug
from hotload.quantities import number, plural
from hotload.report.training_page import render_training_page
from hotload.report.training_table import render_training, step_line
from tasks.show import best_effort
from tasks.training.run import TrainingRun

STEPS_SHOWN = 50
SECONDS_BETWEEN_PAGES = 10.0


@task(cache_policy=NO_CACHE, task_run_name="show-training-{run.run_id}")
async def show_training(run: TrainingRun) -> None:
    """Log the last step, also where a cycle's metrics go, and show the run's steps as the next
    version of its artifact; now and then write its page."""
    last = run.records[-1]
    get_run_logger().info("%s", step_line(last))
    if run.wandb is not None and (wrong := await run.wandb.log(last.figures, last.step)):
        get_run_logger().warning(wrong)
    with best_effort():
        await acreate_markdown_artifact(
            render_training(run.records[-STEPS_SHOWN:]),
            key=slug(f"hotload-training-{run.run_id}"),
            description=f"Training run {run.run_id}: its last steps",
        )
    if monotonic() >= run.page_due_at:
        await write_page(run)


async def write_page(run: TrainingRun) -> None:
    """Write the page of the run's steps so far; it only informs, and is made again with the next.

    Does nothing before the first step.
    """
    if not run.records:
        return
    run.page_due_at = monotonic() + SECONDS_BETWEEN_PAGES
    try:
        history = await read_history(run.store, run.run_id)
        page = await asyncio.to_thread(render_training_page, run.records, history.standing)
        await run.store.put_bytes(page.encode(), training_page_path(run.run_id))
    except StoreError as error:
        get_run_logger().warning("the training run's page was not written: %s", error)


def tell_what_taught_nothing(run: TrainingRun) -> None:
    """Log of a run that has ended what was sampled last, and taught nothing.

    Raises:
        RewardError: nothing was ever trained.
    """
    idle, size = run.idle, run.spec.cycle.sampling.completions_per_prompt
    if run.records and not idle.raw_samples:
        return
    found = f"{plural(idle.raw_samples // size, 'group')} of {size} samples taught nothing: "
    if idle.raw_reward_count:
        mean = number(idle.raw_reward_sum / idle.raw_reward_count)
        found += f"none has unequal rewards and a sample to train on; their mean reward is {mean}"
    else:
        found += "no sample has a reward"
    found += ". The cycles' pages have samples with their rewards and failures: look whether the "
    found += "reward tells good from bad, and at sampling.temperature"
    if not run.records:
        raise RewardError(run.spec.cycle.reward.name, f"nothing was trained: {found}")
    get_run_logger().warning("reward %r: the last %s", run.spec.cycle.reward.name, found)
