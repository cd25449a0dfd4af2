"""Renders the report of a cycle as one HTML page: no script, no other file, no network.

It follows the reader's light or dark setting and fits a phone. What comes from outside (texts of
problems and samples, names, errors) is escaped by the templates, and a policy in the page forbids
the browser to load anything.
"""

from __future__ import annotations

from datetime import datetime

from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.identity import SnapshotKind
from hotload.quantities import duration, number, percent, plural, size
from hotload.report.cycle_page_sections import (
    convergence_section,
    drift_section,
    failures_section,
    latency_section,
    lengths_section,
    requests_section,
    rewards_section,
    rules_section,
    services_section,
    throughput_section,
    timeline_section,
    versions_section,
    window_section,
)
from hotload.report.cycle_report import CycleReport
from hotload.report.page_parts import Fact, Section
from hotload.report.sample_statistics import SampleStatistics
from hotload.report.templating import render


def render_report(
    report: CycleReport,
    statistics: SampleStatistics | None,
    *,
    ended_at: datetime,
    rollouts_ended_at: datetime | None = None,
    trained: TrainedAgainst | None = None,
) -> str:
    """Render the page of one cycle, as the text of an HTML file.

    Args:
        statistics: of the cycle's samples; `None` where they are not known.
        ended_at: when the cycle ended; its stages are placed before that.
        rollouts_ended_at: when the last group was handed back; `None` leaves the rollouts out of
            the timeline.
        trained: the drift of the samples that the trainer acknowledged last.
    """
    sections = [
        services_section(report),
        convergence_section(report),
        window_section(report),
        *_sample_sections(report, statistics),
        versions_section(report),
        failures_section(report),
        requests_section(report),
        throughput_section(report, statistics),
        rules_section(report),
        drift_section(trained),
    ]
    reasons = [f"First attempt: {report.fallback_reason}"] if report.fallback_reason else []
    return render(
        "cycle.html.jinja",
        report=report,
        snapshot=report.snapshot,
        rollouts=report.rollouts,
        facts=_facts(report, statistics),
        warnings=[*reasons, *report.snapshot.warnings],
        timeline=timeline_section(report, ended_at, rollouts_ended_at),
        sections=[section for section in sections if section],
        samples=statistics.shown if statistics else (),
        ended_at=f"{ended_at:%Y-%m-%d %H:%M:%S} UTC",
    )


def _sample_sections(
    report: CycleReport, statistics: SampleStatistics | None
) -> list[Section | None]:
    if statistics is None:
        why = "Not known: an earlier version of hotload wrote them, or their manifest is gone."
        return [Section("Latency, tokens and rewards of a sample", why)]
    return [
        rewards_section(report, statistics),
        latency_section(statistics),
        lengths_section(statistics),
    ]


def _facts(report: CycleReport, statistics: SampleStatistics | None) -> list[Fact]:
    snapshot, rollouts = report.snapshot, report.rollouts
    failed = sum(rollouts.failed_samples.values())
    is_delta = snapshot.kind is SnapshotKind.DELTA
    ratio = f"1 : {number(snapshot.ratio)}" if is_delta else snapshot.kind.value
    converged = duration(snapshot.seconds_by_stage.get("converge", 0.0))
    published = [
        Fact("sent", size(snapshot.size_bytes), ratio),
        Fact("egress", size(snapshot.egress_bytes), "store to replicas"),
        *([] if report.money is None else [Fact("money", number(report.money), "this version")]),
        Fact("to converge", converged, plural(snapshot.replica_count, "replica")),
    ]
    mean = rollouts.mean_reward
    std = statistics.counts.rewards.std if statistics else None
    spread = "" if std is None else f"± {number(std)}"
    rate, samples_rate = rollouts.tokens_per_second, rollouts.samples_per_second
    return [
        *(published if report.is_published else []),
        Fact("samples", f"{rollouts.sample_count:,}", plural(rollouts.group_count, "group")),
        Fact(
            "tokens per second",
            "–" if rate is None else number(rate),
            "" if samples_rate is None else f"{number(samples_rate)} samples per second",
        ),
        Fact("mean reward", "–" if mean is None else number(mean), spread),
        Fact(
            "without a reward",
            percent(failed, rollouts.sample_count),
            plural(failed, "sample"),
            is_bad=failed > 0,
        ),
    ]
