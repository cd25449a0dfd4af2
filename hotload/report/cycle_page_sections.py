"""Prepares the sections of a cycle's page: each a heading, a line on what is seen, and a chart.

A section that has nothing to show is left out: its function gives `None`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

import numpy as np

from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.quantities import duration, number, percent, plural
from hotload.report.chart_shapes import Bar, histogram, steps, timeline
from hotload.report.cycle_report import CycleReport
from hotload.report.page_parts import Section, Share
from hotload.report.sample_statistics import SampleStatistics
from hotload.rollout.counts import in_words, join_counts

DISTINCT_REWARDS = 6
BARS_SHOWN = 10


def timeline_section(
    report: CycleReport, ended_at: datetime, rollouts_ended_at: datetime | None
) -> Section:
    """Place the stages on the time axis of the cycle."""
    took = report.seconds_by_stage
    began_at = ended_at - timedelta(seconds=report.seconds)
    heading, why = "Where the time went", f"{duration(report.seconds)} from start to end"
    rows = []
    published_at = report.snapshot.began_at if report.is_published else None
    if published_at is not None and published_at >= began_at:
        at = (published_at - began_at).total_seconds()
        first = "check, plan, first attempt" if report.fallback_reason else "check and plan"
        rows.append(Bar(first, 0, at, duration(at), "fifth"))
        for stage, label, tone in (
            ("publish", "encode and upload", "main"),
            ("signal", "signal", "main"),
            ("converge", "replicas converge", "second"),
        ):
            spent = took.get(stage, 0)
            rows.append(Bar(label, at, at + spent, duration(spent), tone))
            at += spent
    spent = report.rollouts.seconds
    if rollouts_ended_at is not None and rollouts_ended_at > began_at:
        end = min((rollouts_ended_at - began_at).total_seconds(), report.seconds)
        rows.append(Bar("roll out and score", max(end - spent, 0), end, duration(spent), "third"))
    if not rows:
        return Section(heading, why, note="The stages ran in an earlier run of this cycle.")
    work = {stage: took[stage] for stage in ("encode", "upload") if took.get(stage)}
    summed = ", ".join(f"{stage} {duration(spent)}" for stage, spent in work.items())
    return Section(
        heading,
        why,
        timeline(rows, report.seconds, duration),
        note=f"Summed over shards, which overlap: {summed}." if work else "",
    )


def convergence_section(report: CycleReport) -> Section | None:
    """Draw the replicas that serve the snapshot, over time."""
    snapshot = report.snapshot
    spent = snapshot.seconds_by_stage.get("converge", 0.0)
    if not snapshot.convergence or not report.is_published:
        return None
    return Section(
        "Replicas converge",
        f"Replicas that serve exactly this snapshot, since the signal; all after {duration(spent)}",
        steps(
            [(snapshot.convergence, "wash area"), (snapshot.convergence, "main line")],
            1.08 * max(spent, snapshot.convergence[-1][0]),  # the last step stays to be seen
            max(snapshot.replica_count, *(count for _, count in snapshot.convergence), 1),
            "Replicas that serve the snapshot, over time",
            duration,
            height=150,
        ),
        note=f"At the end: {'; '.join(snapshot.by_replica)}." if snapshot.by_replica else "",
    )


def services_section(report: CycleReport) -> Section | None:
    """List what became of each service, where there are several."""
    if not (rows := report.services_in_words):
        return None
    why = "Each by the snapshot that its own replicas could load; the other figures are the first's"
    return Section("Services", why, rows=rows)


def window_section(report: CycleReport) -> Section | None:
    """Draw the window and the requests in flight, over time."""
    trace = report.rollouts.window_trace
    if not trace:
        return None
    sizes = [(at, size) for at, size, _ in trace]
    used = [(at, in_use) for at, _, in_use in trace]
    return Section(
        "Requests in flight",
        f"The window the service allows, at most {max(size for _, size in sizes)}, and its use",
        steps(
            [(used, "wash area"), (sizes, "main line")],
            max(report.rollouts.seconds, trace[-1][0]),
            max(max(size, in_use) for _, size, in_use in trace) * 1.08,
            "Window and requests in flight over time",
            duration,
        ),
        legend=(("main", "window"), ("wash", "in flight")),
    )


def throughput_section(report: CycleReport, statistics: SampleStatistics | None) -> Section | None:
    """List rates and sizes."""
    rollouts = report.rollouts
    attempts, samples = rollouts.groups.attempts, rollouts.groups.raw_samples
    if not samples and not rollouts.sample_count:
        return None
    rows = {
        "completion tokens": f"{rollouts.completion_token_count:,}",
        "requests per sample": number(attempts / samples) if samples else "–",
    }
    if statistics is not None:
        counts, entropy = statistics.counts, statistics.entropy_nats
        rows["prompt tokens from the cache"] = percent(
            counts.cached_prompt_token_count, counts.prompt_token_count
        )
        rows["entropy per token"] = "–" if entropy is None else f"{number(entropy)} nats"
        mean, most = counts.turns.mean, counts.turns.greatest
        if mean is not None and most is not None and most > 1:
            rows["turns per sample, mean and most"] = f"{number(mean)} and {most:.0f}"
    why = f"Over {duration(rollouts.seconds)} of sampling and scoring"
    if earlier := rollouts.found_sample_count:
        why += f"; {plural(earlier, 'sample')} of an earlier run are not in the rates"
    return Section("Throughput", why, rows=rows)


def latency_section(statistics: SampleStatistics) -> Section | None:
    """Draw seconds per sample, with percentiles."""
    taken = statistics.counts.latency_seconds.values
    if not taken:
        return None
    p50, p90, p99 = (float(each) for each in np.percentile(taken, (50, 90, 99)))
    longest = taken[-1]
    # A few stragglers must not squeeze all others into one bin.
    high = longest if longest <= 2 * p99 else p99 * 1.25
    inside = [each for each in taken if each <= high]
    binned, edges = np.histogram(inside, bins=28, range=(0, high or 1))
    left = len(taken) - len(inside)
    rest = f"; {plural(left, 'sample')} beyond the picture" if left else ""
    return Section(
        "Latency of a sample",
        f"First attempt to end, waits included; the longest took {duration(longest)}{rest}",
        histogram(
            edges.tolist(),
            binned.tolist(),
            "Latency of samples",
            duration,
            marks=[
                (p50, f"median {duration(p50)}"),
                (p90, f"90 % {duration(p90)}"),
                (p99, f"99 % {duration(p99)}"),
            ],
            height=180,
        ),
    )


def lengths_section(statistics: SampleStatistics) -> Section | None:
    """Draw completion tokens per sample."""
    lengths = statistics.counts.completion_tokens.values
    if not lengths:
        return None
    cut = statistics.counts.length_limited_count
    median, longest = float(np.median(lengths)), int(lengths[-1])
    binned, edges = np.histogram(lengths, bins=min(28, longest), range=(0, longest))
    return Section(
        "Tokens of a sample",
        f"Completion tokens of all turns; {percent(cut, len(lengths))} ended at the limit",
        histogram(
            edges.tolist(),
            binned.tolist(),
            "Samples by completion tokens",
            number,
            marks=[(median, f"median {number(median)}")],
            height=180,
        ),
    )


def rewards_section(report: CycleReport, statistics: SampleStatistics) -> Section | None:
    """Draw the distribution of rewards."""
    rewards = statistics.counts.rewards
    if rewards.mean is None:
        return None
    uniform = percent(*statistics.uniform_groups(report.rollouts.groups))
    why = f"{plural(rewards.count, 'sample')}; in {uniform} of the groups all are equal"
    if len(rewards.by_value) <= DISTINCT_REWARDS:
        counted = {f"{value:.3g}": count for value, count in rewards.by_value.items()}
        return Section("Rewards", why, shares=_shares(counted, rewards.count, "main"))
    binned, edges = np.histogram(rewards.values, bins=28)
    mean = (rewards.mean, f"mean {number(rewards.mean)}")
    return Section(
        "Rewards",
        why,
        histogram(edges.tolist(), binned.tolist(), "Samples by reward", number, marks=[mean]),
    )


def versions_section(report: CycleReport) -> Section | None:
    """Draw samples by the weights that made them."""
    counted = report.rollouts.samples_by_identity
    if not counted:
        return None
    return Section(
        "Weights behind the samples",
        "As each answer named them itself",
        shares=_shares(counted, sum(counted.values()), "second"),
    )


def drift_section(trained: TrainedAgainst | None) -> Section | None:
    """List the trainer's log-probabilities against the sampler's."""
    if trained is None:
        return None
    drift = trained.drift
    figures = {
        "k1": drift.k1,
        "k3": drift.k3,
        "mean of |d|": drift.mean_abs,
        "largest |d|": drift.max_abs,
    }
    rows = {
        name: f"{nats:.3g} nats".replace("-", "−")
        for name, nats in figures.items()
        if nats is not None
    }
    rows["tokens compared"] = f"{drift.token_count:,}"
    if drift.not_finite_count:
        rows["tokens without a number"] = f"{drift.not_finite_count:,}"
    return Section(
        "Trainer against sampler",
        "Log-probabilities of the same tokens, on what the trainer acknowledged last: "
        f"samples of version {trained.policy_version}",
        rows=rows,
        note="d is the trainer's log-probability of a token less the sampler's. k1, the mean of "
        "−d, and k3, the mean of exp(d) − 1 − d, both estimate the divergence of the trainer's "
        "policy from the one that sampled: 0 nats where they are the same.",
    )


def failures_section(report: CycleReport) -> Section | None:
    """Draw samples that failed, by cause."""
    rollouts = report.rollouts
    causes = {cause.replace("_", " "): count for cause, count in rollouts.failed_samples.items()}
    if not causes:
        return None
    return Section(
        "Samples without a reward",
        "By cause, with the share of all samples",
        shares=_shares(causes, rollouts.sample_count, "warn"),
    )


def requests_section(report: CycleReport) -> Section | None:
    """Draw requests that failed, by the answer they got."""
    groups = report.rollouts.groups
    causes = in_words(groups.failed_attempts)
    if not causes:
        return None
    return Section(
        "Requests without an answer",
        f"Sent again or given up; share of {plural(groups.attempts, 'request')}",
        shares=_shares(causes, groups.attempts, "fifth"),
    )


def _shares(counted: Mapping[str, int], total: int, tone: str) -> tuple[Share, ...]:
    """Make a bar of each count, of the first ones alone, with its share of `total`."""
    shown = [*counted.items()]
    if len(shown) > BARS_SHOWN:
        rest = shown[BARS_SHOWN - 1 :]
        shown = [*shown[: BARS_SHOWN - 1], (f"{len(rest)} others", sum(n for _, n in rest))]
    most = max(n for _, n in shown)
    return tuple(
        Share(name, f"{n:,} · {percent(n, total)}", 100 * n / most, tone) for name, n in shown
    )


def rules_section(report: CycleReport) -> Section | None:
    """List what the rules for groups did, each with its count (protocol §16)."""
    groups = report.rollouts.groups
    masked, hedged = groups.tokens_masked, f"{groups.hedges}, {groups.hedges_won} won"
    rows = {
        "groups marked": join_counts(groups.groups_by_mark),
        "groups dropped": join_counts(groups.dropped_groups),
        "groups sampled in their place": f"{groups.refilled_groups or ''}",
        "samples asked for again": join_counts(groups.asked_again),
        "samples hedged": hedged if groups.hedges else "",
        "requests cut off": f"{groups.cut_off or ''}",
        "samples of two versions": f"{groups.straddling_samples or ''}",
        "tokens masked out of the loss": f"{masked:,}" if masked else "",
    }
    rows = {name: value for name, value in rows.items() if value}
    if not rows:
        return None
    return Section("What the rules for groups did", "Nothing is skipped silently", rows=rows)
