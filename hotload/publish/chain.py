"""The chain: where the publisher stands, and whether the next snapshot is full or a delta.

Theory of operation (protocol §18). A chain is a full snapshot, its anchor, and the deltas after it.
Nothing about it is remembered: `read_chain` makes it anew from what the replicas say and what the
store's manifests record. `plan_next` decides what to publish; `may_signal` lets a signal pass only
where TRANSITIONS has a step for it, so a delta cannot be signalled without a chain.
`docs/chain.md` is drawn from the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hotload.errors import (
    ChainBrokenError,
    IdentityConflictError,
    InvalidIdentityError,
    LoadFailedError,
    ServiceUnavailableError,
)
from hotload.identity import SnapshotKind, cycle_name, snapshot_identity
from hotload.options import Cadence
from hotload.publish.doors.api_dialect import DeltaCodec
from hotload.publish.lines import NO_LINES, Lines, raise_line
from hotload.publish.readiness import ServiceStatus
from hotload.publish.snapshot import (
    CheckpointContent,
    SnapshotManifest,
    SnapshotPlan,
)


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
    """A snapshot this cycle has published before; `signalled` once a POST may have been sent to the
    service that is planned for. What was not lies in the store, for this service or another."""

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
    if signalled := [one for one in attempts if one.signalled]:
        last = signalled[-1].manifest
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
    line: int = 0,
    lines: Lines = NO_LINES,
    served_before: Collection[str] = (),
    lost: Collection[str] = (),
    may_go_back: bool = False,
) -> SnapshotPlan:
    """Decide what this cycle publishes next, full or delta, and why (protocol §18).

    The same facts give the same plan, so a killed cycle resumes by planning again; after a failure
    the attempt number, and with it the identity, is another. A cycle that is not due plans the
    snapshot that is served, which publishing then leaves as it is. A new delta may still meet an
    obstacle, which looking at the files shows: `full_instead` then takes its place.

    Args:
        attempts: what this cycle has published so far, to this service or another, oldest first.
            What was not signalled to this one is taken where it fits: a delta that follows what its
            replicas serve, or a full where it needs one.
        line, lines: this cycle's line, and those that the run is known to have.
        served_before: what every replica was seen to serve. If that is the last attempt and they
            have left it since, nothing of it is on its way: it may be signalled again where it
            follows what they serve, or is full; else a delta leads back to it.
        lost: identities of this cycle whose record cannot be read: none is used again.
        may_go_back: publish, and now, although the service serves a later version of this run; the
            content is what was restored of this one.

    Raises:
        IdentityConflictError: this run and version was published with other content.
        InvalidIdentityError: the service already serves a later version of this line, or the run
            has a later line.
    """
    head = chain.head
    name = cycle_name(run_id, policy_version, line)
    of_run = head if head and head.run_id == run_id else None
    if not may_go_back:
        _refuse_older_line(of_run, name, line, lines)
        _refuse_conflict(attempts, content, name, line)
        _refuse_to_go_back(of_run, name, policy_version, line)

    signalled = [one for one in attempts if one.signalled]
    stored = signalled[-1].manifest if signalled else None
    was_left = (
        stored is not None
        and stored.identity in served_before
        and chain.state is ChainState.UNCLEAR
    )

    def full(reason: str) -> SnapshotPlan:
        if stored and was_left and stored.kind is not SnapshotKind.DELTA:
            return stored.plan.model_copy(update={"reason": f"{reason}; it lies in the store"})
        return plan_full(
            content,
            reason,
            run_id=run_id,
            policy_version=policy_version,
            line=line,
            attempts=attempts,
            lost=lost,
        )

    if stored and was_left and head and stored.previous == head.identity:
        reason = f"every replica serves {head.identity}; it lies in the store"
        return stored.plan.model_copy(update={"reason": reason})
    if stored and not was_left:
        doubt = _doubt_about(chain, stored)
        return full(doubt) if doubt else stored.plan
    if lost and not stored:
        return full(f"the record of {min(lost)} cannot be read")
    # What a line before it has left behind is not sampled: a line begins with its own weights.
    is_behind = of_run is not None and of_run.line < line
    is_due = is_behind or may_go_back or _is_due(policy_version, cadence)
    if head and not stored and not is_due:
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
    return _plan_delta(
        head, content, run_id=run_id, policy_version=policy_version, line=line, attempts=attempts
    )


def next_attempt(attempts: Sequence[PublishAttempt]) -> int:
    """Number the next attempt of a cycle at a service: after the last that was signalled to it,
    since retention may remove earlier ones.

    What other services were sent does not count, so that a cycle that is killed beside them finds
    the same number again; no identity is made twice, since what is stored and fits is taken.
    """
    return max((one.manifest.attempt + 1 for one in attempts if one.signalled), default=0)


def plan_full(
    content: CheckpointContent,
    reason: str,
    *,
    run_id: str,
    policy_version: int,
    line: int = 0,
    attempts: Sequence[PublishAttempt] = (),
    lost: Collection[str] = (),
) -> SnapshotPlan:
    """Plan a full snapshot, or an adapter: one that lies in the store and was not signalled to this
    service, else one under an identity that is not among the `lost`.

    `attempts` are what this cycle published before.
    """
    for unsent in (one.manifest for one in attempts if not one.signalled):
        if unsent.kind is content.kind:
            reused = {"reason": f"{reason}; it lies in the store"}
            return unsent.plan.model_copy(update=reused)
    taken = {*lost, *(one.manifest.identity for one in attempts)}
    attempt = next_attempt(attempts)

    def named(attempt: int) -> str:
        return snapshot_identity(
            run_id,
            policy_version,
            content_sha256=content.sha256,
            kind=content.kind,
            previous=None,
            attempt=attempt,
            line=line,
        )

    while (identity := named(attempt)) in taken:
        attempt += 1
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


def full_instead(
    plan: SnapshotPlan,
    content: CheckpointContent,
    obstacle: str,
    attempts: Sequence[PublishAttempt] = (),
    lost: Collection[str] = (),
) -> SnapshotPlan:
    """Turn a planned delta that cannot be encoded into a full snapshot, the obstacle its reason."""
    return plan_full(
        content,
        obstacle,
        run_id=plan.run_id,
        policy_version=plan.policy_version,
        line=plan.line,
        attempts=attempts,
        lost=lost,
    )


def may_signal(
    status: ServiceStatus, manifest: SnapshotManifest, codec: DeltaCodec = "arc_v2"
) -> bool:
    """Decide whether to send the signal for `manifest` to a service that takes deltas in `codec`;
    False where the service has it already.

    Raises:
        LoadFailedError: a replica reports an error for it, and it is never signalled again; or it
            is a delta in another codec.
        ChainBrokenError: it is a delta, and not every replica serves its previous identity.
        ServiceUnavailableError: there is no replica, and a signal would crash the service.
    """
    if not status.replicas:
        detail = "the replica list is empty: scaled to zero or restarting"
        raise ServiceUnavailableError("signal", None, detail)
    if status.failed(manifest.identity):
        raise LoadFailedError(manifest.identity, "a replica reports an error for it")
    if status.mentions(manifest.identity):
        return False
    if manifest.codec not in (codec, "none"):
        reason = f"it is a delta in {manifest.codec}, the service takes {codec}"
        raise LoadFailedError(manifest.identity, reason)
    on_previous = manifest.previous is not None and status.is_served_everywhere(manifest.previous)
    state = ChainState.CHAINED if on_previous else ChainState.NEED_FULL
    is_delta = manifest.kind is SnapshotKind.DELTA
    event = ChainEvent.SIGNAL_DELTA if is_delta else ChainEvent.SIGNAL_FULL
    if (state, event) not in TRANSITIONS:
        raise ChainBrokenError(str(manifest.previous), status.describe())
    return True


def _plan_delta(
    head: SnapshotManifest,
    content: CheckpointContent,
    *,
    run_id: str,
    policy_version: int,
    line: int,
    attempts: Sequence[PublishAttempt],
) -> SnapshotPlan:
    """Plan a delta on `head`, which every replica serves: one that lies in the store and was not
    signalled to this service, else a new one."""
    for unsent in (one.manifest for one in attempts if not one.signalled):
        if unsent.previous == head.identity:
            return unsent.plan
    attempt = next_attempt(attempts)
    identity = snapshot_identity(
        run_id,
        policy_version,
        content_sha256=content.sha256,
        kind=SnapshotKind.DELTA,
        previous=head.identity,
        attempt=attempt,
        line=line,
    )
    return SnapshotPlan(
        identity=identity,
        run_id=run_id,
        policy_version=policy_version,
        kind=SnapshotKind.DELTA,
        previous=head.identity,
        anchor=head.anchor,
        chain_length=head.chain_length + 1,
        attempt=attempt,
        reason=f"every replica serves {head.identity}",
    )


def _is_due(policy_version: int, cadence: Cadence) -> bool:
    """Decide whether this version is published although another snapshot is served."""
    interval = cadence.weight_sync_interval
    return cadence.force_full or (interval > 0 and policy_version % interval == 0)


def _refuse_conflict(
    attempts: Sequence[PublishAttempt],
    content: CheckpointContent,
    name: str,
    line: int,
) -> None:
    # One is enough: a way back to this version has the content that was restored of another.
    if attempts and not any(one.manifest.is_of(content.sha256) for one in attempts):
        manifest = attempts[0].manifest
        digests = f"{manifest.content_sha256[:12]}…, now {content.sha256[:12]}…"
        reason = f"published as {manifest.identity} with other content (sha256 {digests})"
        raise IdentityConflictError(name, f"{reason}; {raise_line(line)}")


def _refuse_older_line(served: SnapshotManifest | None, name: str, line: int, lines: Lines) -> None:
    known = [*lines.first_versions.items()]
    if served:
        known.append((served.line, served.policy_version))
    Lines.of(known).refuse_older(name, line)


def _refuse_to_go_back(
    served: SnapshotManifest | None, name: str, policy_version: int, line: int
) -> None:
    if served and served.line == line and served.policy_version > policy_version:
        reason = f"the service already serves version {served.policy_version} of this run"
        raise InvalidIdentityError(name, f"{reason}; {raise_line(line)}")


def _doubt_about(chain: Chain, last: SnapshotManifest) -> str | None:
    """Say why this cycle cannot go on with what it signalled last; None if it can."""
    if chain.state is ChainState.NEED_FULL:
        return f"a replica reported an error for {last.identity}"
    if chain.state is ChainState.UNCLEAR and last.kind is SnapshotKind.DELTA:
        # A delta is never sent twice (design, rule 4); a full may be.
        return f"the signal for {last.identity} may have been sent, and no replica knows it"
    return None
