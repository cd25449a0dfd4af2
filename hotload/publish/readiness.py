"""Readiness: what the replicas say, and whether that means our snapshot is served (protocol §5).

Truth is what the replicas say. Unknown stages are progress, never success; an error counts only if
it names the identity we wait for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil

from hotload.identity import SnapshotKind, cycle_of, line_of, read_identity
from hotload.quantities import plural

BASE_WEIGHTS = "base weights"
# Of what a service says of its replicas, in words: errors and reports stay small.
REPLICA_CHARS, LINES_SHOWN = 800, 16
# Seen while a replica is on its way; any other stage says too little to hold back for it.
LOADING_STAGES = frozenset({"pending", "downloading"})
# Seen while nothing happens; a replica that says no stage may be at anything (protocol §5).
SETTLED_STAGES = frozenset({"idle", "completed", "done", "error"})


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as the service reports it; `raw` is the head of its JSON, for the log.

    A door of agents tells the text of an `error`, and whether it `is_final`: whether every other
    snapshot of the same content meets it, too.
    """

    readiness: bool
    current_identity: str | None
    stage: str | None = None
    target_identity: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    error: str = ""
    is_final: bool = False
    raw: str = field(default="", compare=False)

    def serves(self, identity: str, kind: SnapshotKind) -> bool:
        """Tell whether requests to this replica are answered by exactly `identity`."""
        if kind is SnapshotKind.LORA:
            return self.readiness and (identity, "loaded") in self.adapters
        return self.readiness and self.current_identity == identity

    def failed(self, identity: str) -> bool:
        """Tell whether this replica reports an error about `identity`; errors about others are
        stale.
        """
        return (self.stage == "error" and self.target_identity == identity) or (
            (identity, "failed") in self.adapters
        )

    @property
    def loading_identity(self) -> str | None:
        """What this replica is on its way to, if it says so."""
        is_loading = self.stage in LOADING_STAGES and self.target_identity != self.current_identity
        return self.target_identity if is_loading else None

    @property
    def mentioned(self) -> frozenset[str]:
        """What this replica knows: what it serves, loads, or failed on."""
        names = (self.current_identity, self.target_identity, *(one for one, _ in self.adapters))
        return frozenset(name for name in names if name)

    def mentions(self, identity: str) -> bool:
        """Tell whether this replica knows `identity`: serves it, loads it, or failed on it."""
        return identity in self.mentioned

    def describe(self) -> str:
        """Say in words what this replica is on, and what it is busy with or failed on."""
        words = [f"on {self.current_identity or BASE_WEIGHTS}"]
        words += [f"adapter {identity} {status}" for identity, status in self.adapters]
        words.append("ready" if self.readiness else "not ready")
        if self.stage == "error":
            about = f"error for {self.target_identity or 'a snapshot it does not name'}"
            words.append(f"{about}: {self.error}" if self.error else about)
        elif self.loading_identity:
            words.append(f"{self.stage} {self.loading_identity}")
        elif self.stage is not None and self.stage not in SETTLED_STAGES:
            words.append(f"stage {self.stage}")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """All replicas of a service at one moment; empty while it scales up or restarts.

    Where `is_complete` is false, nothing lists them before the first load, and one stands for all.
    """

    replicas: tuple[ReplicaStatus, ...]
    is_complete: bool = True

    def failed(self, identity: str) -> tuple[ReplicaStatus, ...]:
        """List the replicas that report an error about `identity`."""
        return tuple(replica for replica in self.replicas if replica.failed(identity))

    @property
    def served_everywhere(self) -> frozenset[str]:
        """What every replica has: the one current identity, if it is one, and common adapters."""
        loaded = [
            {replica.current_identity}
            | {adapter for adapter, status in replica.adapters if status == "loaded"}
            for replica in self.replicas
        ]
        common = set.intersection(*loaded) if loaded else set()
        return frozenset(identity for identity in common if identity is not None)

    def is_served_everywhere(self, identity: str) -> bool:
        """Tell whether there are replicas, and each has exactly `identity` loaded."""
        return identity in self.served_everywhere

    @property
    def mentioned(self) -> frozenset[str]:
        """What any replica serves, loads, or failed on."""
        return frozenset().union(*(replica.mentioned for replica in self.replicas))

    def mentions(self, identity: str) -> bool:
        """Tell whether any replica serves, loads, or failed on `identity`."""
        return any(replica.mentions(identity) for replica in self.replicas)

    @property
    def refused(self) -> dict[str, str]:
        """What was refused by its content, whatever its name, each with the reason."""
        return {
            one.target_identity: one.error
            for one in self.replicas
            if one.is_final and one.target_identity and one.failed(one.target_identity)
        }

    @property
    def loading(self) -> tuple[str, ...]:
        """What replicas are on their way to, as far as they say so."""
        targets = {replica.loading_identity for replica in self.replicas}
        return tuple(sorted(target for target in targets if target is not None))

    @property
    def is_idle(self) -> bool:
        """Whether there are replicas, and each says that it serves and loads nothing."""
        return bool(self.replicas) and all(
            replica.readiness and replica.stage in SETTLED_STAGES for replica in self.replicas
        )

    @property
    def by_replica(self) -> tuple[str, ...]:
        """What the replicas are on and busy with, in words; those that say the same together."""
        counts = Counter(replica.describe()[:REPLICA_CHARS] for replica in self.replicas)
        said = [f"{plural(count, 'replica')}: {words}" for words, count in counts.items()]
        more = len(said) - LINES_SHOWN
        return (*said[:LINES_SHOWN], *([f"… and {more} more that differ"] if more > 0 else []))

    def describe(self) -> str:
        """Say in words what is served, and by how many replicas."""
        if not self.is_complete:
            return f"{BASE_WEIGHTS}, before the first load"
        if not self.replicas:
            return "no replicas"
        counts = Counter(replica.current_identity or BASE_WEIGHTS for replica in self.replicas)
        said = ", ".join(f"{identity} on {count}" for identity, count in counts.items())
        waiting = sum(not replica.readiness for replica in self.replicas)
        return f"{said} ({waiting} not ready)" if waiting else said


