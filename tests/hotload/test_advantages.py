"""Advantages against the formula of protocol §17, written with the standard library."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.advantages import advantages

REWARDS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16)


@given(REWARDS)
def test_the_formula(rewards: list[float]) -> None:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    divisor = 1.0 if std < 1e-8 else std + 1e-8
    expected = [(reward - mean) / divisor for reward in rewards]
    assert advantages(rewards) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(REWARDS, st.integers(0, 16))
def test_a_missing_reward_does_not_count(rewards: list[float], place: int) -> None:
    place = min(place, len(rewards))
    with_gap = advantages([*rewards[:place], None, *rewards[place:]])
    assert with_gap[place] is None
    assert [*with_gap[:place], *with_gap[place + 1 :]] == list(advantages(rewards))


def test_small_and_uniform_groups() -> None:
    assert advantages([]) == ()
    assert advantages([None]) == (None,)
    assert advantages([5.0]) == (0.0,)
    assert advantages([None, 5.0]) == (None, 0.0)
    assert advantages([2.0, 2.0, 2.0]) == (0.0, 0.0, 0.0)
    tiny = advantages([0.0, 1e-9])
    assert tiny == pytest.approx((-5e-10, 5e-10))  # std counts as 1


def test_large_rewards_stay_finite() -> None:
    centred = advantages([1e300, -1e300, 1e308])
    assert all(value is not None and math.isfinite(value) for value in centred)
