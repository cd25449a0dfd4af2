"""Rollouts: every problem of this policy version sampled, scored and handed back."""

from prefect import flow, get_run_logger

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from hotload.dataset.rollout_plan import MANIFEST_FILE
from hotload.rollout.counts import RolloutSummary
from hotload.sampling.concurrently import overlap
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.rollout import Rollout, open_rollout
from hotload.spec import CycleSpec
from tasks.hand_back import find_rollout, hand_back
from tasks.progress import Progress
from tasks.roll_out import roll_out_chunk
from tasks.warm_up import warm_up


@flow(name="roll-out-and-score", flow_run_name="roll-out-{identity}")
async def roll_out_and_score(
    spec: CycleSpec, identity: str, replica_count: int | None = None
) -> RolloutSummary:
    """Sample the problems in chunks, score the groups, leave them as Parquet in the store.

    Groups are written as they finish, with a manifest that says so far. Started again, it samples
    only what is not in the store yet.

    Args:
        spec: what to sample, how, and what scores it.
        identity: the snapshot every replica was seen to serve.
        replica_count: replicas there are, for the first size of the window.

    Raises:
        InvalidProblemsError, RewardError, RolloutFunctionError: the caller's input; nothing was
            sampled.
        ServiceRefusedError, RewardError: no sample can succeed, or the reward's service refuses its
            key; started again, it goes on.
        RolloutsFailedError: the service failed row after row; started again, it goes on.
        StoreError: the store refuses.
    """
    client = (await RolloutClient.load(spec.rollouts)).open()
    store = (await CheckpointStore.load(spec.store)).open()
    # Only then may somebody publish while this samples.
    may_move = spec.sampling.max_head_offpolicy_versions > 0
    service = (await HotLoadService.load(spec.service)).open() if may_move else None
    plan = await plan_rollouts(spec, identity)
    if done := await find_rollout(store, plan.directory, plan.digest):
        return done
    await warm_up(client, spec.readiness)
    logger = get_run_logger()
    async with open_rollout(spec, plan, client, store, replica_count, service, logger) as rollout:
        progress = await Progress.start(f"rollouts {identity}", plan.problem_count)
        await overlap(_carry(rollout, number, progress) for number in range(len(plan.parts)))
        rollout.log_window()
        manifest = rollout.manifest(is_complete=True)
    return await hand_back(store, manifest, plan.path(MANIFEST_FILE))


async def _carry(rollout: Rollout, number: int, progress: Progress) -> None:
    await roll_out_chunk(rollout, number)
    await progress.advance(len(rollout.plan.parts[number].problems))
