"""CycleReport: what one cycle did, in bytes, seconds, replicas, versions and rewards.

The flow's result and the table a person reads. Small by design: data stays in the store, the report
names it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hotload.identity import read_cycle_name
from hotload.publish.cost import money_of
from hotload.publish.publication import Publication, ServedSnapshot, ServicePublication
from hotload.quantities import number, plural, size
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
    snapshot: ServedSnapshot
    fallback_reason: str | None = None
    rollouts: RolloutSummary
    seconds: float = Field(ge=0)
    baseline_trouble: str | None = None
    """Why the work directory lacks the bytes of `snapshot`, a full disk perhaps."""
    services: tuple[ServicePublication, ...] = ()
    """All services of the cycle; none in a report of an earlier version of hotload."""
    money: float | None = Field(None, ge=0, allow_inf_nan=False)
    """What publishing `snapshot` cost at the declared prices; None without them."""

    @property
    def run_id(self) -> str:
        """The training run's name."""
        return self.name.rpartition("-")[0]

    @property
    def line(self) -> int:
        """The line of the run, which the name says."""
        named = read_cycle_name(self.name)
        return named.line if named else 0

    @property
    def is_published(self) -> bool:
        """Whether `snapshot` is this cycle's; one that was not due sampled an earlier version's."""
        return self.outcome != "not due"

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """As the snapshot's; none of it where another cycle published that."""
        return self.snapshot.seconds_by_stage if self.is_published else {}

    @property
    def services_in_words(self) -> dict[str, str]:
        """Say of each of several services what became of it; empty where there is one."""
        if len(self.services) < 2:
            return {}
        snapshots = [one.snapshot for one in self.services if one.snapshot]
        distinct = {one.identity: one.size_bytes for one in snapshots}
        total = f"{size(sum(distinct.values()))}, {plural(len(distinct), 'snapshot')}"
        return {
            **{one.service: one.describe() for one in self.services},
            "stored for all services": total,
        }

    @property
    def failed_services(self) -> str:
        """Which services do not serve the version, and why, in words; empty where all do."""
        failed = (f"{one.service}: {one.failure}" for one in self.services if one.failure)
        return "; ".join(failed)

    @property
    def fallbacks_elsewhere(self) -> str:
        """Which other services fell back, and why, in words."""
        fell_back = (f"{one.service}: {one.fallback}" for one in self.services if one.fallback)
        return "; ".join(fell_back)

    @property
    def next_is_full(self) -> str:
        """What a lost baseline costs, in words; empty where there is one."""
        if self.baseline_trouble is None:
            return ""
        return self.snapshot.without_baseline(self.baseline_trouble)

    @classmethod
    def of(
        cls,
        spec: CycleSpec,
        publication: Publication,
        rollouts: RolloutSummary,
        seconds: float,
        baseline_trouble: str | None = None,
    ) -> CycleReport:
        """Report a cycle that has come to its end."""
        content, snapshot = publication.content, publication.snapshot
        is_own = snapshot.policy_version == spec.policy_version
        warned = snapshot.model_copy(update={"warnings": (*content.warnings, *snapshot.warnings)})
        fell_back = publication.fallback is not None
        took = snapshot.seconds_by_stage
        money = money_of(
            spec.prices,
            stored_bytes=snapshot.size_bytes,
            fetched_bytes=snapshot.egress_bytes,
            seconds=sum(took.get(stage, 0.0) for stage in ("publish", "signal", "converge")),
        )
        return cls(
            name=spec.name,
            policy_version=spec.policy_version,
            content_sha256=content.sha256,
            outcome="fell back" if fell_back else "published" if is_own else "not due",
            snapshot=warned,
            fallback_reason=publication.fallback,
            rollouts=rollouts,
            seconds=seconds,
            baseline_trouble=baseline_trouble,
            services=publication.services,
            money=money if is_own else None,
        )

    def rows(self) -> list[dict[str, str]]:
        """Lay the report out as a two-column table for a person: `what`, `value` with units."""
        snapshot, rollouts = self.snapshot, self.rollouts
        travelled, full = size(snapshot.size_bytes), size(snapshot.content_size_bytes)
        sent = f"{travelled} of {full} (1 : {snapshot.ratio:.1f})"
        replicas = plural(snapshot.replica_count, "replica")
        mean, first = rollouts.mean_reward, self.fallback_reason or ""
        facts = {
            "identity": snapshot.identity,
            "kind": snapshot.kind.value,
            "why": snapshot.reason,
            "outcome": self.outcome,
            "first failure": first if first != snapshot.reason else "",
            "bytes": sent if self.is_published else "",
            "egress": f"{size(snapshot.egress_bytes)} to {replicas}" if self.is_published else "",
            "money": "" if self.money is None else number(self.money),
            "replicas": "; ".join(snapshot.by_replica) or str(snapshot.replica_count),
            **self.services_in_words,
            "seconds": f"{self.seconds:.1f}",
            **{f"… {stage}": f"{spent:.2f}" for stage, spent in self.seconds_by_stage.items()},
            "… rollouts": f"{rollouts.seconds:.2f}",
            "groups": f"{rollouts.group_count} ({rollouts.sample_count} samples)",
            "samples without reward": join_counts(rollouts.failed_samples),
            **rule_rows(rollouts.groups),
            "mean reward": "" if mean is None else f"{mean:.3f}",
            "samples by identity": join_counts(rollouts.samples_by_identity),
            "warnings": "; ".join(snapshot.warnings),
            "baseline": self.next_is_full,
            "data": rollouts.parts_uri,
        }
        return [{"what": what, "value": value} for what, value in facts.items() if value]
