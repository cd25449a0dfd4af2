"""Plan: read the truth from the replicas and the store, then let the library decide."""

import asyncio
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.clients.store.records import read_attempts, read_manifest
from hotload.delta.rules import delta_obstacle
from hotload.directory.files import read_checkpoint
from hotload.errors import BaselineLostError
from hotload.identity import SnapshotKind, is_identity
from hotload.publish.chain import ChainState, may_be_delta, plan_full, plan_next, read_chain
from hotload.publish.snapshot import CheckpointContent, SnapshotManifest, SnapshotPlan
from hotload.spec import CycleSpec
from tasks.baseline import hold_baseline
from tasks.retrying import RETRIED

# A service that took a signal just before a crash may need a moment to show it.
UNCLEAR_LOOKS = 3


@task(cache_policy=NO_CACHE, task_run_name="plan-{spec.name}", **RETRIED)
async def plan_snapshot(
    spec: CycleSpec, service: HotLoadClient, store: Store, content: CheckpointContent
) -> SnapshotPlan:
    """What to publish next and why; the same again after a kill, another after a failure.

    Raises:
        IdentityConflictError: this run and version was published with other content.
        InvalidIdentityError: the service already serves a later version of this run.
    """
    attempts = await read_attempts(store, spec.name)
    for look in range(UNCLEAR_LOOKS):
        if look:
            await asyncio.sleep(spec.readiness.poll_interval_seconds)
        status = await service.observe()
        head = await _head(store, status.served_everywhere, content)
        chain = read_chain(status, head, attempts)
        if chain.state is not ChainState.UNCLEAR:
            break
    obstacle = None
    if chain.head and may_be_delta(chain, attempts, spec):
        obstacle = await _obstacle(spec, service, store, chain.head)
    plan = plan_next(chain, attempts, spec, content, obstacle=obstacle)
    get_run_logger().info("%s %s: %s", plan.kind.value, plan.identity, plan.reason)
    return plan


@task(cache_policy=NO_CACHE, task_run_name="plan-fallback-{spec.name}", **RETRIED)
async def plan_fallback(
    spec: CycleSpec, store: Store, content: CheckpointContent, reason: str
) -> SnapshotPlan:
    """A full snapshot under an identity that no earlier attempt of this cycle has had."""
    attempts = await read_attempts(store, spec.name)
    plan = plan_full(attempts, spec, content, reason)
    get_run_logger().warning("%s %s: %s", plan.kind.value, plan.identity, reason)
    return plan


async def _head(
    store: Store, served: frozenset[str], content: CheckpointContent
) -> SnapshotManifest | None:
    """The newest snapshot of ours that every replica serves, an adapter for an adapter."""
    found = [await read_manifest(store, one) for one in sorted(served) if is_identity(one)]
    ours = [
        one
        for one in found
        if one and (one.kind is SnapshotKind.LORA) == (content.kind is SnapshotKind.LORA)
    ]
    return max(ours, key=lambda one: one.policy_version, default=None)


async def _obstacle(
    spec: CycleSpec, service: HotLoadClient, store: Store, head: SnapshotManifest
) -> str | None:
    """Why a delta on `head` cannot be encoded: its bytes are lost, or more than values changed."""
    try:
        baseline = await hold_baseline(spec, service, store, head)
    except BaselineLostError as error:
        return str(error)
    previous = await asyncio.to_thread(read_checkpoint, baseline)
    target = await asyncio.to_thread(read_checkpoint, Path(spec.checkpoint))
    return delta_obstacle(previous, target)
