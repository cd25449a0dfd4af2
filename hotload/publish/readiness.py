"""Readiness: what the replicas say, and whether that means our snapshot is served (protocol §5).

Truth is what the replicas say. Unknown stages are progress, never success; an error counts only if
it names the identity we wait for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil

from hotload.identity import SnapshotKind

BASE_WEIGHTS = "base weights"
# Seen while a replica is on its way; any other stage says too little to hold back for it.
LOADING_STAGES = frozenset({"pending", "downloading"})


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as the service reports it; `raw` is the head of its JSON, for the log."""

    readiness: bool
    current_identity: str | None
    stage: str | None = None
    target_identity: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
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

    def mentions(self, identity: str) -> bool:
        """Tell whether this replica knows `identity`: serves it, loads it, or failed on it."""
        return identity in (self.current_identity, self.target_identity) or any(
            adapter == identity for adapter, _ in self.adapters
        )


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """All replicas of a service at one moment; empty while it scales up or restarts."""

    replicas: tuple[ReplicaStatus, ...]

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

    def mentions(self, identity: str) -> bool:
        """Tell whether any replica serves, loads, or failed on `identity`."""
        return any(replica.mentions(identity) for replica in self.replicas)

    def describe(self) -> str:
        """Say in words what is served, and by how many replicas."""
        if not self.replicas:
            return "no replicas"
        counts = Counter(replica.current_identity or BASE_WEIGHTS for replica in self.replicas)
        return ", ".join(f"{identity} on {count}" for identity, count in counts.items())


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
    """How the replicas came to serve a snapshot: how many do, and (seconds since the wait began,
    replicas that served it) wherever the number changed."""

    ready_count: int
    trace: tuple[tuple[float, int], ...]


class Verdict(StrEnum):
    """What a status means for the identity we wait for."""

    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Assessment:
    """A verdict with the sentence that explains it; counts are replicas."""

    verdict: Verdict
    ready_count: int
    replica_count: int
    detail: str


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
