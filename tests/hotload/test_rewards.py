"""Import by name, and what a returned value means."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import wraps
from typing import Any

import numpy as np
import pytest

from hotload.errors import RewardError
from hotload.reward.built_ins import BUILT_INS
from hotload.reward.outcome import (
    Score,
    Unscored,
    as_number,
    check_arguments,
    is_async,
    load_reward,
    read_outcome,
    read_outcomes,
)
from hotload.rollout.failures import Cause


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "no such built-in; there are exact_match, .*, remote, weighted_sum"),
        ("nowhere_at_all:f", "ModuleNotFoundError"),
        ("math:nothing", "AttributeError"),
        ("math:pi", "expected a function"),
    ],
)
def test_what_cannot_be_used(name: str, reason: str) -> None:
    with pytest.raises(RewardError, match=reason):
        load_reward(name)


def test_arguments_that_do_not_fit() -> None:
    for name, reward in BUILT_INS.items():
        with pytest.raises(RewardError, match=r"unknown|missing a required argument"):
            check_arguments(name, reward, {"unknown": 1})
    with pytest.raises(RewardError, match="too many positional"):
        check_arguments("f", lambda trajectory: 1, {})
    with pytest.raises(RewardError, match="cannot use its arguments"):
        check_arguments("regex", BUILT_INS["regex"], {"pattern": "["})


def plain(problem: object, trajectory: object) -> float:
    return 1.0


async def later(problem: object, trajectory: object) -> float:
    return 1.0


class Later:
    async def __call__(self, problem: object, trajectory: object) -> float:
        return 1.0


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def around(*operands: Any) -> Any:
        return function(*operands)

    return around


def test_async_functions_are_known() -> None:
    assert all(is_async(reward) for reward in (later, Later(), decorated(later), Later().__call__))
    assert not any(is_async(reward) for reward in (plain, decorated(plain), float, math.dist))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.5, 0.5),
        (np.float32(2), 2.0),
        (np.array(3), 3.0),
        (Fraction(1, 4), 0.25),
        (-1e30, -1e30),
        (2e30, None),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (None, None),
        ("1", None),
        (b"1", None),
        ([1], None),
        (10**400, None),
        (object(), None),
        (1j, None),
    ],
)
def test_numbers(value: object, number: float | None) -> None:
    assert as_number(value) == number
    outcome = read_outcome(value)
    if number is None:
        assert isinstance(outcome, Unscored)
        assert outcome.cause is Cause.REWARD_NOT_A_NUMBER
    else:
        assert outcome == Score(number)


@pytest.mark.parametrize(
    ("value", "reward", "parts"),
    [
        ({"format": 1, "answer": 0.5}, 1.5, {"format": 1.0, "answer": 0.5}),
        ({"format": 1, "answer": 0.5, "reward": 0.25}, 0.25, {"format": 1.0, "answer": 0.5}),
        ({"reward": True}, 1.0, {}),
        ({"judge/tone v2": -1}, -1.0, {"judge/tone v2": -1.0}),
    ],
)
def test_named_parts(value: dict[str, Any], reward: float, parts: dict[str, float]) -> None:
    assert read_outcome(value) == Score(reward, parts)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "0 parts"),
        ({str(n): 1 for n in range(33)}, "33 parts"),
        ({"a": math.nan}, "part 'a' is the float nan"),
        ({"a": 1, "b": None}, "part 'b' is NoneType"),
        ({"a": {"b": 1}}, "part 'a' is dict"),
        ({1: 1}, "name"),
        ({"": 1}, "name"),
        ({"x" * 65: 1}, "name"),
        ({"a\nb": 1}, "name"),
        ({"\ud800": 1}, "name"),
        ({"a": 1e30, "b": 1e30}, "too large"),
        ({"a": 1, "reward": math.inf}, "part 'reward'"),
    ],
)
def test_parts_that_are_none(value: dict[Any, Any], reason: str) -> None:
    outcome = read_outcome(value)
    assert isinstance(outcome, Unscored)
    assert outcome.cause is Cause.REWARD_NOT_A_NUMBER
    assert reason in outcome.detail


@pytest.mark.parametrize(
    ("value", "rewards"),
    [
        ([1, 0], [1, 0]),
        ((1, None), [1, None]),
        (np.array([0.5, np.nan]), [0.5, None]),
        ([{"a": 1, "b": 1}, "1"], [2, None]),
        ([1], [None, None]),
        ([1, 2, 3], [None, None]),
        ([], [None, None]),
        (1.0, [None, None]),
        (None, [None, None]),
        ("12", [None, None]),
        ({"a": 1, "b": 2}, [None, None]),
        (np.array(1.0), [None, None]),
        ((n for n in range(2)), [None, None]),
    ],
)
def test_rewards_of_a_group(value: object, rewards: list[float | None]) -> None:
    outcomes = read_outcomes(value, 2)
    found = [each.reward if isinstance(each, Score) else None for each in outcomes]
    assert found == rewards
