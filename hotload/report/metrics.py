"""The numbers of a cycle under the names of protocol §19, and the forms they are written in.

What a cycle does not know (`train/*`, waiting times of the trainer) or did not do (publish a
version that was not due) is left out: a name that is there has a measured value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise

from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.report.cycle_report import CycleReport
from hotload.report.sample_statistics import SampleStatistics
from hotload.rollout.failures import is_recoverable
from hotload.rollout.group_rules import usable_count

PRODUCER_SECONDS = 10.0
PERCENTILES = (50, 90, 99)


def cycle_metrics(
    report: CycleReport,
    statistics: SampleStatistics | None,
    trained: TrainedAgainst | None = None,
) -> dict[str, float]:
    """Collect all numbers of an ended cycle: seconds, bytes, tokens, samples, nats; ratios in [0,
    1].

    Args:
        statistics: of its samples; `None` leaves out what rests on them.
        trained: what the trainer said of the samples it acknowledged last.
    """
    return {
        **_rollout(report),
        **(_samples(report, statistics) if statistics else {}),
        **_window(report),
        **_performance(report),
        **_publish(report),
        **(_trained(trained) if trained else {}),
    }


def _rollout(report: CycleReport) -> dict[str, float]:
    rollouts, did = report.rollouts, report.rollouts.groups
    found: dict[str, float | None] = {
        "raw_reward": _mean_of(did.raw_reward_sum, did.raw_reward_count),
        "raw_samples": did.raw_samples,
        "failed_samples": sum(rollouts.failed_samples.values()),
    }
    for cause, count in rollouts.failed_samples.items():
        found[f"failed_samples_{cause}"] = count
    return _named("rollout", found)


def _samples(report: CycleReport, statistics: SampleStatistics) -> dict[str, float]:
    counts, did = statistics.counts, report.rollouts.groups
    tokens, ahead = counts.trained_tokens, counts.versions_ahead
    found: dict[str, float | None] = {
        "filtered_reward": _mean_of(counts.trained_reward_sum, counts.trained_count),
        "filtered_samples": counts.trained_count,
        "reward_std": counts.rewards.std,
        "filter_ratio": _mean_of(counts.trained_count, did.raw_samples),
        "entropy": statistics.entropy_nats,
        "uniform_group_ratio": _mean_of(*statistics.uniform_groups(did)),
        "cached_prompt_ratio": _mean_of(
            counts.cached_prompt_token_count, counts.prompt_token_count
        ),
        "trainable_tokens_total": tokens.value_sum if tokens.count else None,
        "trainable_tokens_mean": tokens.mean,
        "trainable_tokens_max": tokens.greatest,
        "trainable_tokens_min": tokens.least,
    }
    for percent in PERCENTILES:
        found[f"latency_s_p{percent}"] = statistics.latency_percentile(percent)
    offsets = {
        "version_offset_mean": ahead.mean,
        "version_offset_max": ahead.greatest,
        "version_offset_min": ahead.least,
    }
    return {**_named("rollout", found), **_named("async", offsets)}


def _window(report: CycleReport) -> dict[str, float]:
    found: dict[str, float | None] = {}
    if means := _time_means(report.rollouts.window_trace):
        found["in_flight_samples_mean"], found["concurrency_capacity_samples_mean"] = means
    return _named("async", found)


def _performance(report: CycleReport) -> dict[str, float]:
    rollouts, took = report.rollouts, report.seconds_by_stage
    found = {
        "step_time": report.seconds,
        "rollout_batch_wall_time": rollouts.seconds,
        "step_samples_per_s": rollouts.samples_per_second,
        "step_tokens_per_s": rollouts.tokens_per_second,
        "weight_update_time": _sum_of(took, "publish", "signal"),
        "weight_sync_time": took.get("converge"),
    }
    if report.is_published:
        sent, whole = report.snapshot.size_bytes, report.snapshot.content_size_bytes
        found |= {"update_weights_density": _mean_of(sent, whole)}
        found |= {"update_weights_wire_bytes": sent}
        found |= {"update_weights_egress_bytes": report.snapshot.egress_bytes}
        found |= {"update_weights_money": report.money}
    return _named("perf", found)


def _publish(report: CycleReport) -> dict[str, float]:
    took = report.seconds_by_stage
    return _named(
        "publish",
        {
            "save_time_s": took.get("publish"),
            "hotload_time_s": _sum_of(took, "signal", "converge"),
            "total_time_s": _sum_of(took, "publish", "signal", "converge"),
            "encode_s": took.get("encode"),
            "upload_s": took.get("upload"),
            "signal_s": took.get("signal"),
            "converge_s": took.get("converge"),
            "hint_count": report.snapshot.hint_count if report.is_published else None,
        },
    )


def _trained(trained: TrainedAgainst) -> dict[str, float]:
    drift = trained.drift
    found: dict[str, float | None] = {
        "k1": drift.k1,
        "k3": drift.k3,
        "mean_abs": drift.mean_abs,
        "max_abs": drift.max_abs,
        "tokens": drift.token_count,
    }
    return {
        "async/trained_against_version": trained.policy_version,
        **_named("rollout", {f"trainer_drift_{name}": value for name, value in found.items()}),
    }


def producer_metrics(report: CycleReport) -> list[tuple[float, dict[str, float]]]:
    """Say how the sampling went, at most every 10 s: (seconds since it began, numbers), and one
    last with the totals.
    """
    rollouts, did = report.rollouts, report.rollouts.groups
    version = report.snapshot.policy_version
    lines = []
    last = -PRODUCER_SECONDS
    for at, size, in_use in rollouts.window_trace:
        if at - last >= PRODUCER_SECONDS:
            last = at
            found = {
                "elapsed_time_s": at,
                "published_version": version,
                "in_flight_samples": in_use,
                "concurrency_capacity_samples": max(size - in_use, 0),
            }
            lines.append((at, _named("producer", found)))
    totals = {
        "elapsed_time_s": rollouts.seconds,
        "published_version": version,
        "in_flight_samples": 0,
        "rows_accepted_total": usable_count(rollouts),
        "rows_dropped_total": sum(did.dropped_groups.values()),
        "rows_refilled_total": did.refilled_groups,
        "recoverable_errors_total": sum(
            count for met, count in did.failed_attempts.items() if is_recoverable(met)
        ),
        "trajectory_drops_total": sum(rollouts.failed_samples.values()),
    }
    return [*lines, (rollouts.seconds, _named("producer", totals))]


def json_lines(
    report: CycleReport, metrics: Mapping[str, float], *, rollouts_ended_at: datetime
) -> bytes:
    """Write one JSON object a line, each with its moment, run, version and identity: the producer's
    first and the cycle's own last.
    """
    facts = {
        "run_id": report.run_id,
        "policy_version": report.policy_version,
        "line": report.line,
        "identity": report.snapshot.identity,
    }
    began_at = rollouts_ended_at - timedelta(seconds=report.rollouts.seconds)
    lines = [
        {"at": (began_at + timedelta(seconds=at)).isoformat(), **facts, **numbers}
        for at, numbers in producer_metrics(report)
    ]
    lines.append({"at": rollouts_ended_at.isoformat(), **facts, **metrics})
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def prometheus_text(metrics: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Write the metrics as gauges in Prometheus' text format: `rollout/raw_reward` becomes
    `hotload_rollout_raw_reward`.
    """
    label_text = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    lines = []
    for name in sorted(metrics):
        gauge = "hotload_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        lines += [f"# TYPE {gauge} gauge", f"{gauge}{{{label_text}}} {metrics[name]!r}"]
    return "\n".join([*lines, ""])


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _named(group: str, found: Mapping[str, float | None]) -> dict[str, float]:
    """What is known and a number, under the group's name."""
    return {
        f"{group}/{name}": value
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


def _mean_of(total: float, count: float) -> float | None:
    return total / count if count else None


def _sum_of(took: Mapping[str, float], *stages: str) -> float | None:
    """Seconds of these stages; `None` where one of them did not happen."""
    spent = [took[stage] for stage in stages if stage in took]
    return sum(spent) if len(spent) == len(stages) else None


def _time_means(trace: Sequence[tuple[float, int, int]]) -> tuple[float, float] | None:
    """Means over time of the slots in use and of those that were free; `None` without a span of
    time.
    """
    if len(trace) < 2 or trace[-1][0] <= trace[0][0]:
        return None
    spans = [(after[0] - before[0], before) for before, after in pairwise(trace)]
    total = trace[-1][0] - trace[0][0]
    in_use = sum(span * used for span, (_, _, used) in spans) / total
    free = sum(span * max(size - used, 0) for span, (_, size, used) in spans) / total
    return in_use, free
