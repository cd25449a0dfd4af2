"""Retention: what a store keeps, why, and what can be removed without breaking a chain.

A snapshot is kept where a service serves or loads it, where it is pinned, where it belongs to the
newest versions of its run, where its record still guards against a second use of its name, and
where anything that is kept needs it. All else goes. A manifest that cannot be read might need
anything: while there is one, no snapshot goes. This module decides;
`hotload.clients.store.retention` reads and removes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hotload.identity import (
    NamedVersion,
    SnapshotKind,
    line_of,
    read_cycle_name,
    version_of,
)
from hotload.publish.lines import Lines
from hotload.publish.snapshot import SnapshotManifest
from hotload.quantities import BYTES_PER_GB, duration, plural, size

PINS = "_hotload/pins"


class ManifestState(StrEnum):
    """What is known of a snapshot by its manifest."""

    READ = "read"
    NEWER = "newer"
    """Written by a newer version of this program: kept with whatever it names."""
    UNREADABLE = "unreadable"
    MISSING = "missing"
    """Objects without a manifest: an upload under way or broken off, or a removal broken off."""


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """One snapshot as a store holds it.

    `needs` are the identities it cannot be loaded without, the nearest first or in no order;
    `age_seconds`, only without a manifest, is that of its newest object. `was_signalled`: a signal
    mark lies there, which a publisher writes after the manifest.
    """

    identity: str
    state: ManifestState
    size_bytes: int
    run_id: str | None = None
    policy_version: int | None = None
    kind: SnapshotKind | None = None
    chain_length: int = 0
    attempt: int = 0
    needs: tuple[str, ...] = ()
    age_seconds: float = 0.0
    was_signalled: bool = False
    detail: str = ""

    @property
    def version(self) -> NamedVersion | None:
        """Run, line and policy version; None where no manifest says so."""
        if self.run_id is None or self.policy_version is None:
            return None
        return NamedVersion(self.run_id, line_of(self.identity), self.policy_version)

    @classmethod
    def of(cls, manifest: SnapshotManifest) -> StoredSnapshot:
        """Take from a manifest what retention asks; it needs what it follows, and its anchor."""
        needs = dict.fromkeys(
            one for one in (manifest.previous, manifest.anchor) if one != manifest.identity
        )
        return cls(
            identity=manifest.identity,
            state=ManifestState.READ,
            size_bytes=manifest.size_bytes,
            run_id=manifest.run_id,
            policy_version=manifest.policy_version,
            kind=manifest.kind,
            chain_length=manifest.chain_length,
            attempt=manifest.attempt,
            needs=tuple(one for one in needs if one is not None),
        )


@dataclass(frozen=True, slots=True)
class OldCycle:
    """Report, metrics and rollouts of an ended cycle, by path in the order of their removal."""

    name: str
    paths: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RetentionRow:
    """What becomes of one snapshot, and why."""

    snapshot: StoredSnapshot
    is_kept: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Retention:
    """What becomes of everything in a store.

    Args:
        rows: every snapshot; those that go stand in the order of their removal.
        obstacles: why nothing goes that otherwise could; each names an object and the remedy.
        notes: what somebody should know.
        old_cycles: whose reports and rollouts go.
    """

    rows: tuple[RetentionRow, ...]
    obstacles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    old_cycles: tuple[OldCycle, ...] = ()

    @property
    def removed(self) -> tuple[StoredSnapshot, ...]:
        """What goes, in order: a delta before what it follows, so that no chain is ever broken."""
        return tuple(row.snapshot for row in self.rows if not row.is_kept)

    @property
    def removes(self) -> bool:
        """Whether anything goes."""
        return bool(self.removed or self.old_cycles)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the snapshots that stay."""
        return sum(row.snapshot.size_bytes for row in self.rows if row.is_kept)

    @property
    def removed_bytes(self) -> int:
        """Bytes that go: snapshots, reports and rollouts."""
        snapshots = sum(snapshot.size_bytes for snapshot in self.removed)
        return snapshots + sum(cycle.size_bytes for cycle in self.old_cycles)


def sums_of(retention: Retention, *, is_done: bool, price_per_gb_month: float | None) -> str:
    """Word what goes and what is kept, in snapshots, bytes and, with a price, money."""

    def priced(size_bytes: int) -> str:
        if price_per_gb_month is None:
            return size(size_bytes)
        return f"{size(size_bytes)}, {monthly_cost(size_bytes, price_per_gb_month):,.2f} a month"

    going = [plural(len(retention.removed), "snapshot")]
    if retention.old_cycles:
        going.append(f"the files of {plural(len(retention.old_cycles), 'old cycle')}")
    kept = plural(sum(row.is_kept for row in retention.rows), "snapshot")
    return (
        f"{'removed' if is_done else 'to be removed'}: {', '.join(going)}, "
        f"{priced(retention.removed_bytes)}; kept: {kept}, {priced(retention.kept_bytes)}"
    )


