"""Renders the page of a training run: what its steps learnt, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from hotload.quantities import duration, number, percent, plural
from hotload.report.chart_shapes import Line, curves, layers
from hotload.report.page_parts import Fact, Section, Share
from hotload.report.run_history import RunVersion
from hotload.report.templating import render
from hotload.training.step_record import StepRecord

SAMPLING, TRAINING = "sampling", "training"
SAVING, PUBLISHING = "saving and exporting weights", "publishing weights"
AFTER = {
    SAMPLING: "after sampling: hand groups over, report",
    TRAINING: "after training: see whether a step follows",
    SAVING: "after saving: record, begin the next cycle",
    PUBLISHING: "after publishing: begin to sample",
}
TONES = {SAMPLING: "third", TRAINING: "main", SAVING: "second", PUBLISHING: "fourth"}

Span = tuple[datetime, datetime, str]


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Where the wall time of a training run went, from its first publication to its last step."""

    seconds: dict[str, float]
    """By what was done, or by what had been done last where nothing of it was. Of two at once the
    one that began first counts."""

    @classmethod
    def of(cls, records: Sequence[StepRecord], versions: Sequence[RunVersion]) -> TimeShares:
        """Lay the spans of steps and cycles side by side."""
        spans = sorted((*_cycles(versions), *_steps(records)))
        seconds = dict.fromkeys((*AFTER, *AFTER.values()), 0.0)
        if not spans:
            return cls(seconds)
        reached, last = spans[0][0], SAMPLING
        for begin, end, what in spans:
            if begin > reached:
                seconds[AFTER[last]] += (begin - reached).total_seconds()
                reached = begin
            if end > reached:
                seconds[what] += (end - reached).total_seconds()
                reached, last = end, what
        return cls(seconds)

    @property
    def wall_seconds(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def orchestration_seconds(self) -> float:
        """What is neither sampling nor training nor moving weights."""
        return sum(self.seconds[after] for after in AFTER.values())


def render_training_page(records: Sequence[StepRecord], versions: Sequence[RunVersion]) -> str:
    """Render the page of a training run, as the text of an HTML file.

    Args:
        records: its steps, at least one.
        versions: the rows of its cycles that have ended.
    """
    shares = TimeShares.of(records, versions)
    exported = sum(record.checkpoint is not None for record in records)
    records = [record for record in records if record.groups]  # one that closes the run has none
    last = records[-1]
    sections = [
        _curve(records, "Reward", "Mean of all samples of the window", "rollout/raw_reward"),
        _curve(
            records,
            "Trainer against sampler",
            "k3 of the samples' log-probabilities before the step, in nats a token",
            "train/inference_k3",
            "second",
        ),
        _curve(records, "Gradient norm", "Divided, before it is clipped", "train/grad_norm"),
        _curve(
            records,
            "Entropy",
            "Mean of −log-probability of the sampled tokens, in nats",
            "train/entropy",
            "third",
        ),
        _curve(
            records,
            "Lag",
            "Optimizer steps that the trainer was ahead of what was sampled",
            "async/version_offset_max",
            "fourth",
        ),
        _waits(records),
    ]
    return render(
        "training.html.jinja",
        run_id=last.run_id,
        last=last,
        facts=_facts(records, exported, shares),
        sections=[section for section in sections if section],
        time=_time(shares),
    )


def _facts(records: Sequence[StepRecord], exported: int, shares: TimeShares) -> list[Fact]:
    first, last = records[0], records[-1]
    reward = "rollout/raw_reward"
    return [
        Fact("steps", f"{len(records):,}", f"{plural(exported, 'version')} exported"),
        Fact("mean reward", _figure(last, reward), f"{_figure(first, reward)} at the first step"),
        Fact("k3", f"{_figure(last, 'train/inference_k3')} nats", "trainer against sampler"),
        Fact("gradient norm", _figure(last, "train/grad_norm"), "before it is clipped"),
        Fact("wall time", duration(shares.wall_seconds)),
        Fact(
            "orchestration",
            percent(shares.orchestration_seconds, shares.wall_seconds),
            "neither sampling, training nor moving weights",
        ),
    ]


def _figure(record: StepRecord, key: str) -> str:
    return number(record.figures[key]) if key in record.figures else "–"


def _curve(
    records: Sequence[StepRecord], heading: str, why: str, key: str, tone: str = "main"
) -> Section | None:
    values = [record.figures.get(key) for record in records]
    if not any(value is not None for value in values):
        return None
    label = f"{heading} by step"
    return Section(heading, why, curves(_numbers(records), [Line(values, tone)], label, number))


def _waits(records: Sequence[StepRecord]) -> Section:
    waits = {"main": "perf/train_wait_time", "third": "perf/sampler_wait_time"}
    values = {
        tone: [record.figures.get(key, 0.0) for record in records] for tone, key in waits.items()
    }
    return Section(
        "Waits",
        "Seconds that one waited for the other before a step",
        layers(_numbers(records), values, "Seconds waited by step", duration),
        legend=(("main", "trainer for samples"), ("third", "sampler for weights")),
    )


def _time(shares: TimeShares) -> Section:
    wall = shares.wall_seconds
    return Section(
        "Where the time went",
        "Of the run's wall time; a step that is made while samples are taken counts as sampling",
        shares=tuple(
            Share(
                name,
                f"{duration(seconds)}, {percent(seconds, wall)}",
                100 * seconds / wall if wall else 0,
                TONES.get(name, "fifth"),
            )
            for name, seconds in shares.seconds.items()
        ),
    )


def _numbers(records: Sequence[StepRecord]) -> list[int]:
    return [record.step for record in records]


def _cycles(versions: Sequence[RunVersion]) -> Iterator[Span]:
    for row in versions:
        if row.ended_at is None:
            continue
        sampled = row.ended_at - timedelta(seconds=row.rollout_seconds)
        moved = row.publish_seconds + row.signal_seconds + row.converge_seconds
        yield sampled - timedelta(seconds=moved), sampled, PUBLISHING
        yield sampled, row.ended_at, SAMPLING


def _steps(records: Sequence[StepRecord]) -> Iterator[Span]:
    for record in records:
        if record.trained_at is None:
            continue
        took, saved = (
            timedelta(seconds=record.figures.get(key, 0.0))
            for key in ("perf/train_time", "perf/save_time")
        )
        yield record.trained_at - took, record.trained_at, TRAINING
        yield record.trained_at, record.trained_at + saved, SAVING
