"""Hand back: the manifest that names the parts of a rollout (design, rule 2)."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.store import Store
from hotload.dataset.rollout_plan import RolloutManifest
from hotload.rollout.counts import RolloutSummary
from hotload.rollout.group_rules import usable_count
from hotload.sampling.part_files import usable_manifest
from tasks import RETRIED


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
    if not usable_count(summary):
        did = summary.groups
        get_run_logger().warning(
            "nothing to train on: %d groups, marked %s, dropped %s; samples failed by cause: %s",
            summary.group_count,
            did.groups_by_mark or "none",
            did.dropped_groups or "none",
            summary.failed_samples or "none",
        )
    return summary
