"""CycleReport: what one cycle did, in bytes, seconds, replicas, versions and rewards.

The flow's result and the table a person reads. Small by design: data stays in the store, the report
names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from hotload.snapshot import CheckpointContent, Record, Shard, SnapshotKind, SnapshotManifest
from hotload.spec import CycleSpec


class RolloutSummary(Record):
    """What the samples of one cycle came to; `parts_uri` is the directory with the scored
    groups."""

    identity: str
    group_count: int = Field(ge=0)
    sample_count: int = Field(ge=0)
    failed_samples: dict[str, int] = Field({})
    """Samples without a reward, by cause; they stay in the data, marked."""
    samples_by_identity: dict[str, int] = Field({})
    """Samples by the identity that answered them."""
    mean_reward: float | None = None
    completion_token_count: int = Field(0, ge=0)
    parts_uri: str = ""
    seconds: float = Field(0, ge=0)


class Carried(Record):
    """One batch of shards that lies whole in the store, and what it took to get there."""

    shards: tuple[Shard, ...]
    encode_seconds: float
    verify_seconds: float
    upload_seconds: float
    hint_count: int


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
    """Seconds of encode, verify and upload, summed over overlapping shards; wall seconds of publish
    (all of those), signal and converge."""
    hint_count: int = Field(0, ge=0)
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: SnapshotManifest,
        reason: str,
        carried: Sequence[Carried],
        replica_count: int,
        warnings: tuple[str, ...],
        wall_seconds: dict[str, float],
    ) -> Published:
        """What is to be told of a snapshot that `replica_count` replicas serve."""
        return cls(
            identity=manifest.identity,
            policy_version=manifest.policy_version,
            kind=manifest.kind,
            previous=manifest.previous,
            reason=reason,
            size_bytes=manifest.size_bytes,
            content_size_bytes=manifest.content_size_bytes,
            replica_count=replica_count,
            seconds_by_stage={
                "encode": sum(batch.encode_seconds for batch in carried),
                "verify": sum(batch.verify_seconds for batch in carried),
                "upload": sum(batch.upload_seconds for batch in carried),
                **wall_seconds,
            },
            hint_count=sum(batch.hint_count for batch in carried),
            warnings=warnings,
        )

    @property
    def ratio(self) -> float:
        """Bytes of the checkpoint over bytes that travelled."""
        return self.content_size_bytes / self.size_bytes if self.size_bytes else 0.0


class CycleReport(Record):
    """One policy version from checkpoint to scored groups."""

    schema_number: Literal[1] = 1
    name: str
    policy_version: int = Field(ge=0)
    content_sha256: str
    outcome: Literal["published", "fell back", "not due"]
    snapshot: Published
    fallback_reason: str | None = None
    rollouts: RolloutSummary
    seconds: float = Field(ge=0)

    @classmethod
    def of(
        cls,
        spec: CycleSpec,
        content: CheckpointContent,
        snapshot: Published,
        fallback_reason: str | None,
        rollouts: RolloutSummary,
        seconds: float,
    ) -> CycleReport:
        """The report of a cycle that has come to its end."""
        is_own = snapshot.policy_version == spec.policy_version
        warned = snapshot.model_copy(update={"warnings": (*content.warnings, *snapshot.warnings)})
        return cls(
            name=spec.name,
            policy_version=spec.policy_version,
            content_sha256=content.sha256,
            outcome="fell back" if fallback_reason else "published" if is_own else "not due",
            snapshot=warned,
            fallback_reason=fallback_reason,
            rollouts=rollouts,
            seconds=seconds,
        )

    def rows(self) -> list[dict[str, str]]:
        """The report as a two-column table for a person: `what`, `value` with units."""
        snapshot, rollouts = self.snapshot, self.rollouts
        travelled = megabytes(snapshot.size_bytes)
        full = megabytes(snapshot.content_size_bytes)
        mean, first = rollouts.mean_reward, self.fallback_reason or ""
        facts = {
            "identity": snapshot.identity,
            "kind": snapshot.kind.value,
            "why": snapshot.reason,
            "outcome": self.outcome,
            "first failure": first if first != snapshot.reason else "",
            "bytes": f"{travelled} of {full} (1 : {snapshot.ratio:.1f})",
            "replicas": str(snapshot.replica_count),
            "seconds": f"{self.seconds:.1f}",
            **{f"… {stage}": f"{took:.2f}" for stage, took in snapshot.seconds_by_stage.items()},
            "… rollouts": f"{rollouts.seconds:.2f}",
            "groups": f"{rollouts.group_count} ({rollouts.sample_count} samples)",
            "samples without reward": counts(rollouts.failed_samples),
            "mean reward": "" if mean is None else f"{mean:.3f}",
            "samples by identity": counts(rollouts.samples_by_identity),
            "warnings": "; ".join(snapshot.warnings),
            "data": rollouts.parts_uri,
        }
        return [{"what": what, "value": value} for what, value in facts.items() if value]


def megabytes(size_bytes: int) -> str:
    """A size for a person: `12 B`, `3.4 kB`, `1.2 MB`, `7.9 GB` (powers of 1000)."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def counts(numbers: dict[str, int]) -> str:
    """`{a: 3, b: 1}` as `a 3, b 1`."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
