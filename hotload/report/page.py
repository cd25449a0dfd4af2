"""The report of a cycle as one HTML page: no script, no other file, nothing from the network.

It follows the reader's light or dark setting and fits a phone. What comes from outside (texts of
problems and samples, names, errors) is escaped, and a policy in the page forbids the browser to
load anything.
"""

from __future__ import annotations

from datetime import datetime

from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.identity import SnapshotKind
from hotload.quantities import duration, number, percent, plural, size
from hotload.report.cycle_report import CycleReport
from hotload.report.markup import safe
from hotload.report.page_samples import article
from hotload.report.page_sections import (
    bytes_section,
    convergence_section,
    drift_section,
    failures_section,
    known,
    latency_section,
    lengths_section,
    nothing,
    rewards_section,
    rules_section,
    section,
    table,
    throughput_section,
    timeline_section,
    versions_section,
    window_section,
)
from hotload.report.page_style import STYLE
from hotload.report.sample_statistics import SampleStatistics

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_report(
    report: CycleReport,
    statistics: SampleStatistics | None,
    *,
    ended_at: datetime,
    rollouts_ended_at: datetime | None = None,
    trained: TrainedAgainst | None = None,
) -> str:
    """The page of one cycle, as the text of an HTML file.

    Args:
        statistics: of the cycle's samples; `None` where they are not known.
        ended_at: when the cycle ended; its stages are placed before that.
        rollouts_ended_at: when the last group was handed back; `None` leaves the rollouts out of
            the timeline.
        trained: what the trainer told of the samples it acknowledged last.
    """
    run_id, version = report.run_id, report.policy_version
    title = f"{run_id}, version {version}"
    samples = statistics.shown if statistics else ()
    body = [
        '<p class="over">hotload · one cycle</p>',
        f'<h1>{safe(run_id)} <span class="of">·</span> version {version}</h1>',
        f'<p class="lead">{_lead(report)}</p>',
        _facts(report, statistics),
        _warnings(report),
        timeline_section(report, ended_at, rollouts_ended_at),
        '<div class="grid">',
        bytes_section(report),
        convergence_section(report),
        window_section(report),
        throughput_section(report, statistics),
        *_sample_sections(report, statistics),
        versions_section(report),
        drift_section(trained),
        failures_section(report),
        rules_section(report),
        "</div>",
        section(
            "Three of the samples" if len(samples) == 3 else "Samples",
            "The best, the worst, and one more",
            "".join(map(article, samples)) or nothing("There is no sample to show."),
        ),
        _footer(report, ended_at),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


def _lead(report: CycleReport) -> str:
    """The cycle in two sentences; the only place where a fallback is told as a story."""
    snapshot, rollouts = report.snapshot, report.rollouts
    converged = snapshot.seconds_by_stage.get("converge", 0.0)
    replicas = plural(snapshot.replica_count, "replica")
    if not report.is_published:
        first = f"This version was not to be published: version {snapshot.policy_version} was "
        first += f"sampled again on {replicas}."
    else:
        sent = size(snapshot.size_bytes)
        what = f"a <b>full snapshot of {sent}</b>"
        if snapshot.kind is SnapshotKind.DELTA:
            share = percent(snapshot.size_bytes, snapshot.content_size_bytes)
            what = f"a <b>delta of {sent}</b>, {share} of the checkpoint,"
        elif snapshot.kind is SnapshotKind.LORA:
            what = f"an <b>adapter of {sent}</b>"
        if report.fallback_reason:
            what = f"After a first attempt that failed, {what}"
        what = what[0].upper() + what[1:]
        first = f"{what} reached <b>{replicas}</b> {duration(converged)} after the signal."
    then = f"<b>{plural(rollouts.sample_count, 'sample')}</b> of "
    then += f"{plural(rollouts.group_count, 'problem')} came back"
    spent, earlier = f" in {duration(rollouts.seconds)}", " in an earlier run of this cycle"
    found = rollouts.found_sample_count
    if found in (0, rollouts.sample_count):
        then += earlier if found else spent
    else:
        then += f", {found:,} of them{earlier} and the others{spent}"
    if rollouts.mean_reward is not None:
        then += f", with a mean reward of <b>{number(rollouts.mean_reward)}</b>"
    if not rollouts.sample_count and rollouts.groups.raw_samples:
        then = f"All <b>{plural(rollouts.groups.raw_samples, 'sample')}</b> that were made were "
        then += "dropped with their groups"
    return f"{first} {then}."


def _sample_sections(report: CycleReport, statistics: SampleStatistics | None) -> list[str]:
    if statistics is None:
        told = "Not known: an earlier version of hotload wrote them, or their manifest is gone."
        return [section("Latency, tokens and rewards of a sample", "", nothing(told))]
    return [
        latency_section(statistics),
        lengths_section(statistics),
        rewards_section(report, statistics),
    ]


def _facts(report: CycleReport, statistics: SampleStatistics | None) -> str:
    snapshot, rollouts = report.snapshot, report.rollouts
    failed = sum(rollouts.failed_samples.values())
    is_delta = snapshot.kind is SnapshotKind.DELTA
    ratio = f"1 : {number(snapshot.ratio)}" if is_delta else snapshot.kind.value
    mean = rollouts.mean_reward
    std = statistics.counts.rewards.std if statistics else None
    spread = "" if std is None else f"± {number(std)}"
    converged = _unit(duration(snapshot.seconds_by_stage.get("converge", 0.0)))
    published = [
        ("sent", _unit(size(snapshot.size_bytes)), ratio, ""),
        ("to converge", converged, plural(snapshot.replica_count, "replica"), ""),
    ]
    facts = [
        *(published if report.is_published else []),
        ("samples", f"{rollouts.sample_count:,}", plural(rollouts.group_count, "group"), ""),
        (
            "tokens per second",
            known(rollouts.tokens_per_second),
            f"{known(rollouts.samples_per_second)} samples per second",
            "",
        ),
        ("mean reward", "–" if mean is None else number(mean), spread, ""),
        (
            "without a reward",
            percent(failed, rollouts.sample_count),
            plural(failed, "sample"),
            "warn" if failed else "",
        ),
    ]
    cells = "".join(
        f'<div class="{kind}"><dt>{safe(name)}</dt><dd>{value}</dd>'
        f'<div class="sub">{safe(sub)}</div></div>'
        for name, value, sub, kind in facts
    )
    return f'<dl class="facts">{cells}</dl>'


def _unit(told: str) -> str:
    """The first number large, what follows it small."""
    value, _, unit = told.partition(" ")
    return f"{safe(value)} <small>{safe(unit)}</small>"


def _warnings(report: CycleReport) -> str:
    told = list(report.snapshot.warnings)
    if report.fallback_reason:
        told.insert(0, f"First attempt: {report.fallback_reason}")
    if not told:
        return ""
    lines = "".join(f"<p>{safe(warning)}</p>" for warning in told)
    return f'<section><div class="notes">{lines}</div></section>'


def _footer(report: CycleReport, ended_at: datetime) -> str:
    rows = {
        "identity": report.snapshot.identity,
        "data": report.rollouts.parts_uri,
        "content sha256": report.content_sha256,
        "ended": f"{ended_at:%Y-%m-%d %H:%M:%S} UTC",
    }
    return f"<footer>{table(rows)}</footer>"
