"""Sampling: every problem of this policy version sampled, scored and handed back."""

from prefect import get_run_logger

from hotload.clients.inference.client import InferenceClient
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.dataset.rollout_plan import MANIFEST_FILE
from hotload.publish.publication import Publication
from hotload.rollout.counts import RolloutSummary
from hotload.sampling.concurrently import both, overlap
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.rollout import Rollout, open_rollout
from hotload.spec import CycleSpec
from tasks.baseline import Baseline, keep_baseline
from tasks.hand_back import find_rollout, hand_back
from tasks.roll_out import roll_out_chunk
from tasks.show import Progress
from tasks.warm_up import warm_up


async def roll_out_and_score(
    spec: CycleSpec,
    publication: Publication,
    client: InferenceClient,
    service: HotLoadClient,
    baseline: Baseline,
) -> RolloutSummary:
    """Sample from the published snapshot; on-policy the baseline moves on beside it.

    Where the next cycle may publish meanwhile, publishing has moved the baseline on, and the
    service is watched for newer versions.

    Raises:
        As `roll_out`; StoreError: the baseline's manifest is gone.
    """
    snapshot = publication.snapshot
    sampled_from = (snapshot.identity, snapshot.replica_count)
    if spec.sampling.may_overlap:
        return await roll_out(spec, client, baseline.store, *sampled_from, service)
    sampling = roll_out(spec, client, baseline.store, *sampled_from)
    rollouts, _ = await both(sampling, keep_baseline(baseline, snapshot.identity))
    return rollouts


async def roll_out(
    spec: CycleSpec,
    client: InferenceClient,
    store: Store,
    identity: str,
    replica_count: int | None = None,
    service: HotLoadClient | None = None,
) -> RolloutSummary:
    """Sample the problems in chunks, score the groups, leave them as Parquet in the store.

    Groups are written as they finish, with a manifest that says so far. Started again, it samples
    only what is not in the store yet.

    Args:
        spec: what to sample, how, and what scores it.
        identity: the snapshot every replica was seen to serve.
        replica_count: replicas there are, for the first size of the window.
        service: watched for newer versions, where somebody may publish while this samples.

    Raises:
        InvalidProblemsError, RewardError, RolloutFunctionError: the caller's input; nothing was
            sampled.
        ServiceRefusedError, RewardError: no sample can succeed, or the reward's service refuses its
            key; started again, it goes on.
        RolloutsFailedError: the service failed row after row; started again, it goes on.
        StoreError: the store refuses.
    """
    plan = await plan_rollouts(spec, identity)
    if done := await find_rollout(store, plan.directory, plan.digest):
        return done
    await warm_up(client, spec.readiness)
    logger = get_run_logger()
    async with open_rollout(spec, plan, client, store, replica_count, service, logger) as rollout:
        progress = Progress(f"rollouts {identity}", plan.problem_count)
        await overlap(_carry(rollout, number, progress) for number in range(len(plan.parts)))
        rollout.log_window()
        manifest = rollout.manifest(is_complete=True)
    return await hand_back(store, manifest, plan.path(MANIFEST_FILE))


async def _carry(rollout: Rollout, number: int, progress: Progress) -> None:
    await roll_out_chunk(rollout, number)
    await progress.advance(len(rollout.plan.parts[number].problems))
