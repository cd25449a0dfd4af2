"""Built-in rewards, import by name, and what counts as a number."""

import math

import numpy as np
import pytest

from hotload.errors import RewardError
from hotload.rewards import BUILT_INS, as_number, check_arguments, load_reward
from hotload.trajectories import Problem, Provenance, Trajectory


def score(name: str, answer: object, text: str, tokens: int = 1, **arguments: object) -> float:
    origin = Provenance("i", "r", "s", 1)
    ids = tuple(range(tokens))
    sample = Trajectory("p", 0, 1, origin, 0.0, token_ids_T=ids, text=text)
    reward = load_reward(name)
    check_arguments(name, reward, arguments)  # type: ignore[arg-type]
    return float(reward(Problem("p", "x", answer=answer), sample, **arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "answer", "text", "reward"),
    [
        ("exact_match", "yes", " yes\n", 1),
        ("exact_match", "yes", "Yes", 0),
        ("exact_match", 3, "3", 1),
        ("normalised_match", "It's  A!", "its a", 0),
        ("normalised_match", "A, b", "a b.", 1),
        ("contains", "blue", "It is Blue.", 1),
        ("contains", "blue", "blueish", 0),
        ("contains", "...", "anything", 0),
        ("numeric_answer", 72, "so it is 72.", 1),
        ("numeric_answer", "steps … #### 1,234", "The answer is \\boxed{1234}, not 7", 1),
        ("numeric_answer", "#### 5", "first 5 then 6", 0),
        ("numeric_answer", "0.5", "= .50", 1),
        ("numeric_answer", "-3", "minus: -3.0", 1),
        ("numeric_answer", "2", "no number", 0),
        ("numeric_answer", "none", "2", 0),
        ("numeric_answer", "1e3", "1000", 1),
    ],
)
def test_built_ins(name: str, answer: object, text: str, reward: float) -> None:
    assert score(name, answer, text) == reward


def test_arguments_of_built_ins() -> None:
    assert score("numeric_answer", 100, "101", tolerance=0.02) == 1
    assert score("length", None, "", tokens=8, target=8) == 1
    assert score("length", None, "", tokens=12, target=8) == 0.5
    assert score("length", None, "", tokens=99, target=8) == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "no such built-in"),
        ("nowhere_at_all:f", "ModuleNotFoundError"),
        ("math:nothing", "AttributeError"),
        ("math:pi", "plain function"),
        ("asyncio:sleep", "plain function"),
    ],
)
def test_what_cannot_be_used(name: str, reason: str) -> None:
    with pytest.raises(RewardError, match=reason):
        load_reward(name)


def test_arguments_that_do_not_fit() -> None:
    for name in BUILT_INS:
        with pytest.raises(RewardError, match="unknown"):
            check_arguments(name, BUILT_INS[name], {"unknown": 1})
    with pytest.raises(RewardError):
        check_arguments("f", lambda trajectory: 1, {})


def test_numbers() -> None:
    assert [as_number(value) for value in (1, True, 0.5, np.float32(2))] == [1, 1, 0.5, 2]
    for value in (math.nan, math.inf, None, "1", b"1", [1], {}, 10**400, object(), 1j):
        assert as_number(value) is None
