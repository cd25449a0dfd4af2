"""Plan: read the truth from the replicas and the store, then let the library decide."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store, check_lease
from hotload.clients.store.records import (
    SET_ASIDE,
    ManifestReader,
    read_attempts,
    read_lines,
    read_lost_attempts,
    read_manifest_bytes,
    record_line,
    set_aside_manifest,
)
from hotload.clients.store.run_records import read_history
from hotload.delta.rules import delta_obstacle
from hotload.directory.prediction import predict_delta_bytes
from hotload.directory.relayout import CheckpointView
from hotload.directory.shards import read_checkpoint
from hotload.errors import BaselineLostError, SnapshotRejectedError, StoreError
from hotload.identity import SnapshotKind, cycle_name, cycle_of, is_identity
from hotload.publish.chain import (
    ChainState,
    PublishAttempt,
    full_instead,
    plan_full,
    plan_next,
    read_chain,
)
from hotload.publish.cost import CostBasis, PublicationPreview, SnapshotCost
from hotload.publish.lease import Lease
from hotload.publish.lines import Lines
from hotload.publish.readiness import ServiceStatus, what_is_missing
from hotload.publish.snapshot import (
    CheckpointContent,
    Foreseen,
    SnapshotManifest,
    SnapshotPlan,
    is_of_newer_version,
)
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.baseline import Baseline

Hold = Callable[[SnapshotManifest], Awaitable[Path | None]]
"""Gives the directory of a snapshot's full bytes; None where they are not here."""
# A service that took a signal just before a crash may need a moment to show it.
UNCLEAR_LOOKS = 3


@task(cache_policy=NO_CACHE, task_run_name="plan-{spec.name}{service.label}", **RETRIED)
async def plan_snapshot(
    spec: CycleSpec,
    service: HotLoadClient,
    baseline: Baseline,
    content: CheckpointContent,
    lease: Lease,
    *,
    served_before: Collection[str] = (),
    may_go_back: bool = False,
) -> SnapshotPlan:
    """Plan what to publish next and say why; the same again after a kill, another after a failure.

    A manifest that cannot be read is a doubt: it is set aside, and a full snapshot is planned. The
    first plan of a line records that it has begun: from then on the lines before may not publish.

    Args:
        lease: of this service; without it a line does not begin, since a cycle of the line before
            may have planned meanwhile.
        served_before, may_go_back: as `plan_next`.

    Raises:
        IdentityConflictError: this run and version was published with other content.
        InvalidIdentityError: as `plan_next`.
        LeaseLostError: another publisher has taken over, and a line would begin.
        SnapshotRejectedError: the service shows that it refuses this content.
    """
    planned = await _plan(
        spec,
        service,
        baseline,
        content,
        read=_read_manifest,
        hold=baseline.hold,
        served_before=served_before,
        may_go_back=may_go_back,
    )
    if planned.lines.line_at(spec.policy_version) < spec.line:
        await check_lease(baseline.store, lease)
        await record_line(baseline.store, spec.name)
    plan = planned.plan
    get_run_logger().info("%s %s: %s", plan.kind.value, plan.identity, plan.reason)
    return plan


