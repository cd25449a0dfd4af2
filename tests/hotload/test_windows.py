"""Learning rates, windows, and the cursor."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hotload.dataset.rollout_plan import plan_rollout
from hotload.rollout.trajectory import Problem
from hotload.training.schedule import LearningRate
from hotload.training.windows import Cursor, TrainingWindow, Windows
from tests.factories import cycle_spec

# Learning rates.


def test_the_schedules_by_hand() -> None:
    def rates(**fields: Any) -> list[float]:
        schedule = LearningRate(learning_rate=1.0, **fields)
        return [schedule.at(step, 6) for step in range(1, 7)]

    assert rates() == [1, 1, 1, 1, 1, 1]
    assert rates(warmup_steps=2) == [0.5, 1, 1, 1, 1, 1]
    assert rates(lr_scheduler="linear") == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates(lr_scheduler="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    # 0.9 of a step is one, and 2.1 are three.
    assert rates(warmup_ratio=0.15) == [1, 1, 1, 1, 1, 1]
    assert rates(warmup_ratio=0.35) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert LearningRate(learning_rate=1.0, warmup_ratio=0.07).at(7, 100) == 1
    half = [0.5 * (1 + math.cos(math.pi * part / 4)) for part in range(4)]
    for warm_up in ({"warmup_steps": 2}, {"warmup_ratio": 0.33}, {"warmup_ratio": 2 / 6}):
        assert rates(lr_scheduler="cosine", **warm_up) == pytest.approx([0.5, 1, *half])


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 30),
    st.integers(31, 200),
)
def test_no_step_has_a_rate_of_0_or_above_the_highest(kind: Any, warm_up: int, total: int) -> None:
    schedule = LearningRate(learning_rate=0.5, lr_scheduler=kind, warmup_steps=warm_up)
    rates = [schedule.at(step, total) for step in range(1, total + 1)]
    assert 0 < min(rates) <= max(rates) == 0.5
    assert rates[warm_up:] == sorted(rates[warm_up:], reverse=True)


def test_a_constant_rate_needs_no_total() -> None:
    schedule = LearningRate(learning_rate=1.0, warmup_steps=4)
    assert [schedule.at(step) for step in (1, 4, 10**6)] == [0.25, 1, 1]
    assert not schedule.needs_total


@pytest.mark.parametrize(
    ("fields", "step", "total", "found"),
    [
        ({}, 0, 5, "step 0: expected 1 to 5"),
        ({}, 0, None, "step 0: expected 1"),
        ({}, 6, 5, "step 6: expected 1 to 5"),
        ({"lr_scheduler": "linear"}, 1, None, "the run must know how many"),
        ({"warmup_ratio": 0.1}, 1, None, "the run must know how many"),
        ({"lr_scheduler": "cosine", "warmup_steps": 5}, 1, 5, "5 steps leaves none of 5"),
    ],
)
def test_a_step_that_cannot_be_is_refused(
    fields: Any, step: int, total: int | None, found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        LearningRate(**fields).at(step, total)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (LearningRate, {"learning_rate": 0}),
        (LearningRate, {"learning_rate": math.nan}),
        (LearningRate, {"lr_scheduler": "polynomial"}),
        (LearningRate, {"warmup_steps": 1, "warmup_ratio": 0.1}),
        (LearningRate, {"warmup_ratio": 1}),
        (Windows, {"epochs": 0}),
        (Windows, {"prompt_groups_per_step": 0}),
        (Windows, {"weight_sync_interval": -1}),
        (Windows, {"seed": -1}),
        (Cursor, {"epoch": -1}),
        (Cursor, {"done_before": 2, "done_beyond": (2,)}),
        (Cursor, {"done_beyond": (3, 3)}),
        (Cursor, {"done_beyond": (4, 3)}),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, fields: Any) -> None:
    with pytest.raises(ValidationError):
        kind(**fields)


# Windows.


def windows_of(problem_count: int, **fields: Any) -> list[TrainingWindow]:
    """All windows of a run that drops nothing."""
    declared, cursor = Windows(**fields), Cursor()
    windows = []
    while window := declared.next_window(cursor, problem_count):
        windows.append(window)
        cursor = cursor.in_epoch(window.epoch).done(window.positions)
        assert cursor.is_over(window)
    return windows


def spans(problem_count: int, **fields: Any) -> list[tuple[int, int, int]]:
    found = windows_of(problem_count, **fields)
    for each in found:
        assert each.positions == tuple(range(each.positions[0], each.positions[-1] + 1))
    return [(each.epoch, each.positions[0], each.positions[-1] + 1) for each in found]


def test_windows_end_with_their_epoch() -> None:
    found = spans(10, epochs=2, prompt_groups_per_step=2, weight_sync_interval=2)
    one = [(0, 4), (4, 8), (8, 10)]
    assert found == [(epoch, *span) for epoch in (0, 1) for span in one]
    assert spans(3, prompt_groups_per_step=1) == [(0, 0, 1), (0, 1, 2), (0, 2, 3)]
    # One row, windows of four: one window with one smaller step.
    assert spans(1, prompt_groups_per_step=4) == [(0, 0, 1)]


def test_at_interval_0_an_epoch_is_one_window() -> None:
    found = spans(5, epochs=3, prompt_groups_per_step=2, weight_sync_interval=0)
    assert found == [(0, 0, 5), (1, 0, 5), (2, 0, 5)]


def test_a_window_has_rows_in_reserve_and_leaves_out_those_that_were_used() -> None:
    pairs = Windows(prompt_groups_per_step=2)
    first = pairs.next_window(Cursor(), 12)
    assert first == TrainingWindow(0, (0, 1), (2, 3, 4, 5, 6, 7))
    # Problem 1 was dropped, and problem 2 took its place.
    cursor = Cursor().done((0, 2))
    assert not cursor.is_over(first)
    ended = cursor.done(first.positions)
    assert pairs.next_window(ended, 12) == TrainingWindow(0, (3, 4), (5, 6, 7, 8, 9, 10))
    assert pairs.next_window(ended.done((4, 6)), 8) == TrainingWindow(0, (3, 5), (7,))
    with pytest.raises(ValueError, match="whoever wrote the dataset must act"):
        pairs.next_window(Cursor(), 0)


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 50))
def test_a_cycle_takes_the_window_out_of_its_file_and_then_the_reserve(
    count: int, reserve_count: int, version: int
) -> None:
    window = TrainingWindow(0, tuple(range(count)), tuple(range(count, count + reserve_count)))
    rows = [Problem(str(place)) for place in window.rows(version)]
    changes = {
        "policy_version": version,
        "problems": {"dataset": "/d", "prompt_groups_per_step": count},
    }
    spec = cycle_spec(sampling={"groups": {"on_uniform": "refill"}}, **changes)
    (part,) = plan_rollout(spec, "run-000003-0123abcd", rows).parts
    assert [each.id for each in part.problems] == [str(place) for place in window.positions]
    assert [each.id for each in part.reserve] == [str(place) for place in window.reserve]


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 7), st.integers(0, 4))
def test_windows_cover_every_problem_of_every_epoch_once(
    problem_count: int, epochs: int, groups: int, interval: int
) -> None:
    fields = {
        "epochs": epochs,
        "prompt_groups_per_step": groups,
        "weight_sync_interval": interval,
    }
    windows = windows_of(problem_count, **fields)
    for epoch in range(epochs):
        places = [place for each in windows if each.epoch == epoch for place in each.positions]
        assert places == list(range(problem_count))
    steps = [-(-len(each.positions) // groups) for each in windows]
    assert not interval or max(steps) <= interval
    assert Windows(**fields).step_limit(problem_count) == sum(steps)


def test_the_order_of_an_epoch_is_the_same_in_every_process() -> None:
    fields = Windows(seed=7)
    orders = [fields.order(epoch, 12) for epoch in range(3)]
    assert len({*orders}) == 3
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert Windows(seed=8).order(0, 12) != orders[0]
    script = "from hotload.training.windows import Windows; print(Windows(seed=7).order(1, 12))"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == str(orders[1])
    # A change of this line would change every run that goes on.
    assert orders[1] == ORDER_OF_SEED_7
    assert Windows(shuffle=False).order(5, 4) == (0, 1, 2, 3)


ORDER_OF_SEED_7 = (3, 11, 4, 7, 0, 10, 1, 5, 2, 6, 9, 8)


# The cursor.


@given(st.integers(0, 20), st.lists(st.sets(st.integers(0, 30)), max_size=6))
def test_a_cursor_knows_what_is_done_in_any_order(before: int, steps: list[set[int]]) -> None:
    cursor, done = Cursor(done_before=before), set(range(before))
    for step in steps:
        cursor, done = cursor.done(step), done | step
    assert cursor.left_of(31) == tuple(place for place in range(31) if place not in done)
    assert Cursor.model_validate_json(cursor.model_dump_json()) == cursor


def test_a_cursor_at_the_end_of_its_epoch_goes_into_the_next() -> None:
    cursor = Cursor(epoch=1).done(range(5))
    here, over, next_one = (TrainingWindow(epoch, (0, 1, 4)) for epoch in (1, 0, 2))
    assert cursor.left_of(5) == ()
    assert cursor.is_over(here)
    assert Cursor(epoch=1, done_before=2).is_over(over)
    assert not Cursor(epoch=1, done_before=2, done_beyond=(3,)).is_over(here)
    assert not cursor.is_over(next_one)
    assert cursor.in_epoch(1) is cursor
    assert cursor.in_epoch(2) == Cursor(epoch=2)
    with pytest.raises(ValueError, match="epoch 0 is over"):
        cursor.in_epoch(0)


def test_windows_ahead_are_neighbours_and_stay_within_their_epoch() -> None:
    windows = Windows(epochs=2, prompt_groups_per_step=2)
    cursor, found = Cursor(), []
    for version, count in enumerate((4, 2, 3, 2, 2)):
        window = windows.window_ahead(cursor, 5, version, count)
        if window is None:
            break
        assert window.began.left_of(5)[: window.count] == window.positions
        found.append((window.epoch, window.positions))
        cursor = window.end
    assert found == [(0, (0, 1, 2, 3)), (0, (4,)), (1, (0, 1, 2)), (1, (3, 4))]
    # The sampler is as far ahead as it may be.
    assert windows.window_ahead(Cursor(), 5, 1, 0) is None
    with pytest.raises(ValueError, match="no problems"):
        windows.window_ahead(Cursor(), 0, 0, 2)
