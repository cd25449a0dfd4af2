"""Built-in rewards: each looks at the text, or the length, of one trajectory and at the problem's
`answer`, and returns a number.

An answer is text, a number or a truth value. Whatever a problem lacks raises: a sample that nobody
can score is never counted as 0.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn, get_args

from hotload.reward.choice import chosen_letter, one_letter
from hotload.reward.final_number import DASHES, Which, final_number, one_number
from hotload.reward.math_answer import is_same_answer, wanted_expression
from hotload.rollout.trajectory import Problem, Provenance, Segment, Trajectory

ANSWER_GROUP = "answer"
# Punctuation that means something: a sign, within a number, or behind a name (C++, F#).
MEANT = re.compile(
    r"(-(?=[$€£¥]?\.?\d)|(?<=\d)[-.,/:*](?=\d)|(?<![^\W\d])(?<!\.)\.(?=\d)|(?<=[^\W\d_])[+#]++(?!\w))"
)
SIGNS = re.compile(r"[^\w\s]")
# To put the marks on one letter in order takes the square of their number; Unicode's own limit for
# streams is 30.
CROWD = re.compile(r"([^\w\s\x00-\x7f]{30})[^\w\s\x00-\x7f]++")
SUPERSCRIPT = re.compile("[⁺⁻⁰¹²³⁴-⁹]+")


def exact_match(problem: Problem, trajectory: Trajectory) -> float:
    """1 if the text without surrounding white space is the answer, else 0."""
    return float(trajectory.text.strip() in _wanted(problem))


def normalised_match(problem: Problem, trajectory: Trajectory) -> float:
    """1 if text and answer agree but for case, white space, the way Unicode composes them and
    punctuation without a meaning, else 0.

    Signs, points within numbers, operators, currency and `%` have one.
    """
    return float(_normalised(trajectory.text) in _normalised_wanted(problem))


def contains(problem: Problem, trajectory: Trajectory, after: str = "") -> float:
    """1 if the normalised answer occurs in the normalised text, as whole words, else 0.

    A number is one word: 5 is not in 1.5 or -5. An answer of one letter is a choice, since a letter
    may be a word: it counts as in `multiple_choice`.
    """
    if one_letter(_wanted(problem)[0]):
        return multiple_choice(problem, trajectory, after)
    wanted, text = _normalised_wanted(problem), f" {_normalised(_behind(after, trajectory))} "
    return float(any(f" {each} " in text for each in wanted))


def multiple_choice(problem: Problem, trajectory: Trajectory, after: str = "") -> float:
    """1 if the text chooses the answer, a letter, else 0 (`hotload.reward.choice`).

    Raises:
        ValueError: the answer is not one letter.
    """
    return float(chosen_letter(_behind(after, trajectory)) == _wanted_letter(problem))


def numeric_answer(
    problem: Problem,
    trajectory: Trajectory,
    tolerance: float = 0,
    after: str = "",
    which: Which = "last",
) -> float:
    """1 if the text's final number is the answer, else 0 (`hotload.reward.final_number`).

    With `tolerance` they may differ by that share of the larger magnitude. An answer may be the
    whole solution with a marker, as GSM8K has it.

    Args:
        after: only what follows the last of it counts, such as `</think>`; without one it is 0.
        which: of several markers, or of several numbers without one, the `last` or the `first`.

    Raises:
        ValueError: the answer is not exactly one number.
    """
    _check("tolerance", tolerance, 0 <= tolerance < math.inf, "a number from 0")
    _check_which(which)
    wanted, found = _wanted_number(problem), final_number(_behind(after, trajectory), which)
    if found is None:
        return 0.0
    share = Fraction(Decimal(str(tolerance)))
    return float(abs(found - wanted) <= share * max(abs(found), abs(wanted)))


def math_verify(
    problem: Problem, trajectory: Trajectory, after: str = "", which: Which = "last"
) -> float:
    """1 if the text's last `\\boxed{}` holds the answer or what is mathematically equal, else 0
    (`hotload.reward.math_answer`). `after` and `which` as for `numeric_answer`.

    Raises:
        ValueError: the package is missing, or it cannot read the answer.
    """
    _check_which(which)
    return float(is_same_answer(_wanted(problem)[-1], _behind(after, trajectory), which))


def regex(problem: Problem, trajectory: Trajectory, pattern: str) -> float:
    """1 if `pattern` is found in the text, else 0. Flags are written into it: `(?si)…`.

    Where the pattern has a group named `answer`, what the last occurrence found there must also be
    the problem's answer, but for white space around it.
    """
    compiled = re.compile(pattern)
    if ANSWER_GROUP not in compiled.groupindex:
        return float(compiled.search(trajectory.text) is not None)
    wanted, found = _wanted(problem), None
    for occurrence in compiled.finditer(trajectory.text):
        found = occurrence[ANSWER_GROUP]
    return float(found is not None and found.strip() in wanted)


def json_schema(problem: Problem, trajectory: Trajectory, schema: Any = None) -> float:
    """1 if the whole text is JSON that keeps `schema`, else 0.

    Without `schema` the problem's answer is the schema. `format` is not looked at, and a `$ref`
    outside the schema is not fetched: it raises. A text that is nested too deep to be looked at, or
    has a number too large, is 0.
    """
    validator = _validator(json.dumps(problem.answer if schema is None else schema))
    try:
        value = json.loads(trajectory.text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    try:
        return float(validator.is_valid(value))
    except (RecursionError, ArithmeticError):  # the text's doing: the schema was tried
        return 0.0


def length(problem: Problem, trajectory: Trajectory, target: int = 64) -> float:
    """1 at `target` sampled tokens, falling evenly to 0 at none and at twice as many."""
    _check("target", target, 0 < target < math.inf, "a number above 0")
    return max(0.0, 1.0 - abs(trajectory.completion_token_count - target) / target)


def overlong_penalty(problem: Problem, trajectory: Trajectory, limit: int, slack: int = 0) -> float:
    """0 up to `limit - slack` sampled tokens, falling evenly to -1 at `limit` and beyond.

    Part of a weighted sum: it takes from what another part gave.
    """
    _check("limit", limit, 0 < limit < math.inf, "a number above 0")
    _check("slack", slack, 0 <= slack <= limit, f"a number from 0 to the limit {limit}")
    over = trajectory.completion_token_count - (limit - slack)
    if over <= 0:
        return 0.0
    return -1.0 if over >= slack else -over / slack


BUILT_INS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        reward.__name__: reward
        for reward in (
            exact_match,
            normalised_match,
            contains,
            multiple_choice,
            numeric_answer,
            math_verify,
            regex,
            json_schema,
            length,
            overlong_penalty,
        )
    }
)
QUICK_BUILT_INS = frozenset(
    {
        "exact_match",
        "normalised_match",
        "contains",
        "multiple_choice",
        "numeric_answer",
        "length",
        "overlong_penalty",
    }
)
"""Those that take time in proportion to the text, whatever it says: they need no time limit."""


def check_built_in(name: str, arguments: Mapping[str, Any]) -> None:
    """Try the arguments of a built-in on a made-up sample.

    Raises:
        ValueError: why it cannot.
    """
    if name == "json_schema" and arguments.get("schema") is None:
        return  # the problems have it
    origin = Provenance("", "", "", 1)
    segments = (Segment((), (0,), (-1.0,), (True,)),)
    sample = Trajectory("", 0, 0, origin, 0.0, segments, "1", completion_token_count=1)
    answer = "A" if name == "multiple_choice" else "1"
    try:
        BUILT_INS[name](Problem("", "1", answer=answer), sample, **arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, no sample fares better
        raise ValueError(f"{type(error).__name__}: {error}"[:500]) from None


def check_answer(name: str, arguments: Mapping[str, Any], problem: Problem) -> None:
    """Refuse an answer that the built-in cannot use, whatever the text will be.

    What takes math-verify or a whole schema to see is left to the scoring.

    Raises:
        ValueError: what it is, and what was expected.
    """
    if name == "regex" and ANSWER_GROUP not in re.compile(arguments["pattern"]).groupindex:
        return
    if name == "json_schema":
        if arguments.get("schema") is None and not isinstance(problem.answer, dict | bool):
            raise ValueError(f"expected a JSON schema, found {problem.answer!r:.80}")
        return
    if check := _ANSWER_CHECKS.get(name):
        check(problem)


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    # Here and not above: the library does without them until somebody asks for this reward.
    from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]
    from jsonschema.validators import validator_for  # type: ignore[import-untyped]
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

    loaded = json.loads(schema)
    made = validator_for(loaded, default=Draft202012Validator)
    try:
        made.check_schema(loaded)
    except SchemaError as error:
        raise ValueError(f"the schema is none: {error.message}") from None
    # With a registry of its own it would fetch from the network.
    validator = made(loaded, registry=REGISTRY)
    try:
        validator.is_valid(None)
    except RecursionError:
        raise ValueError("the schema is none: it leads back to itself without end") from None
    return validator


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check(name: str, found: float, fits: bool, expected: str) -> None:
    if isinstance(found, bool) or not fits:
        raise ValueError(f"{name}: found {found!r}, expected {expected}")


def _check_which(which: str) -> None:
    if which not in get_args(Which):
        raise ValueError(f"which: found {which!r}, expected first or last")


def _behind(after: str, trajectory: Trajectory) -> str:
    """The text behind the last `after`, and nothing where there is none; all of it without one."""
    if not isinstance(after, str):
        raise ValueError(f"after: found {after!r:.80}, expected text")
    if not after:
        return trajectory.text
    _, found, text = trajectory.text.rpartition(after)
    return text if found else ""


def _wanted(problem: Problem) -> tuple[str, ...]:
    """The texts that are the problem's answer, as it is written first.

    A number is written as in JSON; a whole one that came as 1.0 is also 1. A truth value is `true`
    or `True`.

    Raises:
        ValueError: there is none, or it is a list or an object.
    """
    answer = problem.answer
    if isinstance(answer, str) and answer.strip():
        return (answer.strip(),)
    if isinstance(answer, bool):
        return (json.dumps(answer), str(answer))
    if isinstance(answer, float) and answer.is_integer():
        return (json.dumps(answer), str(int(answer)))
    if isinstance(answer, int | float):
        return (json.dumps(answer, allow_nan=False),)
    found = "none" if answer is None or answer == "" else f"{answer!r:.80}"
    raise ValueError(f"expected an answer that is text, a number or a truth value, found {found}")


def _normalised_wanted(problem: Problem) -> tuple[str, ...]:
    wanted = tuple(_normalised(each) for each in _wanted(problem))
    if not all(wanted):
        raise ValueError(f"nothing is left of the answer {problem.answer!r:.80} when normalised")
    return wanted


def _wanted_number(problem: Problem) -> Fraction:
    return one_number(_wanted(problem)[0])


def _wanted_letter(problem: Problem) -> str:
    letter = one_letter(_wanted(problem)[0])
    if letter is None:
        raise ValueError(f"expected an answer that is one letter, found {problem.answer!r:.80}")
    return letter


_ANSWER_CHECKS: Mapping[str, Callable[[Problem], object]] = MappingProxyType(
    {
        "exact_match": _wanted,
        "normalised_match": _normalised_wanted,
        "contains": _normalised_wanted,
        "multiple_choice": _wanted_letter,
        "numeric_answer": _wanted_number,
        "math_verify": lambda problem: wanted_expression(_wanted(problem)[-1]),
        "regex": _wanted,
    }
)


def _normalised(text: str) -> str:
    """Its words with one space between: composed and in lower case; symbols are words."""
    text = SUPERSCRIPT.sub(lambda found: f"^{found[0]}", CROWD.sub(r"\1", text))  # 10² is not 102
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    parts = MEANT.split(text.translate(DASHES))
    parts[::2] = [SIGNS.sub(_spaced, part) for part in parts[::2]]
    return " ".join("".join(parts).split())


def _spaced(found: re.Match[str]) -> str:
    sign = found[0]
    category = unicodedata.category(sign)
    if category.startswith("M"):  # a vowel, or an accent no letter has been composed with
        return sign
    return f" {sign} " if sign == "%" or (category.startswith("S") and sign != "`") else " "
