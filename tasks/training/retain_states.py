"""Retain states: what a run's newest states supersede is removed, as its declaration says."""

from prefect import get_run_logger, task

from hotload.clients.store.kept_states import mark_removed, read_branches, read_removed
from hotload.clients.store.step_records import read_promotions
from hotload.errors import StoreError, TrainerError
from hotload.trainers.trainer import as_remover
from hotload.training.kept_states import decide_states
from tasks.training.run import TrainingRun
from tasks.training.step import ARROW


@task(**ARROW, task_run_name="retain-states-{run.run_id}")
async def retain_states(run: TrainingRun) -> None:
    """Remove the states that are not needed any more, each marked before: a mark without a removal,
    after a kill, has the next state finish it.

    It ends no run: what fails is logged, and done after the next state.
    """
    remover = as_remover(run.trainer)
    assert remover is not None  # open_run refuses
    try:
        kept = decide_states(
            run.records,
            newest=run.spec.keep_states,
            every=run.spec.keep_states_every,
            promoted=[one.step for one in await read_promotions(run.store, run.run_id)],
            branches=await read_branches(run.store, run.run_id),
            lost=run.lost,
        )
        saved = {one.step: one.state for one in run.records if one.state is not None}
        going = saved.keys() - kept.keys()
        marked = await read_removed(run.store, run.run_id)
        await mark_removed(run.store, run.run_id, going - marked)
        run.lost |= going
        begun = await read_branches(run.store, run.run_id)
        for step in sorted(going - run.removed - begun.keys()):
            await run.ask(remover.remove_state, saved[step])
            run.removed.add(step)
    except (StoreError, TrainerError) as error:
        get_run_logger().warning("old states were not removed: %s", error)
