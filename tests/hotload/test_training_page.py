"""The page of a training run says what its steps say, and where the time went."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hotload.cli.wording import text_table
from hotload.report.training_page import TimeShares, render_training_page
from hotload.report.training_table import run_rows, step_line
from hotload.training.step_record import (
    ExportedCheckpoint,
    StepRecord,
)
from tests.factories import run_facts, step_record
from tests.hotload.test_page import EVIL
from tests.hotload.test_run_page import row

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SHA = "a" * 64


def at(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def record(step: int, trained_at: float | None, **figures: float) -> StepRecord:
    return step_record(
        step=step,
        parent_sha256=SHA if step > 1 else None,
        facts=run_facts(base_model=EVIL),
        state=None,
        checkpoint=ExportedCheckpoint(policy_version=step, content_sha256=SHA),
        sampled_version=step - 1,
        figures={"rollout/raw_reward": 0.25 * step, **figures},
        trained_at=None if trained_at is None else at(trained_at),
    )


def cycle(version: int, ended_at: float, **seconds: float) -> Any:
    given = {"publish_seconds": 1.0, "signal_seconds": 0.0, "converge_seconds": 0.0} | seconds
    return row(version, ended_at=at(ended_at), **given)


def test_every_second_of_a_run_is_counted_once() -> None:
    """Publish 1, sample 4, hand over 0.5, train 2, save 0.5, begin the next cycle 1."""
    took = {"perf/train_time": 2.0, "perf/save_time": 0.5}
    records = [record(1, 7.5, **took), record(2, 16.5, **took)]
    versions = [
        cycle(0, 5, rollout_seconds=4.0),
        cycle(1, 14, rollout_seconds=4.0),
    ]
    shares = TimeShares.of(records, versions)
    assert shares.seconds == {
        "sampling": 8.0,
        "training": 4.0,
        "saving and exporting weights": 1.0,
        "publishing weights": 2.0,
        "after sampling: hand groups over, report": 1.0,
        "after training: see whether a step follows": 0.0,
        "after saving: record, begin the next cycle": 1.0,
        "after publishing: begin to sample": 0.0,
    }
    assert (shares.wall_seconds, shares.orchestration_seconds) == (17.0, 2.0)


def test_a_step_beside_sampling_is_not_counted_twice() -> None:
    records = [record(1, 4, **{"perf/train_time": 2.0}), record(2, 9, **{"perf/train_time": 5.0})]
    shares = TimeShares.of(records, [cycle(0, 6, rollout_seconds=5.0)])
    assert shares.seconds["sampling"] == 5.0
    assert shares.seconds["training"] == 3.0
    assert shares.wall_seconds == 9.0


def test_a_run_that_says_no_times_has_no_shares() -> None:
    assert TimeShares.of([record(1, None)], []).wall_seconds == 0
    assert "Where the time went" in render_training_page([record(1, None)], [])


def test_the_page_says_what_the_steps_say() -> None:
    figures = {
        "train/inference_k3": 2e-5,
        "train/grad_norm": 1.5,
        "train/entropy": 0.7,
        "async/version_offset_max": 0.0,
    }
    page = render_training_page([record(1, 1, **figures), record(2, 2, **figures)], [])
    for said in ("After step <b>2</b>", "<b>version 2</b>", "0.250 at the first step", "2e-05"):
        assert said in page
    for heading in ("Reward", "Trainer against sampler", "Gradient norm", "Entropy", "Lag"):
        assert f'aria-label="{heading} by step"' in page
    assert EVIL not in page
    assert "<script" not in page


def test_the_steps_are_a_table_with_units_and_a_line_each() -> None:
    told = {"train/inference_k3": 1.2e-6, "train/entropy": 5.85, "perf/train_wait_time": 2.5}
    records = [record(1, 7.5, **told), record(2, 16.5)]
    assert step_line(records[0]).startswith("step 1: reward 0.250, k3 1.2e-06 nats, gradient")
    assert "trainer waited 2.50 s, sampler waited –, loss –" in step_line(records[0])
    head, first, second = text_table(*run_rows(records, [], {}, []))
    assert len(head) == len(first) == len(second)
    assert head.split("  ")[:1] == ["step"]
    at = head.index("entropy, nats") + len("entropy, nats")
    assert (first[:at].split()[-1], second[:at].split()[-1]) == ("5.85", "–")
