"""Find a reward by its name, check its arguments, and read the value it returns.

`def reward(problem, trajectory, **arguments)`, or `async def`, returns a number, or a mapping of
named parts. Declared `per_group`, it is called with (problem, trajectories) and returns a list of
such values, one per trajectory.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import JsonValue

from hotload.errors import RewardError
from hotload.reward.built_ins import BUILT_INS, check_built_in
from hotload.rollout.failures import Cause

RewardFunction = Callable[..., object]
REWARD_LIMIT = 1e30
"""Largest magnitude of a reward; sums of such stay finite in a trainer's float32."""
PART_COUNT_LIMIT = 32
PART_NAME = re.compile(r"[\w .:/-]{1,64}")
TOTAL = "reward"
REMOTE = "remote"
WEIGHTED_SUM = "weighted_sum"


@dataclass(frozen=True, slots=True)
class Score:
    """A finite reward, with its parts where the reward function names any."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unscored:
    """Why there is no reward."""

    cause: Cause
    detail: str = ""


RewardOutcome = Score | Unscored


def load_reward(name: str) -> RewardFunction:
    """Return a built-in by name, or `package.module:function`, imported here and now.

    Raises:
        RewardError: unknown, not importable, or nothing that can be called.
    """
    if ":" not in name:
        if name in BUILT_INS:
            return BUILT_INS[name]
        known = ", ".join((*BUILT_INS, REMOTE, WEIGHTED_SUM))
        raise RewardError(
            name, f"no such built-in; there are {known}, or `package.module:function`"
        )
    module, _, attribute = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of theirs may raise anything
        raise RewardError(name, f"cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise RewardError(name, "expected a function of (problem, trajectory)")
    return reward


def is_async(reward: RewardFunction) -> bool:
    """Say whether a call gives something to await, so that many calls can be under way at once."""
    bare = inspect.unwrap(reward)
    return inspect.iscoroutinefunction(bare) or inspect.iscoroutinefunction(
        getattr(bare, "__call__", None)  # noqa: B004 - an object's own, which may be a coroutine
    )


def check_arguments(name: str, reward: RewardFunction, arguments: Mapping[str, JsonValue]) -> None:
    """Refuse keyword arguments the reward cannot take, before anything is sampled.

    Raises:
        RewardError: naming what does not fit.
    """
    try:
        inspect.signature(reward).bind(None, None, **arguments)
    except TypeError as error:
        raise RewardError(
            name, f"called with (problem, trajectory) and its arguments: {error}"
        ) from None
    except ValueError:
        return  # a callable without a signature, such as one written in C
    if name in BUILT_INS:
        try:
            check_built_in(name, arguments)
        except ValueError as error:
            raise RewardError(name, f"cannot use its arguments: {error}") from None


def as_number(value: object) -> float | None:
    """Read a reward as a finite float; `None` where it is no number (a truth value is one), or one
    beyond ±1e30.
    """
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars convert themselves
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= REWARD_LIMIT else None  # NaN is not below anything


def read_outcome(value: object) -> RewardOutcome:
    """Read what a reward function returned for one trajectory.

    A mapping names parts: the one named `reward` is the reward and the others are kept beside it;
    without one the reward is the sum of them all.
    """
    if not isinstance(value, Mapping):
        number = as_number(value)
        return _not_a_number(_describe(value)) if number is None else Score(number)
    if not 0 < len(value) <= PART_COUNT_LIMIT:
        return _not_a_number(f"{len(value)} parts; expected 1 to {PART_COUNT_LIMIT}")
    parts: dict[str, float] = {}
    for name, part in value.items():
        if not isinstance(name, str) or not PART_NAME.fullmatch(name):
            return _not_a_number("a part's name is not 1-64 letters, digits or ` _.:/-`")
        number = as_number(part)
        if number is None:
            return _not_a_number(f"part {name!r} is {_describe(part)}")
        parts[name] = number
    total = as_number(parts.pop(TOTAL, math.fsum(parts.values())))
    return (
        _not_a_number("the sum of its parts is too large") if total is None else Score(total, parts)
    )


def read_outcomes(value: object, count: int) -> list[RewardOutcome]:
    """Read what a reward function returned for a group of `count` trajectories, each by itself.

    Anything but a list (tuple, array, tensor) of `count` values leaves them all unscored.
    """
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return [_not_a_number(f"expected {count} rewards, found {_describe(value)}")] * count
    try:
        values: Sequence[Any] = list(islice(value, count + 1))  # type: ignore[call-overload]
    except TypeError:
        return [_not_a_number(f"expected {count} rewards, found {_describe(value)}")] * count
    if len(values) != count:
        length = f"{len(values)}" if len(values) < count else "more"
        return [_not_a_number(f"expected {count} rewards, found {length}")] * count
    return [read_outcome(item) for item in values]


def _not_a_number(detail: str) -> Unscored:
    return Unscored(Cause.REWARD_NOT_A_NUMBER, detail)


def _describe(value: object) -> str:
    """Describe a value by its type, and which number it is; what it prints may be anything."""
    return f"the {type(value).__name__} {value!r}" if type(value) is float else type(value).__name__
