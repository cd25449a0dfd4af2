"""The history of a run: one small row for every policy version whose cycle has ended.

The rows lie together in one file (`<run>.json`), so that a cycle that adds its own reads one
object, however many versions there were. The file only saves work: every row can be made again from
its cycle's report and metrics, which stay the truth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from hotload.errors import StoreError
from hotload.identity import NamedVersion, SnapshotKind, read_cycle_name
from hotload.publish.cost import TimeTaken
from hotload.publish.lines import Lines
from hotload.publish.snapshot import SnapshotManifest
from hotload.records import Record
from hotload.report.cycle_report import CycleReport

TEXT_LIMIT = 300
ROWS_LIMIT = 10_000
LIMIT_SECONDS = 1e6  # a cycle that says it took longer tells nothing of the next

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=TEXT_LIMIT)]
Identity = Annotated[str, Field(max_length=128)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class RunVersion(Record):
    """What one cycle did, as far as its run's page shows it; seconds, bytes, nats."""

    policy_version: Count
    line: Count = 0
    identity: Identity
    """What was sampled: of a version that was not due, an earlier one's snapshot."""
    kind: SnapshotKind
    previous: Identity | None
    outcome: Literal["published", "fell back", "not due"]
    fallback_reason: Text | None
    size_bytes: Count
    content_size_bytes: Count
    replica_count: Count
    seconds: Amount
    publish_seconds: Amount
    signal_seconds: Amount
    converge_seconds: Amount
    rollout_seconds: Amount
    sample_count: Count
    failed_sample_count: Count
    request_count: Count
    failed_request_count: Count
    mean_reward: Number | None
    reward_std: Amount | None
    """Standard deviation over the samples."""
    drift_k3: Amount | None
    """The trainer's drift on the samples of version `drift_version`, as this cycle saw it."""
    drift_version: Count | None
    ended_at: AwareDatetime | None
    """When its rollouts were handed back."""

    @property
    def order(self) -> tuple[int, int]:
        """Line and policy version: the order in which a run publishes."""
        return self.line, self.policy_version

    @classmethod
    def of(cls, report: CycleReport, metrics: Mapping[str, Any]) -> RunVersion:
        """Make the row of a cycle from its report and its metrics, of which any may be missing.

        Raises:
            ValidationError: the numbers are such as no cycle writes.
        """
        snapshot, rollouts, took = report.snapshot, report.rollouts, report.seconds_by_stage
        return cls(
            policy_version=report.policy_version,
            line=report.line,
            identity=snapshot.identity,
            kind=snapshot.kind,
            previous=snapshot.previous,
            outcome=report.outcome,
            fallback_reason=_cut(report.fallback_reason),
            size_bytes=snapshot.size_bytes,
            content_size_bytes=snapshot.content_size_bytes,
            replica_count=snapshot.replica_count,
            seconds=report.seconds,
            publish_seconds=took.get("publish", 0),
            signal_seconds=took.get("signal", 0),
            converge_seconds=took.get("converge", 0),
            rollout_seconds=rollouts.seconds,
            sample_count=rollouts.sample_count,
            failed_sample_count=sum(rollouts.failed_samples.values()),
            request_count=rollouts.groups.attempts,
            failed_request_count=sum(rollouts.groups.failed_attempts.values()),
            mean_reward=rollouts.mean_reward,
            reward_std=metrics.get("rollout/reward_std"),
            drift_k3=metrics.get("rollout/trainer_drift_k3"),
            drift_version=metrics.get("async/trained_against_version"),
            ended_at=metrics.get("at"),
        )


class RunHistory(Record):
    """The rows of a run, by line and policy version."""

    schema_number: Literal[1] = 1
    run_id: str
    versions: tuple[RunVersion, ...] = ()

    def adding(self, rows: Iterable[RunVersion]) -> RunHistory:
        """Add rows, which replace those of the same versions; the newest ones stay."""
        by_version = {row.order: row for row in (*self.versions, *rows)}
        newest = sorted(by_version)[-ROWS_LIMIT:]
        return RunHistory(run_id=self.run_id, versions=tuple(map(by_version.__getitem__, newest)))

    @property
    def lines(self) -> Lines:
        """The lines after line 0, as far as a cycle of them has ended."""
        return Lines.of(row.order for row in self.versions)

    @property
    def standing(self) -> tuple[RunVersion, ...]:
        """The rows that no later line has superseded: one for each policy version, ascending."""
        lines = self.lines
        return tuple(row for row in self.versions if not lines.is_superseded(*row.order))

    def chain_bytes(self, head: SnapshotManifest) -> int:
        """Sum the bytes of the deltas up to `head`; one that no row tells of counts like `head`."""
        rows = {row.identity: row for row in self.versions}
        total, identity = 0, head.identity
        for _ in range(head.chain_length):
            row = rows.get(identity)
            total += head.size_bytes if row is None else row.size_bytes
            identity = "" if row is None else row.previous or ""
        return total

    def time_taken(self) -> dict[SnapshotKind, TimeTaken]:
        """Find what publishing took, by kind: the middle one of the last three."""
        taken: dict[SnapshotKind, list[TimeTaken]] = {}
        for row in self.versions:
            spent = row.publish_seconds + row.signal_seconds + row.converge_seconds
            if row.outcome != "not due" and row.size_bytes and 0 < spent < LIMIT_SECONDS:
                taken.setdefault(row.kind, []).append(TimeTaken(row.size_bytes, spent))
        return {
            kind: sorted(found[-3:], key=lambda one: one.seconds)[len(found[-3:]) // 2]
            for kind, found in taken.items()
        }

    def render(self) -> bytes:
        """Write the history as JSON, which `parse_stored` reads back."""
        return self.model_dump_json().encode()


def last_metrics(data: bytes) -> dict[str, Any]:
    """Read the cycle's own numbers, the last line of its metrics file.

    Raises:
        StoreError: it is no JSON object.
    """
    try:
        metrics = json.loads(data.rstrip().rpartition(b"\n")[2])
    except (ValueError, RecursionError):
        metrics = None
    if not isinstance(metrics, dict):
        raise StoreError("metrics", "the last line is not a JSON object")
    return metrics


def reports_of(files: Iterable[str]) -> list[NamedVersion]:
    """List the cycles that have a report among `files`, of all runs, sorted."""
    names = (file.removesuffix(".json") for file in files if file.endswith(".json"))
    return sorted(filter(None, map(read_cycle_name, names)))


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= TEXT_LIMIT else f"{text[: TEXT_LIMIT - 1]}…"
