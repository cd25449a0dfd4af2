"""The sections of the cycle report: each a heading, a line on what is seen, and a drawing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

import numpy as np

from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.identity import SnapshotKind
from hotload.quantities import duration, number, percent, plural, size
from hotload.report.charts import Bar, bars, columns, histogram, stack, steps, timeline
from hotload.report.cycle_report import CycleReport
from hotload.report.markup import safe
from hotload.report.sample_statistics import SampleStatistics
from hotload.rollout.counts import in_words, join_counts

TONES = ("main", "second", "third", "fourth", "fifth")
DISTINCT_REWARDS = 12
CAUSES_SHOWN = 10


def section(heading: str, why: str, body: str) -> str:
    """A part of the page under its heading, with a line that says what is seen."""
    return f'<section><h2>{safe(heading)}</h2><p class="why">{safe(why)}</p>{body}</section>'


def nothing(said: str) -> str:
    """What stands where there is nothing to draw."""
    return f'<p class="none">{safe(said)}</p>'


def known(value: float | None) -> str:
    """The number, or a dash where there is none."""
    return "–" if value is None else number(value)


def table(rows: Mapping[str, str]) -> str:
    """Names and values."""
    cells = "".join(
        f"<tr><td>{safe(name)}</td><td>{safe(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def timeline_section(
    report: CycleReport, ended_at: datetime, rollouts_ended_at: datetime | None
) -> str:
    """Stages on the time axis of the cycle."""
    took = report.seconds_by_stage
    began_at = ended_at - timedelta(seconds=report.seconds)
    heading, why = "Where the time went", f"{duration(report.seconds)} from start to end"
    rows = []
    published_at = report.snapshot.began_at if report.is_published else None
    if published_at is not None and published_at >= began_at:
        at = (published_at - began_at).total_seconds()
        first = "check, plan, first attempt" if report.fallback_reason else "check and plan"
        rows.append(Bar(first, 0, at, duration(at), "fifth"))
        for stage, label in (("publish", "encode and upload"), ("signal", "signal")):
            rows.append(Bar(label, at, at + took.get(stage, 0), duration(took.get(stage, 0))))
            at += took.get(stage, 0)
        spent = took.get("converge", 0)
        rows.append(Bar("replicas converge", at, at + spent, duration(spent), "second"))
    spent = report.rollouts.seconds
    if rollouts_ended_at is not None and rollouts_ended_at > began_at:
        end = min((rollouts_ended_at - began_at).total_seconds(), report.seconds)
        rows.append(Bar("roll out and score", max(end - spent, 0), end, duration(spent), "third"))
    if not rows:
        return section(heading, why, nothing("The stages ran in an earlier run of this cycle."))
    work = {stage: took[stage] for stage in ("encode", "verify", "upload") if took.get(stage)}
    note = ""
    if work:
        told = ", ".join(f"{stage} {duration(spent)}" for stage, spent in work.items())
        note = f'<p class="foot">Summed over shards, which overlap: {told}.</p>'
    return section(heading, why, timeline(rows, report.seconds, duration) + note)


def bytes_section(report: CycleReport) -> str:
    """What was sent beside what the checkpoint holds."""
    snapshot = report.snapshot
    if not report.is_published:
        return section("Bytes", snapshot.reason, nothing("This version was not sent."))
    rows = [
        Bar(name, 0, sent, size(sent), tone)
        for name, sent, tone in (
            ("checkpoint", snapshot.content_size_bytes, "fifth"),
            ("sent", snapshot.size_bytes, "main"),
        )
    ]
    why = f"{snapshot.kind.value}: {snapshot.reason}"
    body = bars(rows, "Bytes of the checkpoint and bytes sent")
    if (count := snapshot.replica_count) > 1 and snapshot.size_bytes:
        fetched, whole = (
            size(count * snapshot.size_bytes),
            size(count * snapshot.content_size_bytes),
        )
        instead = f" instead of {whole}" if snapshot.kind is SnapshotKind.DELTA else ""
        body += f'<p class="foot">Fetched by {count} replicas: {fetched}{instead}.</p>'
    return section("Bytes", why, body)


def convergence_section(report: CycleReport) -> str:
    """Replicas that serve the snapshot, over time."""
    snapshot = report.snapshot
    spent = snapshot.seconds_by_stage.get("converge", 0.0)
    heading = "Replicas converge"
    if not snapshot.convergence or not report.is_published:
        return section(heading, "", nothing("They served this snapshot before."))
    why = (
        f"Replicas that serve exactly this snapshot, since the signal; all after {duration(spent)}"
    )
    drawn = steps(
        [(snapshot.convergence, "wash-area"), (snapshot.convergence, "main-line")],
        1.08 * max(spent, snapshot.convergence[-1][0]),  # the last step stays to be seen
        max(snapshot.replica_count, *(count for _, count in snapshot.convergence), 1),
        "Replicas that serve the snapshot, over time",
        duration,
        height=150,
    )
    return section(heading, why, drawn)


def window_section(report: CycleReport) -> str:
    """The window and the requests in flight, over time."""
    trace = report.rollouts.window_trace
    heading = "Requests in flight"
    if not trace:
        return section(heading, "", nothing("The window was not recorded."))
    sizes = [(at, size) for at, size, _ in trace]
    used = [(at, in_use) for at, _, in_use in trace]
    highest = max(max(size, in_use) for _, size, in_use in trace)
    why = f"The window the service allows, at most {max(size for _, size in sizes)}, and its use"
    drawn = steps(
        [(used, "wash-area"), (sizes, "main-line")],
        max(report.rollouts.seconds, trace[-1][0]),
        highest * 1.08,
        "Window and requests in flight over time",
        duration,
    )
    key = _inline_key((("main", "window"), ("wash", "in flight")))
    return section(heading, why, drawn + key)


def _inline_key(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{tone}"></i>{safe(said)}</li>' for tone, said in entries)
    return f'<ul class="inline-key">{items}</ul>'


def throughput_section(report: CycleReport, statistics: SampleStatistics | None) -> str:
    """Rates and sizes."""
    seconds, rollouts = report.rollouts.seconds, report.rollouts
    attempts, samples = rollouts.groups.attempts, rollouts.groups.raw_samples
    rows = {
        "samples per second": known(rollouts.samples_per_second),
        "completion tokens per second": known(rollouts.tokens_per_second),
        "completion tokens": f"{rollouts.completion_token_count:,}",
        "requests per sample": number(attempts / samples) if samples else "–",
    }
    if statistics is not None:
        found, entropy = statistics.counts, statistics.entropy_nats
        rows["prompt tokens from the cache"] = percent(
            found.cached_prompt_token_count, found.prompt_token_count
        )
        rows["entropy per token"] = "–" if entropy is None else f"{number(entropy)} nats"
        if (most := found.turns.greatest or 0) > 1:
            turns = f"{known(found.turns.mean)} and {most:.0f}"
            rows["turns per sample, mean and most"] = turns
    why = f"Over {duration(seconds)} of sampling and scoring"
    if earlier := rollouts.found_sample_count:
        why += f"; {plural(earlier, 'sample')} of an earlier run are not in the rates"
    return section("Throughput", why, table(rows))


def latency_section(statistics: SampleStatistics) -> str:
    """Seconds per sample, with percentiles."""
    taken = statistics.counts.latency_seconds.values
    heading = "Latency of a sample"
    if not taken:
        return section(heading, "", nothing("No answered sample was handed back."))
    p50, p90, p99 = (float(each) for each in np.percentile(taken, (50, 90, 99)))
    longest = taken[-1]
    # A few stragglers must not squeeze all others into one bin.
    high = longest if longest <= 2 * p99 else p99 * 1.25
    inside = [each for each in taken if each <= high]
    counts, edges = np.histogram(inside, bins=28, range=(0, high or 1))
    drawn = histogram(
        edges.tolist(),
        counts.tolist(),
        "Latency of samples",
        duration,
        marks=[
            (p50, f"median {duration(p50)}"),
            (p90, f"90 % {duration(p90)}"),
            (p99, f"99 % {duration(p99)}"),
        ],
        height=180,
    )
    left = len(taken) - len(inside)
    rest = f"; {plural(left, 'sample')} beyond the picture" if left else ""
    why = f"First attempt to end, waits included; the longest took {duration(longest)}{rest}"
    return section(heading, why, drawn)


def lengths_section(statistics: SampleStatistics) -> str:
    """Completion tokens per sample."""
    lengths = statistics.counts.completion_tokens.values
    heading = "Tokens of a sample"
    if not lengths:
        return section(heading, "", nothing("No answered sample was handed back."))
    cut = statistics.counts.length_limited_count
    why = f"Completion tokens of all turns; {percent(cut, len(lengths))} ended at the limit"
    median, longest = float(np.median(lengths)), int(lengths[-1])
    found, edges = np.histogram(lengths, bins=min(28, longest), range=(0, longest))
    drawn = histogram(
        edges.tolist(),
        found.tolist(),
        "Samples by completion tokens",
        number,
        marks=[(median, f"median {number(median)}")],
        height=180,
    )
    return section(heading, why, drawn)


def rewards_section(report: CycleReport, statistics: SampleStatistics) -> str:
    """The distribution of rewards."""
    rewards = statistics.counts.rewards
    heading = "Rewards"
    if not rewards.count:
        return section(heading, "", nothing("No sample with a reward was handed back."))
    uniform = percent(*statistics.uniform_groups(report.rollouts.groups))
    why = f"{plural(rewards.count, 'sample')}; in {uniform} of the groups all are equal"
    distinct = rewards.by_value
    if len(distinct) <= DISTINCT_REWARDS:
        drawn = columns(
            [Bar(f"{value:.3g}", 0, distinct[value], f"{distinct[value]:,}") for value in distinct],
            "Samples by reward",
        )
        return section(heading, why, drawn)
    found, edges = np.histogram(rewards.values, bins=28)
    mean = rewards.value_sum / rewards.count
    drawn = histogram(
        edges.tolist(),
        found.tolist(),
        "Samples by reward",
        number,
        marks=[(mean, f"mean {number(mean)}")],
    )
    return section(heading, why, drawn)


def versions_section(report: CycleReport) -> str:
    """Samples by the weights that made them."""
    heading, why = "Weights behind the samples", "As each answer named them itself"
    counted = [*report.rollouts.samples_by_identity.items()]
    if not counted:
        return section(heading, why, nothing("No answered sample was handed back."))
    if len(counted) > len(TONES):
        rest = counted[len(TONES) - 1 :]
        counted = [*counted[: len(TONES) - 1], (f"{len(rest)} others", sum(n for _, n in rest))]
    total = sum(count for _, count in counted)
    parts = [
        Bar(name, 0, count, percent(count, total), tone)
        for (name, count), tone in zip(counted, TONES, strict=False)
    ]
    key = "".join(
        f'<li><i class="{part.tone}"></i><span class="what">{safe(part.label)}</span>'
        f'<span class="much">{part.end:,.0f} · {safe(part.told)}</span></li>'
        for part in parts
    )
    drawn = stack(parts, "Samples by the weights that made them")
    return section(heading, why, f'{drawn}<ul class="key">{key}</ul>')


def drift_section(trained: TrainedAgainst | None) -> str:
    """The trainer's log-probabilities against the sampler's; nothing where it gave none."""
    if trained is None:
        return ""
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
    why = "Log-probabilities of the same tokens, on what the trainer acknowledged last: "
    note = (
        "d is the trainer's log-probability of a token less the sampler's. k1, the mean of −d, and "
        "k3, the mean of exp(d) − 1 − d, both estimate the divergence of the trainer's policy from "
        "the one that sampled: 0 nats where they are the same."
    )
    return section(
        "Trainer against sampler",
        f"{why}samples of version {trained.policy_version}",
        f'{table(rows)}<p class="foot">{safe(note)}</p>',
    )


def failures_section(report: CycleReport) -> str:
    """Samples that failed, by cause, and requests that did, by what they met."""
    heading, why = "Samples without a reward", "By cause, with the share of all samples"
    rollouts = report.rollouts
    causes = {cause.replace("_", " "): count for cause, count in rollouts.failed_samples.items()}
    if causes:
        body = _failures(causes, rollouts.sample_count, "Failures", "warn-fill")
    else:
        told = "Every sample has a reward." if rollouts.sample_count else "No sample is there."
        why, body = "By cause", nothing(told)
    did = rollouts.groups
    if met := in_words(did.failed_attempts):
        sent = plural(did.attempts, "request")
        told = f"Requests that met these were sent again or given up; share of {sent}"
        body += f'<p class="foot">{safe(told)}</p>'
        body += _failures(met, did.attempts, "Requests without an answer", "fifth")
    return section(heading, why, body)


def _failures(counted: Mapping[str, int], total: int, label: str, tone: str) -> str:
    """What there is most of, each with its share of `total`."""
    found = [*counted.items()]
    if len(found) > CAUSES_SHOWN:
        rest = found[CAUSES_SHOWN - 1 :]
        found = [*found[: CAUSES_SHOWN - 1], ("other causes", sum(n for _, n in rest))]
    rows = [
        Bar(name, 0, count, f"{count:,} · {percent(count, total)}", tone) for name, count in found
    ]
    return bars(rows, label)


def rules_section(report: CycleReport) -> str:
    """What the rules for groups did, each with its count (protocol §16)."""
    did = report.rollouts.groups
    rows = {
        "groups marked": join_counts(did.groups_by_mark),
        "groups dropped": join_counts(did.dropped_groups),
        "groups sampled in their place": f"{did.refilled_groups or ''}",
        "samples asked for again": join_counts(did.asked_again),
        "samples hedged": f"{did.hedges}, {did.hedges_won} won" if did.hedges else "",
        "requests cut off": f"{did.cut_off or ''}",
        "samples of two versions": f"{did.straddling_samples or ''}",
        "tokens masked out of the loss": f"{did.tokens_masked:,}" if did.tokens_masked else "",
    }
    found = {name: value for name, value in rows.items() if value}
    body = table(found) if found else nothing("No group needed one: all are complete.")
    return section("What the rules for groups did", "Nothing is skipped silently", body)