def decide_retention(
    stored: Sequence[StoredSnapshot],
    *,
    served: Mapping[str, Sequence[str]],
    pins: Iterable[str],
    keep_versions: int,
    grace_seconds: float,
    old_cycles: Sequence[OldCycle] = (),
) -> Retention:
    """Decide for every snapshot whether it stays, and say why.

    Args:
        stored: every snapshot of the store, each once.
        served: what any service serves or loads, each with the names of those services.
        pins: identities that a person wants kept.
        keep_versions: newest policy versions of each run that stay, at least 1.
        grace_seconds: how old the newest object of an unfinished publication must be.
        old_cycles: as `cycles_beyond` chose them.
    """
    pins = frozenset(pins)
    by_identity = {snapshot.identity: snapshot for snapshot in stored}
    reasons: dict[str, str] = {}
    for snapshot in stored:
        if reason := _own_reason(snapshot, served, pins, grace_seconds):
            reasons[snapshot.identity] = reason
    for identity in _newest(stored, keep_versions):
        reasons.setdefault(identity, f"one of the last {keep_versions} versions of its run")
    count = -1
    while count != len(reasons):
        count = len(reasons)
        _keep_what_is_needed(reasons, by_identity)
        _keep_later_attempts(reasons, stored)
    needing = [by_identity[identity] for identity in reasons]
    obstacles = (
        *_unreadable(stored),
        *_served_in_doubt(by_identity, served),
        *_needed_in_doubt(needing, by_identity),
    )
    if obstacles:
        for identity in by_identity:
            reasons.setdefault(identity, "might be needed by what cannot be read")
    there = {one.identity for one in stored if one.state is not ManifestState.MISSING}
    notes = (
        *(f"pinned, and not in the store: {one}; unpin it" for one in sorted(pins - there)),
        *(
            f"{one.identity} was written by a newer version of this program: kept with all it names"
            for one in stored
            if one.state is ManifestState.NEWER
        ),
        *_broken_chains(reasons, by_identity),
    )
    kept = [
        RetentionRow(one, True, reasons[one.identity]) for one in stored if one.identity in reasons
    ]
    gone = sorted(
        (one for one in stored if one.identity not in reasons),
        key=lambda one: (-one.chain_length, one.identity),
    )
    rows = (*kept, *(RetentionRow(one, False, _why_it_goes(one)) for one in gone))
    return Retention(rows, obstacles, notes, tuple(old_cycles))


def why_kept(
    identity: str,
    stored: Sequence[StoredSnapshot],
    *,
    served: Mapping[str, Sequence[str]],
    pins: Iterable[str],
) -> str | None:
    """Say why one snapshot cannot be removed by hand; None if it can.

    It may be named although it is one of the newest: that alone is no reason here.
    """
    by_identity = {snapshot.identity: snapshot for snapshot in stored}
    target = by_identity[identity]
    if identity in pins:
        return "pinned; unpin it first"
    if reason := _own_reason(target, served, frozenset(), grace_seconds=0):
        return reason
    earlier = [
        one.identity
        for one in stored
        if target.version is not None
        and one.version == target.version
        and one.attempt < target.attempt
    ]
    if earlier:
        return f"a later attempt of the cycle of {earlier[0]}; delete that first"
    followers = [one.identity for one in stored if identity in one.needs]
    if followers:
        return f"needed by {followers[0]}" + (
            f" and {len(followers) - 1} more; delete those first" if followers[1:] else ""
        )
    doubts = (
        *_unreadable(stored),
        *_served_in_doubt(by_identity, served),
        *_needed_in_doubt(stored, by_identity),
    )
    # What cannot be read is the doubt itself: to delete it is the way out.
    return doubts[0] if doubts and target.state is not ManifestState.UNREADABLE else None


def cycles_beyond(names: Iterable[str], keep: int) -> tuple[str, ...]:
    """Choose, by name, the ended cycles that are superseded or older than the last `keep` of each
    run."""
    named = {name: read_cycle_name(name) for name in names}
    kept = _newest_versions(filter(None, named.values()), keep)
    return tuple(sorted(name for name, one in named.items() if one and one not in kept))


def monthly_cost(size_bytes: int, price_per_gb_month: float) -> float:
    """Price what is stored for a month, in the currency of the price; 1 GB is 10^9 bytes."""
    return size_bytes / BYTES_PER_GB * price_per_gb_month


def chain_of(identity: str, stored: Mapping[str, StoredSnapshot]) -> tuple[str, ...]:
    """List what a replica that joins late loads to serve `identity`: its anchor first, it last.

    An identity that is missing in the store stands in the list, and nothing before it.
    """
    chain = [identity]
    while (last := stored.get(chain[-1])) is not None and last.kind is SnapshotKind.DELTA:
        if not last.needs or last.needs[0] in chain:
            break
        chain.append(last.needs[0])
    return tuple(reversed(chain))


