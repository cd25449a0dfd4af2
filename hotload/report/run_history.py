"""The history of a run: one small row for every policy version whose cycle has ended.

The rows lie together in one file (`<run>.json`), so that a cycle that adds its own reads one
object, however many versions there were. The file only saves work: every row can be made again from
its cycle's report and metrics, which stay the truth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from hotload.errors import StoreError
from hotload.identity import SnapshotKind
from hotload.records import Record
from hotload.report.cycle_report import CycleReport

TEXT_LIMIT = 300
ROWS_LIMIT = 10_000

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=TEXT_LIMIT)]
Identity = Annotated[str, Field(max_length=128)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class RunVersion(Record):
    """What one cycle did, as far as its run's page shows it; seconds, bytes, nats."""

    policy_version: Count
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

    @classmethod
    def of(cls, report: CycleReport, metrics: Mapping[str, Any]) -> RunVersion:
        """Make the row of a cycle from its report and its metrics, of which any may be missing.

        Raises:
            ValidationError: the numbers are such as no cycle writes.
        """
        snapshot, rollouts, took = report.snapshot, report.rollouts, report.seconds_by_stage
        return cls(
            policy_version=report.policy_version,
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
    """The rows of a run, by policy version."""

    schema_number: Literal[1] = 1
    run_id: str
    versions: tuple[RunVersion, ...] = ()

    def adding(self, rows: Iterable[RunVersion]) -> RunHistory:
        """Add rows, which replace those of the same versions; the newest ones stay."""
        by_version = {row.policy_version: row for row in (*self.versions, *rows)}
        newest = sorted(by_version)[-ROWS_LIMIT:]
        return RunHistory(run_id=self.run_id, versions=tuple(map(by_version.__getitem__, newest)))

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


def report_version(file: str, run_id: str) -> int | None:
    """Read the policy version from the name of a report of this run; `None` for any other file."""
    name = re.fullmatch(rf"{re.escape(run_id)}-(\d{{6,12}})\.json", file)
    return int(name[1]) if name else None


def runs_of(files: Iterable[str]) -> list[str]:
    """List the runs that have a report among `files`, sorted."""
    names = (re.fullmatch(r"(.+)-\d{6,12}\.json", file) for file in files)
    return sorted({name[1] for name in names if name})


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= TEXT_LIMIT else f"{text[: TEXT_LIMIT - 1]}…"
