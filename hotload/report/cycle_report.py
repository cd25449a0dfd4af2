"""CycleReport: what one cycle did, in bytes, seconds, replicas, versions and rewards.

The flow's result and the table a person reads. Small by design: data stays in the store, the report
names it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hotload.publish.publication import Publication, Published
from hotload.quantities import size
from hotload.records import Record
from hotload.rollout.counts import RolloutSummary, join_counts, rule_rows
from hotload.spec import CycleSpec


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

    @property
    def run_id(self) -> str:
        """The training run's name."""
        return self.name.rpartition("-")[0]

    @property
    def is_published(self) -> bool:
        """Whether `snapshot` is this cycle's; one that was not due sampled an earlier version's."""
        return self.outcome != "not due"

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """As the snapshot's; none of it where another cycle published that."""
        return self.snapshot.seconds_by_stage if self.is_published else {}

    @classmethod
    def of(
        cls, spec: CycleSpec, publication: Publication, rollouts: RolloutSummary, seconds: float
    ) -> CycleReport:
        """Report a cycle that has come to its end."""
        content, snapshot = publication.content, publication.snapshot
        is_own = snapshot.policy_version == spec.policy_version
        warned = snapshot.model_copy(update={"warnings": (*content.warnings, *snapshot.warnings)})
        fell_back = publication.fallback is not None
        return cls(
            name=spec.name,
            policy_version=spec.policy_version,
            content_sha256=content.sha256,
            outcome="fell back" if fell_back else "published" if is_own else "not due",
            snapshot=warned,
            fallback_reason=publication.fallback,
            rollouts=rollouts,
            seconds=seconds,
        )

    def rows(self) -> list[dict[str, str]]:
        """Lay the report out as a two-column table for a person: `what`, `value` with units."""
        snapshot, rollouts = self.snapshot, self.rollouts
        travelled, full = size(snapshot.size_bytes), size(snapshot.content_size_bytes)
        sent = f"{travelled} of {full} (1 : {snapshot.ratio:.1f})"
        mean, first = rollouts.mean_reward, self.fallback_reason or ""
        facts = {
            "identity": snapshot.identity,
            "kind": snapshot.kind.value,
            "why": snapshot.reason,
            "outcome": self.outcome,
            "first failure": first if first != snapshot.reason else "",
            "bytes": sent if self.is_published else "",
            "replicas": str(snapshot.replica_count),
            "seconds": f"{self.seconds:.1f}",
            **{f"… {stage}": f"{spent:.2f}" for stage, spent in self.seconds_by_stage.items()},
            "… rollouts": f"{rollouts.seconds:.2f}",
            "groups": f"{rollouts.group_count} ({rollouts.sample_count} samples)",
            "samples without reward": join_counts(rollouts.failed_samples),
            **rule_rows(rollouts.groups),
            "mean reward": "" if mean is None else f"{mean:.3f}",
            "samples by identity": join_counts(rollouts.samples_by_identity),
            "warnings": "; ".join(snapshot.warnings),
            "data": rollouts.parts_uri,
        }
        return [{"what": what, "value": value} for what, value in facts.items() if value]
