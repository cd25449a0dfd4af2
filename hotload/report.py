"""CycleReport: what one cycle did, in bytes, seconds, replicas, versions and rewards.

The flow's result and the table a person reads. Small by design: data stays in the store, the report
names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime, Field

from hotload.quantities import size
from hotload.readiness import Convergence
from hotload.snapshot import CheckpointContent, Record, Shard, SnapshotKind, SnapshotManifest
from hotload.spec import CycleSpec


class GroupCounts(Record):
    """What the rules for groups did (protocol §16); what is in no row is counted here alone."""

    groups_by_mark: dict[str, int] = Field({})
    """Groups that are kept and not simply complete."""
    dropped_groups: dict[str, int] = Field({})
    """Groups that are not in the data, by why."""
    refilled_groups: int = Field(0, ge=0)
    """Groups that were sampled in place of dropped ones."""
    raw_samples: int = Field(0, ge=0)
    """Samples of all groups, dropped ones included."""
    raw_reward_count: int = Field(0, ge=0)
    raw_reward_sum: float = 0.0
    asked_again: dict[str, int] = Field({})
    """Samples that another was asked for in place of, by their cause of failure."""
    hedges: int = Field(0, ge=0)
    """Samples that were asked for a second time because a group waited for them alone."""
    hedges_won: int = Field(0, ge=0)
    """Those where the second answer came first."""
    cut_off: int = Field(0, ge=0)
    """Requests that were given up while under way: slower ones of a pair, and past a deadline."""
    straddling_samples: int = Field(0, ge=0)
    """Samples that more than one version of the weights made."""
    tokens_masked: int = Field(0, ge=0)
    """Tokens from a change of weights on, where the rules keep those out of the loss; those that
    tools and users said in between, which are never in it, are among them."""
    attempts: int = Field(0, ge=0)
    """Requests sent for all samples: dropped, replaced and cut-off ones included."""
    failed_attempts: dict[str, int] = Field({})
    """Those of them that got no usable answer, by what they met: the status of an error, be it told
    before the answer or inside a 200 (`429`), or else the cause (`connection`, `truncated`);
    `cancelled` are those that were given up while under way. `attempts` is the number of requests
    that were answered (be it beyond `max_seq_len`) plus the sum of these. At most one key for each
    status from 400 to 599, for each `Cause`, and `cancelled`."""

    @classmethod
    def total(cls, counts: Iterable[GroupCounts]) -> GroupCounts:
        """The sum, field by field."""
        counts = tuple(counts)
        total: dict[str, object] = {}
        for name, declared in cls.model_fields.items():
            values = [getattr(each, name) for each in counts]
            total[name] = added(values) if isinstance(declared.default, dict) else sum(values)
        return cls.model_validate(total)


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
    found_sample_count: int = Field(0, ge=0)
    """Those of the samples that an earlier run of this cycle wrote: `seconds` is without theirs."""
    found_token_count: int = Field(0, ge=0)
    """Completion tokens of those."""
    parts_uri: str = ""
    seconds: float = Field(0, ge=0)
    """Wall seconds of sampling and scoring in the run that handed them back."""
    groups: GroupCounts = GroupCounts()
    """What the rules for groups did."""
    window_trace: tuple[tuple[float, int, int], ...] = ()
    """The window through time, thinned out: (seconds since sampling began, slots, slots in
    use)."""

    @property
    def samples_per_second(self) -> float | None:
        """Rate of the run that handed them back, what it found left out; `None` if it found all."""
        return self._per_second(self.sample_count - self.found_sample_count)

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens in the same way."""
        return self._per_second(self.completion_token_count - self.found_token_count)

    def _per_second(self, count: int) -> float | None:
        is_sampled = self.sample_count > self.found_sample_count
        return count / self.seconds if is_sampled and self.seconds else None


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
        carried: Sequence[Carried],
        convergence: Convergence,
        warnings: tuple[str, ...],
        wall_seconds: dict[str, float],
        *,
        began_at: datetime,
    ) -> Published:
        """What is to be told of a snapshot that the replicas serve."""
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
        """The publication in `data`.

        Raises:
            StoreError: it is not one.
        """
        return cls.parse_stored(data, path)


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
        """The report of a cycle that has come to its end."""
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
        """The report as a two-column table for a person: `what`, `value` with units."""
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
            "samples without reward": counts(rollouts.failed_samples),
            **_told(rollouts.groups),
            "mean reward": "" if mean is None else f"{mean:.3f}",
            "samples by identity": counts(rollouts.samples_by_identity),
            "warnings": "; ".join(snapshot.warnings),
            "data": rollouts.parts_uri,
        }
        return [{"what": what, "value": value} for what, value in facts.items() if value]


def _told(groups: GroupCounts) -> dict[str, str]:
    """The rules that did something, in words."""
    hedged = f"{groups.hedges} ({groups.hedges_won} came first)" if groups.hedges else ""
    masked = f", {groups.tokens_masked} tokens masked" if groups.tokens_masked else ""
    refilled = f", {groups.refilled_groups} refilled" if groups.refilled_groups else ""
    dropped = counts(groups.dropped_groups)
    failed = in_words(groups.failed_attempts).items()
    return {
        "groups, marked": counts(groups.groups_by_mark),
        "groups, dropped": dropped and dropped + refilled,
        "samples asked again": counts(groups.asked_again),
        "samples hedged": hedged,
        "samples cut off": str(groups.cut_off or ""),
        "requests sent again or given up": ", ".join(f"{number} × {met}" for met, number in failed),
        "samples straddling": str(groups.straddling_samples or "") + masked,
    }


def added(numbers: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts by name, summed, the highest first."""
    total: Counter[str] = Counter()
    for each in numbers:
        total.update(each)
    return dict(total.most_common())


def in_words(failed_attempts: dict[str, int]) -> dict[str, int]:
    """Failed attempts by what they met, the most frequent first: `HTTP 429`, `swap timeout`."""
    counted = Counter(failed_attempts).most_common()
    return {
        f"HTTP {met}" if met.isdigit() else met.replace("_", " "): number for met, number in counted
    }


def counts(numbers: dict[str, int]) -> str:
    """`{a: 3, b: 1}` as `a 3, b 1`."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