@task(cache_policy=NO_CACHE, task_run_name="preview-{spec.name}", **RETRIED)
async def preview_plan(
    spec: CycleSpec,
    service: HotLoadClient,
    baseline: Baseline,
    content: CheckpointContent,
    expected_replica_count: int | None,
    *,
    served_before: Collection[str],
) -> PublicationPreview:
    """Tell what `plan_snapshot` would plan, and what each way would cost; nothing is changed.

    Raises:
        IdentityConflictError, InvalidIdentityError, SnapshotRejectedError: as `plan_snapshot`.
    """
    unreadable: dict[str, str] = {}

    async def note(store: Store, identity: str, error: StoreError) -> None:
        unreadable[identity] = f"{error}: a cycle moves it to {SET_ASIDE}"

    planned = await _plan(
        spec,
        service,
        baseline,
        content,
        read=partial(_read_manifest, on_unreadable=note),
        hold=baseline.find,
        served_before=served_before,
        unreadable=unreadable,
    )
    notes = [*unreadable.values()]
    if planned.plan.kind is SnapshotKind.DELTA and len(planned.options) == 1:
        notes.append("the base is not in work_dir: a cycle builds it first, then weighs the delta")
    missing = what_is_missing(planned.status, spec.name, expected_replica_count or 1)
    if missing is not None:
        notes.append(f"a cycle waits first: {missing}")
    return PublicationPreview(
        planned.plan, planned.options, planned.status.describe(), tuple(notes)
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan, the ways to publish that were costed, and what was read for it: the replicas' status
    and the run's lines. A plan that uploads nothing has no ways."""

    plan: SnapshotPlan
    options: tuple[SnapshotCost, ...]
    status: ServiceStatus
    lines: Lines


async def _plan(
    spec: CycleSpec,
    service: HotLoadClient,
    baseline: Baseline,
    content: CheckpointContent,
    *,
    read: ManifestReader,
    hold: Hold,
    served_before: Collection[str],
    may_go_back: bool = False,
    unreadable: Collection[str] = (),
) -> _Planned:
    """Plan as `plan_snapshot` says.

    `read` reads a manifest, or adds to `unreadable`; `hold` gives the base of a delta.
    """
    store = baseline.store
    stored = await read_attempts(store, spec.name, service.access.service, read)
    lost = await read_lost_attempts(store, spec.name)
    lost |= {one for one in unreadable if cycle_of(one) == spec.name}
    lines = await read_lines(store, spec.run_id)
    for look in range(UNCLEAR_LOOKS):
        if look:
            await asyncio.sleep(spec.readiness.poll_interval_seconds)
        status = await service.observe()
        await _refuse_judged(store, status, content, read)
        head = await _head(store, status.served_everywhere, content.kind, read)
        attempts = _signalled(stored, status)
        chain = read_chain(status, head, attempts)
        last = [one.manifest.identity for one in attempts if one.signalled][-1:]
        if chain.state is not ChainState.UNCLEAR or last[0] in served_before:
            break
    plan = plan_next(
        chain,
        attempts,
        content,
        run_id=spec.run_id,
        policy_version=spec.policy_version,
        cadence=spec.cadence,
        line=spec.line,
        lines=lines,
        served_before=served_before,
        lost=lost,
        may_go_back=may_go_back,
    )
    # Only a new delta has yet to be encoded; what was published before lies in the store.
    published = {attempt.manifest.identity for attempt in attempts}
    if plan.identity in published or (chain.head and plan.identity == chain.head.identity):
        return _Planned(plan, (), status, lines)
    instead = partial(full_instead, plan, content, attempts=attempts, lost=lost)
    replica_count = len(status.replicas)
    plan, options = await _weigh(
        spec, baseline, content, plan, instead, chain.head, replica_count, hold
    )
    return _Planned(plan, options, status, lines)


async def _weigh(
    spec: CycleSpec,
    baseline: Baseline,
    content: CheckpointContent,
    plan: SnapshotPlan,
    instead: Callable[[str], SnapshotPlan],
    head: SnapshotManifest | None,
    replica_count: int,
    hold: Hold,
) -> tuple[SnapshotPlan, tuple[SnapshotCost, ...]]:
    """Cost the ways to publish, and keep to the plan, or take a full `instead` of its delta for a
    reason: an obstacle, or what it would cost."""
    side_bytes = sum(one.size_bytes for one in content.side_files)
    history = await read_history(baseline.store, spec.run_id)
    basis = CostBasis(replica_count, spec.cadence.full_every, spec.prices, history.time_taken())
    full = basis.of_full(content.size_bytes + side_bytes)
    if head is None or plan.previous != head.identity:
        return plan, (full,)
    try:
        foreseen = await _foresee(baseline, head, hold)
    except BaselineLostError as error:
        return instead(str(error)), (full,)
    if foreseen is None:
        return plan, (full,)
    if foreseen.obstacle is not None:
        get_run_logger().warning("a full snapshot instead of a delta: %s", foreseen.obstacle)
        return instead(foreseen.obstacle), (full,)
    delta = basis.of_delta(
        foreseen.delta_bytes + side_bytes,
        full_bytes=full.size_bytes,
        chain_bytes=history.chain_bytes(head),
    )
    choice = basis.choose(full, delta)
    # A door that keeps to a base of somebody else's name takes no other full (decision 0018).
    if choice.kind is SnapshotKind.FULL and cycle_of(plan.anchor) is not None:
        return instead(choice.reason), choice.options
    reason = f"{plan.reason}; {choice.reason}"
    return plan.model_copy(update={"reason": reason}), choice.options


@task(
    cache_policy=NO_CACHE,
    task_run_name="plan-fallback-{run_id}-{policy_version:06d}{service.label}",
    **RETRIED,
)
async def plan_fallback(
    service: HotLoadClient,
    store: Store,
    content: CheckpointContent,
    reason: str,
    run_id: str,
    policy_version: int,
    line: int = 0,
) -> SnapshotPlan:
    """Plan a full snapshot under an identity that this service was not signalled in this cycle: one
    that lies in the store for another service, or a new one."""
    name = cycle_name(run_id, policy_version, line)
    stored = await read_attempts(store, name, service.access.service, _read_manifest)
    plan = plan_full(
        content,
        reason,
        run_id=run_id,
        policy_version=policy_version,
        line=line,
        attempts=_signalled(stored, await service.observe()),
        lost=await read_lost_attempts(store, name),
    )
    get_run_logger().warning("%s %s: %s", plan.kind.value, plan.identity, reason)
    return plan


async def _refuse_judged(
    store: Store, status: ServiceStatus, content: CheckpointContent, read: ManifestReader
) -> None:
    """Return unless the service shows that it refuses this content: nothing is uploaded for it."""
    for identity, reason in status.refused.items():
        judged = await read(store, identity) if is_identity(identity) else None
        if judged is not None and judged.is_of(content.sha256):
            raise SnapshotRejectedError("plan", None, f"the same bytes were refused: {reason}")


def _signalled(stored: list[PublishAttempt], status: ServiceStatus) -> list[PublishAttempt]:
    """Take for signalled also what a replica knows, marked or not."""
    return [
        replace(one, signalled=one.signalled or status.mentions(one.manifest.identity))
        for one in stored
    ]


async def _head(
    store: Store, served: frozenset[str], kind: SnapshotKind, read: ManifestReader
) -> SnapshotManifest | None:
    """Read the newest snapshot of ours that every replica serves, an adapter for an adapter."""
    found = [await read(store, one) for one in sorted(served) if is_identity(one)]
    is_lora = kind is SnapshotKind.LORA
    ours = [one for one in found if one and (one.kind is SnapshotKind.LORA) == is_lora]
    return max(ours, key=lambda one: (one.line, one.policy_version), default=None)


async def _set_aside(store: Store, identity: str, error: StoreError) -> None:
    aside = await set_aside_manifest(store, identity)
    get_run_logger().warning("%s; moved to %s, and taken for unknown", error, aside)


async def _read_manifest(
    store: Store,
    identity: str,
    on_unreadable: Callable[[Store, str, StoreError], Awaitable[None]] = _set_aside,
) -> SnapshotManifest | None:
    # Outside of the `try`: a store that refuses says nothing of the manifest.
    data = await read_manifest_bytes(store, identity)
    if data is None:
        return None
    try:
        return SnapshotManifest.parse(data, identity=identity)
    except StoreError as error:
        if is_of_newer_version(data):
            reason = "was written by a newer version of this program: run the cycle with that"
            raise StoreError(error.path, reason) from None
        await on_unreadable(store, identity, error)
        return None


async def _foresee(
    baseline: Baseline,
    head: SnapshotManifest,
    hold: Hold,
) -> Foreseen | None:
    """Foresee a delta on `head`; None where nothing can be said before its base is built."""
    if baseline.foreseen is not None:
        return baseline.foreseen.get(head.identity)
    base = await hold(head)
    target = await hold(baseline.committed) if baseline.committed else baseline.checkpoint
    if base is None or target is None:
        return None
    return await asyncio.to_thread(foresee_delta, base, baseline.view)


def foresee_delta(
    base: Path, look: Callable[[], CheckpointView], files: Collection[str] = ()
) -> Foreseen:
    """Look for an obstacle to a delta on `base`, and predict its bytes where there is none.

    Args:
        look: views the checkpoint as it is now.
        files: the shards to look at. Empty takes all.
    """
    before, view = read_checkpoint(base), look()
    target = view.checkpoint
    if files:
        target = replace(target, shards=tuple(one for one in target.shards if one.file in files))
    obstacle = delta_obstacle(before, target)
    if obstacle is not None:
        return Foreseen(obstacle=obstacle)
    return Foreseen(delta_bytes=predict_delta_bytes(base, view.file, before.shards))
