"""The chain: where the publisher stands, and whether the next snapshot is full or a delta.

Theory of operation (protocol §18). A chain is a full snapshot, its anchor, and the deltas after it.
Nothing about it is remembered: `read_chain` makes it anew from what the replicas say and what the
store's manifests record. `plan_next` decides what to publish; `may_signal` lets a signal pass only
where TRANSITIONS has a step for it, so a delta cannot be signalled without a chain.
`docs/chain.md` is drawn from the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hotload.errors import (
    ChainBrokenError,
    IdentityConflictError,
    InvalidIdentityError,
    LoadFailedError,
)
from hotload.identity import SnapshotKind, cycle_name, snapshot_identity
from hotload.options import Cadence
from hotload.publish.readiness import ServiceStatus
from hotload.publish.snapshot import CheckpointContent, SnapshotManifest, SnapshotPlan


class ChainState(StrEnum):
    """Where the publisher stands towards one service."""

    NEED_FULL = "need_full"
    CHAINED = "chained"
    LOADING = "loading"
    UNCLEAR = "unclear"


class ChainEvent(StrEnum):
    """What can happen to a chain."""

    SIGNAL_FULL = "signal_full"
    SIGNAL_DELTA = "signal_delta"
    CONFIRMED = "confirmed"
    FAILED = "failed"
    LOST = "lost"


TRANSITIONS: Mapping[tuple[ChainState, ChainEvent], ChainState] = {
    (ChainState.NEED_FULL, ChainEvent.SIGNAL_FULL): ChainState.LOADING,
    (ChainState.CHAINED, ChainEvent.SIGNAL_FULL): ChainState.LOADING,
    (ChainState.CHAINED, ChainEvent.SIGNAL_DELTA): ChainState.LOADING,
    (ChainState.LOADING, ChainEvent.CONFIRMED): ChainState.CHAINED,
    (ChainState.LOADING, ChainEvent.FAILED): ChainState.NEED_FULL,
    (ChainState.LOADING, ChainEvent.LOST): ChainState.UNCLEAR,
    (ChainState.UNCLEAR, ChainEvent.SIGNAL_FULL): ChainState.LOADING,
}


@dataclass(frozen=True, slots=True)
class Chain:
    """The served chain. `head` is the manifest of what every replica serves, if it is ours."""

    state: ChainState
    head: SnapshotManifest | None = None


@dataclass(frozen=True, slots=True)
class PublishAttempt:
    """A snapshot this cycle has published before; `signalled` once a POST may have been sent."""

    manifest: SnapshotManifest
    signalled: bool


def read_chain(
    status: ServiceStatus, head: SnapshotManifest | None, attempts: Sequence[PublishAttempt]
) -> Chain:
    """Derive the chain from the replicas and the store, nothing remembered.

    Args:
        head: manifest of what every replica serves, if all serve one snapshot of ours.
        attempts: what this cycle has published so far, oldest first.
    """
    if attempts and attempts[-1].signalled:
        last = attempts[-1].manifest
        event = _what_became_of(last.identity, status)
        state = TRANSITIONS[ChainState.LOADING, event] if event else ChainState.LOADING
        return Chain(state, last if event is ChainEvent.CONFIRMED else head)
    return Chain(ChainState.CHAINED if head else ChainState.NEED_FULL, head)


def _what_became_of(identity: str, status: ServiceStatus) -> ChainEvent | None:
    """Tell how a load that was begun has ended; None while it goes on."""
    if status.failed(identity):
        return ChainEvent.FAILED
    if status.is_served_everywhere(identity):
        return ChainEvent.CONFIRMED
    return None if status.mentions(identity) else ChainEvent.LOST


def plan_next(
    chain: Chain,
    attempts: Sequence[PublishAttempt],
    content: CheckpointContent,
    *,
    run_id: str,
    policy_version: int,
    cadence: Cadence,
) -> SnapshotPlan:
    """Decide what this cycle publishes next, full or delta, and why (protocol §18).

    The same facts give the same plan, so a killed cycle resumes by planning again; after a failure
    the attempt number, and with it the identity, is another. A cycle that is not due plans the
    snapshot that is served, which publishing then leaves as it is. A new delta may still meet an
    obstacle, which looking at the files shows: `full_instead` then takes its place.

    Args:
        attempts: what this cycle has published so far, oldest first.

    Raises:
        IdentityConflictError: this run and version was published with other content.
        InvalidIdentityError: the service already serves a later version of this run.
    """
    head = chain.head
    _refuse_conflict(head, attempts, content, run_id, policy_version)

    def full(reason: str) -> SnapshotPlan:
        return plan_full(
            content, reason, run_id=run_id, policy_version=policy_version, attempt=len(attempts)
        )

    if attempts:
        doubt = _doubt_about(chain, attempts[-1])
        return full(doubt) if doubt else attempts[-1].manifest.plan
    if head and not _is_due(policy_version, cadence):
        reason = f"weight_sync_interval {cadence.weight_sync_interval}: not due"
        return head.plan.model_copy(update={"reason": reason})
    if content.kind is SnapshotKind.LORA:
        return full("an adapter is always published whole")
    if cadence.force_full:
        return full("force_full is set")
    if head is None:
        return full("not every replica serves one snapshot of ours")
    if head.chain_length + 1 >= cadence.full_every:
        return full(
            f"full_every {cadence.full_every}: {head.chain_length} deltas since {head.anchor}"
        )
    identity = snapshot_identity(
        run_id,
        policy_version,
        content_sha256=content.sha256,
        kind=SnapshotKind.DELTA,
        previous=head.identity,
        attempt=0,
    )
    return SnapshotPlan(
        identity=identity,
        run_id=run_id,
        policy_version=policy_version,
        kind=SnapshotKind.DELTA,
        previous=head.identity,
        anchor=head.anchor,
        chain_length=head.chain_length + 1,
        attempt=0,
        reason=f"every replica serves {head.identity}",
    )


def plan_full(
    content: CheckpointContent, reason: str, *, run_id: str, policy_version: int, attempt: int
) -> SnapshotPlan:
    """Plan a full snapshot, or an adapter; `attempt` counts what this cycle published before."""
    identity = snapshot_identity(
        run_id,
        policy_version,
        content_sha256=content.sha256,
        kind=content.kind,
        previous=None,
        attempt=attempt,
    )
    return SnapshotPlan(
        identity=identity,
        run_id=run_id,
        policy_version=policy_version,
        kind=content.kind,
        previous=None,
        anchor=identity,
        chain_length=0,
        attempt=attempt,
        reason=reason,
    )


def full_instead(plan: SnapshotPlan, content: CheckpointContent, obstacle: str) -> SnapshotPlan:
    """Turn a planned delta that cannot be encoded into a full snapshot, the obstacle its reason."""
    return plan_full(
        content,
        obstacle,
        run_id=plan.run_id,
        policy_version=plan.policy_version,
        attempt=plan.attempt,
    )


def may_signal(status: ServiceStatus, manifest: SnapshotManifest) -> bool:
    """Decide whether to send the signal for `manifest`; False where the service has it already.

    Raises:
        LoadFailedError: a replica reports an error for it; it is never signalled again.
        ChainBrokenError: it is a delta, and not every replica serves its previous identity.
    """
    if status.failed(manifest.identity):
        raise LoadFailedError(manifest.identity, "a replica reports an error for it")
    if status.mentions(manifest.identity):
        return False
    on_previous = manifest.previous is not None and status.is_served_everywhere(manifest.previous)
    state = ChainState.CHAINED if on_previous else ChainState.NEED_FULL
    is_delta = manifest.kind is SnapshotKind.DELTA
    event = ChainEvent.SIGNAL_DELTA if is_delta else ChainEvent.SIGNAL_FULL
    if (state, event) not in TRANSITIONS:
        raise ChainBrokenError(str(manifest.previous), status.describe())
    return True


def _is_due(policy_version: int, cadence: Cadence) -> bool:
    """Decide whether this version is published although another snapshot is served."""
    interval = cadence.weight_sync_interval
    return cadence.force_full or (interval > 0 and policy_version % interval == 0)


def _refuse_conflict(
    head: SnapshotManifest | None,
    attempts: Sequence[PublishAttempt],
    content: CheckpointContent,
    run_id: str,
    policy_version: int,
) -> None:
    name = cycle_name(run_id, policy_version)
    for manifest in (attempt.manifest for attempt in attempts):
        if manifest.content_sha256 != content.sha256:
            digests = f"{manifest.content_sha256[:12]}…, now {content.sha256[:12]}…"
            reason = f"published as {manifest.identity} with other content (sha256 {digests})"
            raise IdentityConflictError(name, reason)
    if head and head.run_id == run_id and head.policy_version > policy_version:
        reason = f"the service already serves version {head.policy_version} of this run"
        raise InvalidIdentityError(name, reason)


def _doubt_about(chain: Chain, last: PublishAttempt) -> str | None:
    """Say why this cycle cannot go on with its last attempt; None if it can."""
    identity = last.manifest.identity
    if chain.state is ChainState.NEED_FULL and last.signalled:
        return f"a replica reported an error for {identity}"
    if last.manifest.kind is not SnapshotKind.DELTA:
        return None
    if chain.state is ChainState.UNCLEAR:
        # A delta is never sent twice (design, rule 4); a full may be.
        return f"the signal for {identity} may have been sent, and no replica knows it"
    if not last.signalled and (chain.head is None or chain.head.identity != last.manifest.previous):
        return f"the replicas left {last.manifest.previous} before {identity} was signalled"
    return None