def _own_reason(
    snapshot: StoredSnapshot,
    served: Mapping[str, Sequence[str]],
    pins: frozenset[str],
    grace_seconds: float,
) -> str | None:
    """Why a snapshot stays by itself, whatever the others do."""
    identity = snapshot.identity
    if identity in served:
        return f"served by {', '.join(served[identity])}"
    if identity in pins:
        return "pinned"
    if version_of(identity) is None:
        return "adopted: what lies there is somebody else's"
    if snapshot.state is ManifestState.NEWER:
        return "written by a newer version of this program"
    if snapshot.state is ManifestState.MISSING:
        if snapshot.was_signalled or snapshot.age_seconds >= grace_seconds:
            return None
        return f"unfinished, written {duration(snapshot.age_seconds)} ago"
    follows = [one for one in snapshot.needs[:1] if one in served]
    if follows and snapshot.kind is SnapshotKind.DELTA:
        # Without its record the same delta could be signalled once more (design, rule 4).
        return f"follows {follows[0]}, which is served: must not be sent twice"
    return None


def _newest(stored: Sequence[StoredSnapshot], keep_versions: int) -> Iterator[str]:
    newest = _newest_versions((one.version for one in stored if one.version), keep_versions)
    yield from (one.identity for one in stored if one.version in newest)


def _newest_versions(versions: Iterable[NamedVersion], count: int) -> set[NamedVersion]:
    """The last `count` versions of every run, of those that no later line has superseded."""
    runs: defaultdict[str, set[NamedVersion]] = defaultdict(set)
    for one in versions:
        runs[one.run_id].add(one)
    newest: set[NamedVersion] = set()
    for of_run in runs.values():
        lines = Lines.of((one.line, one.policy_version) for one in of_run)
        standing = (one for one in of_run if not lines.is_superseded(one.line, one.policy_version))
        newest.update(sorted(standing)[-count:])
    return newest


def _keep_what_is_needed(
    reasons: dict[str, str], by_identity: Mapping[str, StoredSnapshot]
) -> None:
    """Add all that kept snapshots need, back to their anchors."""
    open_ends = list(reasons)
    while open_ends:
        identity = open_ends.pop()
        for need in by_identity[identity].needs:
            if need in by_identity and need not in reasons:
                reasons[need] = f"needed by {identity}"
                open_ends.append(need)


def _keep_later_attempts(reasons: dict[str, str], stored: Sequence[StoredSnapshot]) -> None:
    """Add the later attempts of a kept one's cycle: the next attempt counts from the last, and no
    identity is used again after a failure (design, rule 3)."""
    first: dict[NamedVersion, StoredSnapshot] = {}
    for one in sorted(stored, key=lambda one: one.attempt):
        if one.identity in reasons and one.version is not None:
            first.setdefault(one.version, one)
    for one in stored:
        kept = first.get(one.version) if one.version else None
        if kept is not None and one.attempt > kept.attempt:
            reasons.setdefault(one.identity, f"a later attempt of the cycle of {kept.identity}")


def _unreadable(stored: Sequence[StoredSnapshot]) -> Iterator[str]:
    for one in stored:
        if one.state is ManifestState.UNREADABLE:
            yield (
                f"the manifest of {one.identity} cannot be read ({one.detail}), so what it needs "
                "is unknown: put it right, or delete that snapshot"
            )


def _served_in_doubt(
    by_identity: Mapping[str, StoredSnapshot], served: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """What is served under a name of ours, and whose chain this store does not show."""
    for identity, services in sorted(served.items()):
        one = by_identity.get(identity)
        if one is None and version_of(identity) is not None:
            yield (
                f"{', '.join(services)} serves or loads {identity}, and this store has nothing "
                "of it: see whether it is that service's store"
            )
        elif one is not None and one.state is ManifestState.MISSING:
            yield (
                f"{', '.join(services)} serves {identity}, whose manifest is gone, so what it "
                "needs is unknown: publish a full snapshot first"
            )


def _needed_in_doubt(
    needing: Iterable[StoredSnapshot], by_identity: Mapping[str, StoredSnapshot]
) -> Iterator[str]:
    """What a chain leads through that has lost its manifest: replicas load it all the same."""
    for one in needing:
        for need in one.needs:
            if need in by_identity and by_identity[need].state is ManifestState.MISSING:
                yield (
                    f"{one.identity} needs {need}, whose manifest is gone, so what that needs is "
                    "unknown: publish a full snapshot first"
                )


def _broken_chains(
    reasons: Mapping[str, str], by_identity: Mapping[str, StoredSnapshot]
) -> Iterator[str]:
    for identity in reasons:
        snapshot = by_identity[identity]
        for need in snapshot.needs:
            if need not in by_identity:
                yield f"{identity} needs {need}, which is not in the store: its chain is broken"


def _why_it_goes(snapshot: StoredSnapshot) -> str:
    if snapshot.state is not ManifestState.MISSING:
        return "nothing needs it"
    if snapshot.was_signalled:
        return "the rest of a removal that was broken off"
    return f"an unfinished publication, last written {duration(snapshot.age_seconds)} ago"
