"""Advantages against the formulas of protocol §17, written with the standard library."""

import math
import statistics
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.reward.advantages import AdvantageMethod, advantages

REWARDS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16)
METHODS = st.sampled_from(get_args(AdvantageMethod))


def grpo(rewards: list[float]) -> list[float]:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (1.0 if std < 1e-8 else std + 1e-8) for reward in rewards]


def mean_only(rewards: list[float]) -> list[float]:
    return [reward - statistics.fmean(rewards) for reward in rewards]


def leave_one_out(rewards: list[float]) -> list[float]:
    others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
    return [reward - statistics.fmean(rest) for reward, rest in zip(rewards, others, strict=True)]


FORMULAS = {"grpo": grpo, "mean_only": mean_only, "leave_one_out": leave_one_out}


@given(REWARDS, METHODS)
def test_the_formulas(rewards: list[float], method: AdvantageMethod) -> None:
    expected = FORMULAS[method](rewards)
    assert advantages(rewards, method) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "rewards", "expected"),
    [
        ("grpo", [1, 0, 1, 0], [0.8660254, -0.8660254, 0.8660254, -0.8660254]),
        ("mean_only", [1, 0, 1, 0], [0.5, -0.5, 0.5, -0.5]),
        ("leave_one_out", [1, 0, 1, 0], [2 / 3, -2 / 3, 2 / 3, -2 / 3]),
        ("leave_one_out", [3, 0], [3, -3]),
        ("mean_only", [1, None, 0], [0.5, None, -0.5]),
        ("leave_one_out", [1, None, 0], [1, None, -1]),
        ("leave_one_out", [None, 7], [None, 0]),
        ("mean_only", [7], [0]),
    ],
)
def test_small_groups(
    method: AdvantageMethod, rewards: list[float | None], expected: list[float | None]
) -> None:
    found = advantages(rewards, method)
    assert [each is None for each in found] == [each is None for each in expected]
    numbers = [each for each in expected if each is not None]
    assert [each for each in found if each is not None] == pytest.approx(numbers)


@given(REWARDS, st.integers(0, 16), METHODS)
def test_a_missing_reward_does_not_count(
    rewards: list[float], place: int, method: AdvantageMethod
) -> None:
    place = min(place, len(rewards))
    with_gap = advantages([*rewards[:place], None, *rewards[place:]], method)
    assert with_gap[place] is None
    assert [*with_gap[:place], *with_gap[place + 1 :]] == list(advantages(rewards, method))


@pytest.mark.parametrize("method", get_args(AdvantageMethod))
def test_empty_and_uniform_groups(method: AdvantageMethod) -> None:
    assert advantages([], method) == ()
    assert advantages([None], method) == (None,)
    assert advantages([5.0], method) == (0.0,)
    assert advantages([None, 5.0], method) == (None, 0.0)
    assert advantages([2.0, 2.0, 2.0], method) == (0.0, 0.0, 0.0)
    tiny = advantages([0.0, 1e-9])
    assert tiny == pytest.approx((-5e-10, 5e-10))  # std counts as 1


@pytest.mark.parametrize("method", get_args(AdvantageMethod))
def test_large_rewards_stay_finite(method: AdvantageMethod) -> None:
    centred = advantages([1e300, -1e300, 1e307], method)
    assert all(value is not None and math.isfinite(value) for value in centred)
