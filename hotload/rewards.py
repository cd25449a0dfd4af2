"""Built-in rewards, and the import of a user's own by name.

A reward is called with (problem, trajectory) and the declared keyword arguments and returns a
finite number. The built-ins look at the trajectory's text and the problem's `answer`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from types import MappingProxyType

from pydantic import JsonValue

from hotload.errors import RewardError
from hotload.trajectories import Problem, Trajectory

Reward = Callable[..., object]
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
MARKED_ANSWER = re.compile(r"####\s*(.+)|\\boxed\{([^{}]*)\}")


def exact_match(problem: Problem, trajectory: Trajectory) -> float:
    """1 if the text without surrounding white space is the answer, else 0."""
    return float(trajectory.text.strip() == str(problem.answer).strip())


def normalised_match(problem: Problem, trajectory: Trajectory) -> float:
    """1 if text and answer agree but for case, punctuation and white space, else 0."""
    return float(_normalised(trajectory.text) == _normalised(str(problem.answer)))


def contains(problem: Problem, trajectory: Trajectory) -> float:
    """1 if the normalised answer occurs in the normalised text, as whole words, else 0."""
    wanted = _normalised(str(problem.answer))
    return float(bool(wanted) and f" {wanted} " in f" {_normalised(trajectory.text)} ")


def numeric_answer(problem: Problem, trajectory: Trajectory, tolerance: float = 1e-6) -> float:
    """1 if the text's final number is the answer's, within the relative `tolerance`, else 0.

    A number after `####` or in `\\boxed{}` counts before the last number of the text, on both sides
    (GSM8K style).
    """
    wanted, found = _final_number(str(problem.answer)), _final_number(trajectory.text)
    if wanted is None or found is None:
        return 0.0
    return float(abs(found - wanted) <= Decimal(str(tolerance)) * max(abs(wanted), Decimal(1)))


def length(problem: Problem, trajectory: Trajectory, target: int = 64) -> float:
    """1 at `target` completion tokens, falling evenly to 0 at none and at twice as many."""
    return max(0.0, 1.0 - abs(len(trajectory.token_ids_T) - target) / target)


BUILT_INS: Mapping[str, Reward] = MappingProxyType(
    {
        reward.__name__: reward
        for reward in (exact_match, normalised_match, contains, numeric_answer, length)
    }
)


def _normalised(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def _final_number(text: str) -> Decimal | None:
    marked = [first or second for first, second in MARKED_ANSWER.findall(text)]
    for part in (*reversed(marked), text):
        numbers = NUMBER.findall(part)
        if numbers:
            try:
                return Decimal(numbers[-1].replace(",", ""))
            except InvalidOperation:
                continue
    return None


def load_reward(name: str) -> Reward:
    """A built-in by name, or `package.module:function`, imported here and now.

    Raises:
        RewardError: unknown, not importable, or not a plain function.
    """
    if ":" not in name:
        if name in BUILT_INS:
            return BUILT_INS[name]
        known = ", ".join(BUILT_INS)
        raise RewardError(
            name, f"no such built-in; there are {known}, or `package.module:function`"
        )
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of theirs may raise anything
        raise RewardError(name, f"cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise RewardError(name, "expected a plain function of (problem, trajectory)")
    return found


def check_arguments(name: str, reward: Reward, arguments: Mapping[str, JsonValue]) -> None:
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


def as_number(value: object) -> float | None:
    """The reward as a finite float; `None` where it is no number (a truth value is one)."""
    try:
        number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars convert themselves
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, (str, bytes)) else None
