"""Plan: read the truth from the replicas and the store, then let the library decide."""

import asyncio

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.clients.store.records import read_attempts, read_snapshot_manifest
from hotload.delta.rules import delta_obstacle
from hotload.directory.shards import read_checkpoint
from hotload.errors import BaselineLostError
from hotload.identity import SnapshotKind, cycle_name, is_identity
from hotload.publish.chain import ChainState, full_instead, plan_full, plan_next, read_chain
from hotload.publish.snapshot import CheckpointContent, SnapshotManifest, SnapshotPlan
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.baseline import Baseline

# A service that took a signal just before a crash may need a moment to show it.
UNCLEAR_LOOKS = 3


@task(cache_policy=NO_CACHE, task_run_name="plan-{spec.name}", **RETRIED)
async def plan_snapshot(
    spec: CycleSpec, service: HotLoadClient, baseline: Baseline, content: CheckpointContent
) -> SnapshotPlan:
    """Plan what to publish next and say why; the same again after a kill, another after a failure.

    Raises:
        IdentityConflictError: this run and version was published with other content.
        InvalidIdentityError: the service already serves a later version of this run.
    """
    store = baseline.store
    attempts = await read_attempts(store, spec.name)
    for look in range(UNCLEAR_LOOKS):
        if look:
            await asyncio.sleep(spec.readiness.poll_interval_seconds)
        status = await service.observe()
        head = await _head(store, status.served_everywhere, content.kind)
        chain = read_chain(status, head, attempts)
        if chain.state is not ChainState.UNCLEAR:
            break
    plan = plan_next(
        chain,
        attempts,
        content,
        run_id=spec.run_id,
        policy_version=spec.policy_version,
        cadence=spec.cadence,
    )
    # Only a new delta has yet to be encoded; what was published before lies in the store.
    if not attempts and chain.head and plan.previous == chain.head.identity:
        obstacle = await _obstacle(baseline, chain.head)
        plan = full_instead(plan, content, obstacle) if obstacle else plan
    get_run_logger().info("%s %s: %s", plan.kind.value, plan.identity, plan.reason)
    return plan


@task(
    cache_policy=NO_CACHE,
    task_run_name="plan-fallback-{run_id}-{policy_version:06d}",
    **RETRIED,
)
async def plan_fallback(
    store: Store,
    content: CheckpointContent,
    reason: str,
    run_id: str,
    policy_version: int,
) -> SnapshotPlan:
    """Plan a full snapshot under an identity that no earlier attempt of this cycle has had."""
    attempts = await read_attempts(store, cycle_name(run_id, policy_version))
    plan = plan_full(
        content, reason, run_id=run_id, policy_version=policy_version, attempt=len(attempts)
    )
    get_run_logger().warning("%s %s: %s", plan.kind.value, plan.identity, reason)
    return plan


async def _head(
    store: Store, served: frozenset[str], kind: SnapshotKind
) -> SnapshotManifest | None:
    """Read the newest snapshot of ours that every replica serves, an adapter for an adapter."""
    found = [await read_snapshot_manifest(store, one) for one in sorted(served) if is_identity(one)]
    is_lora = kind is SnapshotKind.LORA
    ours = [one for one in found if one and (one.kind is SnapshotKind.LORA) == is_lora]
    return max(ours, key=lambda one: one.policy_version, default=None)


async def _obstacle(baseline: Baseline, head: SnapshotManifest) -> str | None:
    """Say why a delta on `head` cannot be encoded: its bytes are lost, or more than values
    changed.
    """
    try:
        directory = await baseline.hold(head)
    except BaselineLostError as error:
        return str(error)
    previous = await asyncio.to_thread(read_checkpoint, directory)
    target = await asyncio.to_thread(read_checkpoint, baseline.checkpoint)
    return delta_obstacle(previous, target)
