"""Explains a service: who serves what, what is missing, and what is to be done next.

The chain (`hotload.publish.chain`) decides what a cycle publishes; this says the same to a person
who looks from outside, with what lies in the store beside what the replicas say.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hotload.identity import SnapshotKind, cycle_of, is_of_run, read_identity
from hotload.publish.lease import Lease
from hotload.publish.readiness import ServiceStatus
from hotload.publish.retention import ManifestState, StoredSnapshot, chain_of
from hotload.quantities import plural

BY_ITSELF = "the next cycle publishes a full snapshot by itself"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Sentences on what was seen, and what to do next; `needs_person` where no cycle mends it."""

    seen: tuple[str, ...]
    next_step: str
    needs_person: bool = False


def explain_service(
    status: ServiceStatus,
    stored: Sequence[StoredSnapshot],
    *,
    signalled: Collection[str] = (),
    holder: Lease | None = None,
) -> Explanation:
    """Say where a service stands with the snapshots of its store.

    Args:
        stored: every snapshot that the store holds.
        signalled: identities that were announced, or were about to be.
        holder: the publisher's lease, if somebody holds it now.
    """
    by_identity = {one.identity: one for one in stored}
    served = max(status.served_everywhere, key=lambda one: _order(one, by_identity), default=None)
    seen = [_served_words(status, served, by_identity)]
    if doubtful := _unseen_signal(status, signalled, by_identity):
        seen.append(
            f"{doubtful} may have been signalled, and no replica knows it: a delta is not sent"
            " twice, so its cycle, started again, publishes a full snapshot"
        )
    refused = status.refused
    seen += [
        f"a gate refused {one}, and every snapshot of its bytes: {refused[one]}"
        for one in sorted(refused)
    ]
    for failed in sorted(_failed(status) - refused.keys()):
        seen.append(f"a load of {failed} failed; its cycle falls back to a full snapshot by itself")
    if holder is not None:
        until = f"{holder.expires_at:%H:%M:%S} UTC"
        seen.append(f"a lease is held by {holder.holder!r} until {until}, unless it is renewed")
        return Explanation(
            tuple(seen), f"wait for {holder.holder!r}, or start the cycle again after {until}"
        )
    if not status.replicas:
        step = "bring a replica up, minReplicaCount above 0; a cycle waits for it"
        return Explanation(tuple(seen), step, needs_person=True)
    if loading := status.loading:
        step = f"wait until {', '.join(loading)} is loaded; a cycle started now waits for it, too"
        return Explanation(tuple(seen), step)
    if served is not None:
        return _of_one_served(tuple(seen), served, by_identity)
    if any(replica.current_identity for replica in status.replicas):
        return Explanation(tuple(seen), f"nothing to do: {BY_ITSELF}, to every replica")
    return _of_base_weights(tuple(seen), stored)


def _order(identity: str, stored: dict[str, StoredSnapshot]) -> tuple[bool, tuple[int, int]]:
    """Sort what is in the store after what is not, and newer after older."""
    return identity in stored, _version(identity)


def _version(identity: str) -> tuple[int, int]:
    """Line and policy version; before all others for a name that is not ours."""
    named = read_identity(identity)
    return (named.line, named.policy_version) if named else (-1, -1)


def _served_words(
    status: ServiceStatus, served: str | None, stored: dict[str, StoredSnapshot]
) -> str:
    count = len(status.replicas)
    if not count:
        return "no replica is listed: scaled to zero, or restarting"
    if served is None:
        return f"{plural(count, 'replica')}, and not one snapshot on all: {status.describe()}"
    unready = sum(not replica.readiness for replica in status.replicas)
    words = f"{count} of {count} replicas hold {served}"
    words += f", {unready} not ready" if unready else ""
    one = stored.get(served)
    if one is not None and one.kind is SnapshotKind.DELTA and one.needs:
        chain = chain_of(served, stored)
        deltas = plural(len(chain) - 1, "delta")
        return f"{words}, which follows {one.needs[0]}; {deltas} since {chain[0]}"
    return words


def _unseen_signal(
    status: ServiceStatus, signalled: Collection[str], stored: dict[str, StoredSnapshot]
) -> str | None:
    """Find the newest delta that was announced after what the replicas know, and is not known."""
    newest = max(status.mentioned, key=_version, default=None)
    if newest is None or read_identity(newest) is None:
        return None
    doubtful = [
        one
        for one in signalled
        if one in stored
        and stored[one].kind is SnapshotKind.DELTA
        and is_of_run(one, newest)
        and _version(one) > _version(newest)
    ]
    return max(doubtful, key=_version, default=None)


def _failed(status: ServiceStatus) -> set[str]:
    """Find what replicas report an error for and do not serve all the same."""
    return {
        replica.target_identity
        for replica in status.replicas
        if replica.target_identity
        and replica.failed(replica.target_identity)
        and replica.current_identity != replica.target_identity
    }


def _of_one_served(
    seen: tuple[str, ...], served: str, stored: dict[str, StoredSnapshot]
) -> Explanation:
    one = stored.get(served)
    if one is None or one.state is ManifestState.MISSING:
        if cycle_of(served) is None:
            step = (
                f"somebody else named it: `python -m flows cycle.yaml --adopt {served}`, with the"
                " checkpoint it was made from, lets deltas follow it; else the next cycle publishes"
                " a full snapshot, which some doors refuse"
            )
        else:
            step = (
                "see whether this is the store that the service loads from: it has no manifest of"
                f" {served}. If it is, {BY_ITSELF}"
            )
        return Explanation(seen, step, needs_person=True)
    if one.state is ManifestState.NEWER:
        words = f"the manifest of {served} was written by a newer version of this program"
        return Explanation((*seen, words), "run the cycles with that version", needs_person=True)
    if one.state is ManifestState.UNREADABLE:
        words = f"the manifest of {served} cannot be read: {one.detail}"
        step = "nothing to do: the next cycle sets it aside and publishes a full snapshot by itself"
        return Explanation((*seen, words), step)
    lacks = chain_of(served, stored)[0]
    first = stored.get(lacks)
    if first is None or first.kind in (SnapshotKind.DELTA, None):
        words = f"the store lacks {lacks} of its chain, so a replica that joins late cannot load it"
        step = "publish the next version with `cadence: {force_full: true}`"
        return Explanation((*seen, words), step, needs_person=True)
    follows = "is whole again" if one.kind is SnapshotKind.LORA else "can follow it"
    return Explanation(seen, f"nothing to do: the next version {follows}")


def _of_base_weights(seen: tuple[str, ...], stored: Sequence[StoredSnapshot]) -> Explanation:
    known = [one for one in stored if one.state is ManifestState.READ]
    if not known:
        step = f"nothing to do: the store holds no snapshot, and {BY_ITSELF}"
        return Explanation(seen, step)
    newest = max(known, key=lambda one: (_version(one.identity), one.attempt))
    step = (
        "base weights answer until then: start the last cycle again, and it is served again, or"
        f" go on, and {BY_ITSELF}"
    )
    return Explanation((*seen, f"the newest in the store is {newest.identity}"), step, True)