class Standing(StrEnum):
    """How an earlier publication stands with the replicas now."""

    SERVED = "served"
    SUPERSEDED = "superseded"
    NOT_SERVED = "not served"


def standing_of(
    identity: str, status: ServiceStatus, *, run_id: str, policy_version: int
) -> Standing:
    """Judge whether the replicas serve `identity`, of this run and version, or have gone on to
    later versions of the run, or to any of a later line.

    Anything else, base weights and other runs among them, is not served.
    """
    if status.is_served_everywhere(identity):
        return Standing.SERVED

    own = (line_of(identity), policy_version)

    def is_later(name: str | None) -> bool:
        named = None if name is None else read_identity(name)
        return named is not None and named.run_id == run_id and named[1:] > own

    later = [
        is_later(replica.current_identity) or is_later(replica.loading_identity)
        for replica in status.replicas
    ]
    on_the_way = [replica.current_identity == identity for replica in status.replicas]
    if any(later) and all(map(max, later, on_the_way)):
        return Standing.SUPERSEDED
    return Standing.NOT_SERVED


@dataclass(frozen=True, slots=True)
class ServiceDescription:
    """A service as its control plane describes it (protocol §8); `None` where it says nothing."""

    name: str
    base_model: str | None
    state: str | None
    hot_load_enabled: bool
    bucket_url: str | None
    bucket_type: str | None
    transition_type: str
    desired_replica_count: int | None
    min_replica_count: int | None


@dataclass(frozen=True, slots=True)
class Convergence:
    """How the replicas came to serve a snapshot: how many do, (seconds since the wait began,
    replicas that served it) wherever the number changed, and all of them at the end, in words."""

    ready_count: int
    trace: tuple[tuple[float, int], ...]
    by_replica: tuple[str, ...] = ()


class Verdict(StrEnum):
    """What a status means for the identity we wait for.

    LOST: every replica is idle with something else, and none knows the identity. That may be the
    moment before a load begins; after it was seen once, or for long, the load is lost.
    """

    READY = "ready"
    WAITING = "waiting"
    LOST = "lost"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Assessment:
    """A verdict with the sentence that explains it; counts are replicas."""

    verdict: Verdict
    ready_count: int
    replica_count: int
    detail: str


def what_is_missing(status: ServiceStatus, name: str, expected_count: int) -> str | None:
    """Say what keeps the cycle `name` from planning; None if nothing does.

    That is a replica that is not listed, or one that loads what another cycle signalled. What this
    very cycle signalled before it was killed is for the plan to judge.
    """
    if not status.replicas:
        return "the replica list is empty: scaled to zero or restarting"
    if status.is_complete and len(status.replicas) < expected_count:
        return f"{len(status.replicas)} of {expected_count} replicas are listed"
    foreign = [one for one in status.loading if cycle_of(one) != name]
    return f"a replica is loading {foreign[0]}" if foreign else None


def assess(
    status: ServiceStatus,
    identity: str,
    kind: SnapshotKind,
    *,
    min_ready_fraction: float = 1.0,
    expected_replica_count: int | None = None,
) -> Assessment:
    """Judge whether every expected replica, or the declared fraction, serves `identity` (protocol
    §5).

    Args:
        min_ready_fraction: of the replicas listed or expected, whichever are more; in (0, 1].
        expected_replica_count: no source says that the list is complete; `None` trusts it.
    """
    replicas = status.replicas
    count = max(len(replicas), expected_replica_count or 0)
    ready = sum(replica.serves(identity, kind) for replica in replicas)
    needed = max(1, ceil(min_ready_fraction * count - 1e-9))
    if failures := status.failed(identity):
        detail = f"{len(failures)} of {count} replicas report an error for it"
        return Assessment(Verdict.FAILED, ready, count, detail)
    if status.is_idle and not status.mentions(identity):
        detail = f"no replica knows it, and none is loading; now {status.describe()}"
        return Assessment(Verdict.LOST, ready, count, detail)
    # A declared fraction is about readiness; a list shorter than expected is never complete.
    complete = expected_replica_count is None or len(replicas) >= expected_replica_count
    if replicas and ready >= needed and complete:
        return Assessment(Verdict.READY, ready, count, f"{ready} of {count} replicas serve it")
    return Assessment(Verdict.WAITING, ready, count, _why_waiting(status, identity, count, needed))


def _why_waiting(status: ServiceStatus, identity: str, count: int, needed: int) -> str:
    if not status.replicas:
        return "the replica list is empty"
    if len(status.replicas) < count:
        return f"{len(status.replicas)} replicas are listed, {count} expected"
    others = [replica for replica in status.replicas if replica.current_identity != identity]
    if others:
        return f"needs {needed} of {count} replicas; now {status.describe()}"
    unready = sum(not replica.readiness for replica in status.replicas)
    return f"{unready} of {count} replicas hold it and are not ready"
