"""Publication: what one cycle published, in bytes, seconds and replicas."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydantic import AwareDatetime, Field

from hotload.identity import SnapshotKind
from hotload.publish.readiness import Convergence
from hotload.publish.snapshot import CheckpointContent, ShardBatch, SnapshotManifest
from hotload.records import Record


class Published(Record):
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
    """Seconds of encode, verify and upload, summed over overlapping shards, where they were done;
    wall seconds of publish (all of those), signal and converge."""
    began_at: AwareDatetime | None = None
    """When the publication began; publish, signal and converge follow each other from there."""
    convergence: tuple[tuple[float, int], ...] = ()
    """(Seconds since the signal, replicas that served it), wherever the number changed."""
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
    ) -> Published:
        """Record a snapshot that the replicas serve."""
        worked = {
            "encode": sum(batch.encode_seconds for batch in carried),
            "verify": sum(batch.verify_seconds for batch in carried),
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
            hint_count=sum(batch.hint_count for batch in carried),
            warnings=warnings,
        )

    @property
    def ratio(self) -> float:
        """Bytes of the checkpoint over bytes that travelled."""
        return self.content_size_bytes / self.size_bytes if self.size_bytes else 0.0


class Publication(Record):
    """How one cycle's publication ended: what it published, from what, and why by a fallback."""

    content: CheckpointContent
    snapshot: Published
    fallback: str | None = None

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Publication:
        """Parse the publication in `data`.

        Raises:
            StoreError: it is not one.
        """
        return cls.parse_stored(data, path)
