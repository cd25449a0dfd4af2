"""Built-in rewards: each looks at the text, or the length, of one trajectory and at the problem's
`answer`, and returns a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

from hotload.trajectories import Problem, Provenance, Trajectory

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
MARKED_ANSWER = re.compile(r"####\s*(.+)|\\boxed\{([^{}]*)\}")
ANSWER_GROUP = "answer"


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


def regex(problem: Problem, trajectory: Trajectory, pattern: str) -> float:
    """1 if `pattern` is found in the text, else 0. Flags are written into it: `(?si)…`.

    Where the pattern has a group named `answer`, what the last occurrence found there must also be
    the problem's answer, but for case, punctuation and white space.
    """
    compiled = re.compile(pattern)
    if ANSWER_GROUP not in compiled.groupindex:
        return float(compiled.search(trajectory.text) is not None)
    found = None
    for occurrence in compiled.finditer(trajectory.text):
        found = occurrence[ANSWER_GROUP]
    return float(found is not None and _normalised(found) == _normalised(str(problem.answer)))


def json_schema(problem: Problem, trajectory: Trajectory, schema: Any = None) -> float:
    """1 if the whole text is JSON that keeps `schema`, else 0.

    Without `schema` the problem's answer is the schema. `format` is not looked at, and a `$ref`
    outside the schema is not fetched: it raises.
    """
    validator = _validator(json.dumps(problem.answer if schema is None else schema))
    try:
        value = json.loads(trajectory.text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(validator.is_valid(value))


def length(problem: Problem, trajectory: Trajectory, target: int = 64) -> float:
    """1 at `target` sampled tokens, falling evenly to 0 at none and at twice as many."""
    return max(0.0, 1.0 - abs(sampled_token_count(trajectory) - target) / target)


def overlong_penalty(problem: Problem, trajectory: Trajectory, limit: int, slack: int = 0) -> float:
    """0 up to `limit - slack` sampled tokens, falling evenly to -1 at `limit` and beyond.

    Part of a weighted sum: it takes from what another part gave.
    """
    over = sampled_token_count(trajectory) - (limit - slack)
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
            numeric_answer,
            regex,
            json_schema,
            length,
            overlong_penalty,
        )
    }
)
QUICK = frozenset(BUILT_INS) - {"regex", "json_schema"}
"""Those that take time in proportion to the text, whatever it says: they need no time limit."""


def check_built_in(name: str, arguments: Mapping[str, Any]) -> None:
    """Nothing where the built-in can use the arguments, tried on a made-up sample.

    Raises:
        ValueError: why it cannot.
    """
    if name == "json_schema" and arguments.get("schema") is None:
        return  # the problems have it
    origin = Provenance("", "", "", 1)
    sample = Trajectory("", 0, 0, origin, 0.0, (), (0,), (-1.0,), (True,), "1")
    try:
        BUILT_INS[name](Problem("", "1", answer="1"), sample, **arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, no sample fares better
        raise ValueError(f"{type(error).__name__}: {error}"[:500]) from None


def sampled_token_count(trajectory: Trajectory) -> int:
    """Tokens the policy sampled, over all segments; what a tool said does not count.

    A token masked out for another reason than that it was not sampled has a log-probability.
    """
    return sum(
        is_trained or logprob != 0.0
        for segment in trajectory.segments
        for is_trained, logprob in zip(
            segment.loss_mask_T, segment.sampling_logprobs_T, strict=True
        )
    )


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
    return made(loaded, registry=REGISTRY)  # with its own registry it would fetch from the network


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


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
