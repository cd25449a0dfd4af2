"""Roll out: small requests first, then the problems chunk by chunk, and the manifest that hands the
parts back (design, rule 2; protocol §14)."""

from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.inference.sampler import InferenceSource
from hotload.clients.store import Store
from hotload.dataset.rollout_plan import RolloutManifest, RolloutPart, RolloutPlan
from hotload.options import ReadinessPolicy
from hotload.rollout.counts import RolloutSummary, join_counts, unnamed_samples
from hotload.rollout.group_rules import usable_count
from hotload.sampling.earlier_manifest import usable_manifest
from hotload.sampling.nodes.coordinator import RolloutNodes
from hotload.sampling.part_carrier import PartCarrier
from hotload.sampling.problems import plan_rollouts
from hotload.spec import CycleSpec
from tasks import RETRIED


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="plan-{identity}", **RETRIED)
async def read_rollout_plan(spec: CycleSpec, identity: str, store: Store) -> RolloutPlan:
    """Read the problems, and plan which of them this policy version samples under `identity`.

    Raises:
        InvalidProblemsError: they cannot be used, although they could before the cycle published.
    """
    return await plan_rollouts(spec, identity, store)


@task(cache_policy=NO_CACHE, task_run_name="warm-up")
async def warm_up(client: InferenceSource, readiness: ReadinessPolicy) -> bool:
    """Send a small request, and tell whether it was answered in time: the first ones after a swap
    can be slow or fail. Best effort: nothing depends on it.
    """
    if not readiness.warmup_after_hotload:
        return True
    is_warm = await client.warm_up(retries=readiness.warmup_max_retries)
    if not is_warm:
        get_run_logger().warning("no answer to %d warm-up requests", readiness.warmup_max_retries)
    return is_warm


# A retry writes what was sampled; only the sampler's own budget repeats a request.
@task(cache_policy=NO_CACHE, task_run_name="roll-out-{number}", **RETRIED)
async def roll_out_chunk(rollout: PartCarrier, number: int) -> Sequence[RolloutPart]:
    """Put one part of the rollout into the store; return the counts of what is in its files.

    Raises:
        ServiceRefusedError: key, names or billing are wrong: no sample can succeed.
        StoreError: the store refuses.
        RewardError: the reward's service refuses the key; as with the next, what was scored is in
            the store.
        RolloutsFailedError: not one sample of all parts got an answer and a reward, or a service
            failed row after row; what was scored is in the store, the rest is not recorded.
    """
    parts = await rollout.carry(number)
    get_run_logger().info(
        "%d samples, %d failed, %d bytes",
        sum(part.sample_count for part in parts),
        sum(sum(part.failed_samples.values()) for part in parts),
        sum(part.size_bytes for part in parts),
    )
    return parts


@task(cache_policy=NO_CACHE, task_run_name="roll-out-{number}", **RETRIED)
async def roll_out_part(rollout: PartCarrier, number: int) -> None:
    """Put what can be sampled of one part into the store: without groups that got no answer, and
    without a judgement, which is the cycle's.

    Raises:
        ServiceRefusedError, StoreError, RewardError: as `roll_out_chunk`.
    """
    carried = await rollout.carry_part(number)
    await rollout.write_part(number)
    if carried.missing:
        get_run_logger().warning(
            "left to the cycle: %s%s (%s)",
            join_counts(carried.missing),
            ", as the service failed row after row" if carried.is_cut_short else "",
            carried.example or "not asked for",
        )


@task(cache_policy=NO_CACHE, **RETRIED)
async def find_files(nodes: RolloutNodes) -> int:
    """Find what nodes have put into the store; return how many problems are not settled.

    Raises:
        StoreError: the store refuses.
    """
    await nodes.find_files()
    return nodes.missing


# Tasks take no plan: Prefect walks through what a task is given, and a plan holds every problem.
@task(cache_policy=NO_CACHE, **RETRIED)
async def find_rollout(store: Store, directory: str, digest: str) -> RolloutSummary | None:
    """Find the summary of a rollout that was handed back complete, by the plan with this digest.

    Raises:
        StoreError: the store refuses.
    """
    manifest = await usable_manifest(store, directory)
    if manifest is None or not manifest.is_complete or manifest.digest != digest:
        return None
    return manifest.summary


@task(cache_policy=NO_CACHE, task_run_name="hand-back-{manifest.identity}", **RETRIED)
async def hand_back(store: Store, manifest: RolloutManifest, path: str) -> RolloutSummary:
    """Write the manifest that names every part. From now on a reader may rely on it.

    Raises:
        StoreError: the store refuses.
    """
    await store.put_bytes(manifest.render(), path)
    summary = manifest.summary
    if unknown := unnamed_samples(summary):
        get_run_logger().warning(
            "%d samples are of unknown weights, although the service named those of others: a "
            "replica served something else meanwhile, base weights perhaps; look at the replicas",
            unknown,
        )
    if not usable_count(summary):
        did = summary.groups
        get_run_logger().warning(
            "nothing to train on: %d groups, %s; dropped: %s; samples failed by cause: %s",
            summary.group_count,
            join_counts(did.groups_by_mark) or "none marked",
            join_counts(did.dropped_groups) or "none",
            join_counts(summary.failed_samples) or "none",
        )
    return summary
