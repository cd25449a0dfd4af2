"""Advantages by turn: the golden numbers, a loop by hand, and what is refused."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hotload.training.turn_advantages import TurnAdvantages, spread_over_tokens


def test_the_golden_case() -> None:
    first, second = TurnAdvantages().of_group([[0.2, -0.1, 0.0], [0.5, 0.0]], [1.0, 0.0])
    assert first == pytest.approx([-0.281256, -0.164094, 1.438046], abs=1e-6)
    assert second == pytest.approx([0.270656, -1.061948], abs=1e-6)


def test_a_gain_is_what_a_turn_adds_to_the_answers_probability() -> None:
    scored = [[-2.0, -1.0], [-1.0, -1.0], [-0.5, -0.1]]
    after = [math.exp(-1.5), math.exp(-1.0), math.exp(-0.3)]
    expected = [after[1] - after[0], after[2] - after[1], 0]
    assert TurnAdvantages().gains(scored) == pytest.approx(expected)
    assert TurnAdvantages(gain="mean_logprob").gains(scored) == pytest.approx([0.5, 0.7, 0])
    assert TurnAdvantages().gains([[-1.0]]).tolist() == [0]


def by_hand(
    gains: list[list[float]], rewards: list[float], gamma: float, weight: float
) -> list[list[float]]:
    outcomes = [[0.0] * (len(g) - 1) + [r] for g, r in zip(gains, rewards, strict=True)]

    def normal(values: list[list[float]]) -> list[list[float]]:
        flat = [value for each in values for value in each]
        std = statistics.pstdev(flat)
        mean = statistics.fmean(flat)
        return [[0.0 if std < 1e-6 else (v - mean) / (std + 1e-6) for v in each] for each in values]

    found = []
    for gain, outcome in zip(normal(gains), normal(outcomes), strict=True):
        later, sample = 0.0, []
        for g, o in reversed(list(zip(gain, outcome, strict=True))):
            later = weight * g + o + gamma * later
            sample.append(later)
        found.append(sample[::-1])
    return found


NUMBERS = st.integers(-100, 100).map(lambda number: number / 64)


@given(
    st.lists(st.tuples(st.lists(NUMBERS, min_size=1, max_size=4), NUMBERS), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0.1, 2),
)
def test_ragged_groups_are_a_loop_by_hand(
    samples: list[tuple[list[float], float]], gamma: float, weight: float
) -> None:
    gains, rewards = [list(each) for each in zip(*samples, strict=True)]
    found = TurnAdvantages(gamma=gamma, gain_weight=weight).of_group(gains, rewards)
    for one, other in zip(found, by_hand(gains, rewards, gamma, weight), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)


def test_a_sample_without_a_reward_counts_nowhere() -> None:
    gains, rewards = [[0.2, 0.0], [9.0], [0.1]], [1.0, None, 0.0]
    found = TurnAdvantages().of_group(gains, rewards)
    assert found[1] is None
    without = TurnAdvantages().of_group([gains[0], gains[2]], [1.0, 0.0])
    assert [each.tolist() for each in (found[0], found[2])] == [each.tolist() for each in without]  # type: ignore[union-attr]
    assert TurnAdvantages().of_group([[0.1]], [None]) == (None,)
    assert TurnAdvantages().of_group([], []) == ()


def test_equal_turns_teach_nothing() -> None:
    (found,) = TurnAdvantages().of_group([[0.0]], [1.0])
    assert found == [0]
    nearly = TurnAdvantages().of_group([[1e-7], [0.0]], [1.0, 1.0])
    assert [each.tolist() for each in nearly] == [[0], [0]]  # type: ignore[union-attr]


def test_every_token_has_its_turns_advantage() -> None:
    assert spread_over_tokens([1, -2, 3], [2, 0, 1]).tolist() == [1, 1, 3]
    assert spread_over_tokens([], []).tolist() == []
    with pytest.raises(ValueError, match="2 advantages and 1 turn lengths"):
        spread_over_tokens([1, 2], [3])
    with pytest.raises(ValueError, match="turn lengths"):
        spread_over_tokens([1, 2], [3, -1])


@pytest.mark.parametrize(
    ("gains", "rewards", "found"),
    [
        ([[0.1]], [1, 2], "gains of 1 samples, 2 rewards"),
        ([[0.1, math.nan]], [1], "the reward must be mended"),
        ([[0.1]], [math.inf], "the reward must be mended"),
        ([[]], [1], "at least one turn"),
        ([0.5], [1], "at least one turn"),
    ],
)
def test_gains_and_rewards_that_cannot_be_are_refused(gains: Any, rewards: Any, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        TurnAdvantages().of_group(gains, rewards)


@pytest.mark.parametrize("scored", [[], [[]], [[-1.0], [-1.0, -2.0]], [[-1.0], [math.nan]], [-1.0]])
def test_scores_that_cannot_be_are_refused(scored: Any) -> None:
    with pytest.raises(ValueError, match="answer_logprobs"):
        TurnAdvantages().gains(scored)


@pytest.mark.parametrize(
    "fields",
    [
        {"gamma": 1.1},
        {"gamma": math.nan},
        {"gain_weight": -1},
        {"gain": "entropy"},
        {"gain": "probability", "gain_weight": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(fields: Any) -> None:
    with pytest.raises(ValidationError):
        TurnAdvantages(**fields)


def test_of_nothing_but_outcomes() -> None:
    found = TurnAdvantages(gain_weight=0, gamma=1).of_group([[0.9, 0.0], [0.0, 0.0]], [1.0, 0.0])
    assert np.concatenate(found) == pytest.approx(  # type: ignore[arg-type]
        np.concatenate(by_hand([[0, 0], [0, 0]], [1.0, 0.0], 1.0, 1.0))
    )
