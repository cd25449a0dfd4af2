"""Publication: what one cycle published, in bytes, seconds and replicas."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from pydantic import AwareDatetime, Field

from hotload.identity import SnapshotKind
from hotload.publish.readiness import Convergence
from hotload.publish.snapshot import CheckpointContent, ShardBatch, SnapshotManifest
from hotload.quantities import duration, plural, size
from hotload.records import Record
from hotload.spec import RequiredServices


class ServedSnapshot(Record):
    """One snapshot that every replica was seen to serve."""

    identity: str
    policy_version: int
    kind: SnapshotKind
    previous: str | None
    reason: str
    size_bytes: int = Field(ge=0)
    content_size_bytes: int = Field(ge=0)
    replica_count: int = Field(ge=0)
    seconds_by_stage: dict[str, float] = Field({})
    """Seconds of encode and upload, summed over overlapping shards, where they were done;
    wall seconds of publish (all of those), signal and converge."""
    began_at: AwareDatetime | None = None
    """When the publication began; publish, signal and converge follow each other from there."""
    convergence: tuple[tuple[float, int], ...] = ()
    """(Seconds since the signal, replicas that served it), wherever the number changed."""
    by_replica: tuple[str, ...] = ()
    """What the replicas were on and busy with when they had converged, in words."""
    hint_count: int = Field(0, ge=0)
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: SnapshotManifest,
        reason: str,
        carried: Sequence[ShardBatch],
        convergence: Convergence,
        warnings: tuple[str, ...],
        wall_seconds: dict[str, float],
        *,
        began_at: datetime,
    ) -> ServedSnapshot:
        """Record a snapshot that the replicas serve."""
        worked = {
            "encode": sum(batch.encode_seconds for batch in carried),
            "upload": sum(batch.upload_seconds for batch in carried),
        }
        return cls(
            identity=manifest.identity,
            policy_version=manifest.policy_version,
            kind=manifest.kind,
            previous=manifest.previous,
            reason=reason,
            size_bytes=manifest.size_bytes,
            content_size_bytes=manifest.content_size_bytes,
            replica_count=convergence.ready_count,
            seconds_by_stage={
                # A full snapshot is not encoded; what an earlier run carried is found.
                **{stage: spent for stage, spent in worked.items() if spent},
                **wall_seconds,
            },
            began_at=began_at,
            convergence=convergence.trace,
            by_replica=convergence.by_replica,
            hint_count=sum(batch.hint_count for batch in carried),
            warnings=warnings,
        )

    @property
    def egress_bytes(self) -> int:
        """Bytes that left the store for the replicas that serve it."""
        return self.size_bytes * self.replica_count

    @property
    def ratio(self) -> float:
        """Bytes of the checkpoint over bytes that travelled."""
        return self.content_size_bytes / self.size_bytes if self.size_bytes else 0.0

    def without_baseline(self, trouble: str) -> str:
        """Say in words what it costs that `trouble` left no baseline of it."""
        whole, sent = self.content_size_bytes, self.size_bytes
        instead = f", not a delta of about {size(sent)}" if sent < whole else ""
        cost = f"the next snapshot is full, {size(whole)}{instead}"
        return f"no baseline in work_dir: {trouble}; {cost}"


class ServicePublication(Record):
    """What became of one service of a cycle: the snapshot that its replicas serve, why by a
    fallback, or why none."""

    service: str
    """`<account>/<service>`."""
    snapshot: ServedSnapshot | None = None
    fallback: str | None = None
    failure: str | None = None

    def describe(self) -> str:
        """Say in words what it serves, in which bytes and seconds, or why it does not."""
        if self.snapshot is None:
            return f"failed: {self.failure}"
        served = self.snapshot
        converged = duration(served.seconds_by_stage.get("converge", 0.0))
        why = f"; by a fallback: {self.fallback}" if self.fallback else ""
        return (
            f"{served.kind.value} {served.identity}, {size(served.size_bytes)}, "
            f"{plural(served.replica_count, 'replica')} after {converged}{why}"
        )


def may_sample(
    ended: Mapping[str, ServicePublication], *, needed: int, sampled: Collection[str]
) -> bool:
    """Tell whether enough services serve, and of those that are sampled all have ended and one
    serves: one that failed is not waited for.

    Args:
        ended: the services that are no longer under way, by name.
    """
    serving = {name for name, one in ended.items() if one.snapshot is not None}
    return len(serving) >= needed and ended.keys() >= {*sampled} and not serving.isdisjoint(sampled)


def services_needed(required: RequiredServices, count: int) -> int:
    """Count how many of `count` services have to serve; a quorum is more than half."""
    return {"all": count, "any": 1, "quorum": count // 2 + 1}[required]


class Publication(Record):
    """How one cycle's publication ended: what it published, from what, and why by a fallback.

    `snapshot` is what is sampled from: of several services, what the first that is sampled serves.
    """

    content: CheckpointContent
    snapshot: ServedSnapshot
    fallback: str | None = None
    services: tuple[ServicePublication, ...] = ()
    """All services of the cycle; none in a record of an earlier version of hotload."""

    @property
    def identities(self) -> tuple[str, ...]:
        """What the services serve, each identity once."""
        served = [one.snapshot for one in self.services if one.snapshot] or [self.snapshot]
        return tuple(dict.fromkeys(snapshot.identity for snapshot in served))

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Publication:
        """Parse the publication in `data`.

        Raises:
            StoreError: it is not one.
        """
        return cls.parse_stored(data, path)
