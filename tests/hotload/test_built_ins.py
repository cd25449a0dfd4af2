"""Built-in rewards by tables of answers and texts."""

from typing import Any

import pytest

from hotload.built_ins import BUILT_INS, check_built_in, sampled_token_count
from hotload.trajectories import Problem, Provenance, Segment, Trajectory

ORIGIN = Provenance("i", "r", "s", 1)


def sample(text: str, tokens: int = 1) -> Trajectory:
    arrays: dict[str, Any] = {
        "token_ids_T": (5,) * tokens,
        "sampling_logprobs_T": (-0.5,) * tokens,
        "loss_mask_T": (True,) * tokens,
    }
    return Trajectory("p", 0, 1, ORIGIN, 0.0, text=text, **arrays)


def score(name: str, answer: object, text: str, tokens: int = 1, **arguments: object) -> float:
    problem = Problem("p", "x", answer=answer)
    return BUILT_INS[name](problem, sample(text, tokens), **arguments)


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
        ("numeric_answer", "1", "1" * 100_000, 0),
    ],
)
def test_matches(name: str, answer: object, text: str, reward: float) -> None:
    assert score(name, answer, text) == reward


@pytest.mark.parametrize(
    ("pattern", "answer", "text", "reward"),
    [
        (r"^<think>.*</think>", None, "<think>so</think>4", 1),
        (r"^<think>.*</think>", None, "<think>so\nso</think>4", 0),
        (r"(?s)^<think>.*</think>", None, "<think>so\nso</think>4", 1),
        (r"(?i)yes", None, "well, YES", 1),
        (r"<answer>(?P<answer>.*?)</answer>", "42", "<answer> 42 </answer>", 1),
        (r"<answer>(?P<answer>.*?)</answer>", 42, "<answer>42</answer><answer>43</answer>", 0),
        (r"<answer>(?P<answer>.*?)</answer>", "42", "42", 0),
        (r"none(?P<answer>x)?", "x", "none", 0),
    ],
)
def test_patterns(pattern: str, answer: object, text: str, reward: float) -> None:
    assert score("regex", answer, text, pattern=pattern) == reward


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"name": "a", "age": 3}', 1),
        (' {"name": "a"}\n', 1),
        ('{"name": "a", "age": -1}', 0),
        ('{"name": "a", "more": 1}', 0),
        ('{"age": 3}', 0),
        ('{"name": "a"} and more', 0),
        ('{"name": "a"', 0),
        ('```json\n{"name": "a"}\n```', 0),
        ("", 0),
        ("NaN", 0),
        ("9" * 10_000, 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_that_keeps_a_schema(text: str, reward: float) -> None:
    pytest.importorskip("jsonschema")  # the library alone does without it
    assert score("json_schema", None, text, schema=SCHEMA) == reward
    assert score("json_schema", SCHEMA, text) == reward  # each problem may have its own


def test_a_schema_is_never_fetched() -> None:
    pytest.importorskip("jsonschema")
    elsewhere = {"$ref": "http://127.0.0.1:9/schema.json"}
    with pytest.raises(Exception, match="Unresolvable"):
        score("json_schema", None, "1", schema=elsewhere)


@pytest.mark.parametrize(
    ("name", "tokens", "arguments", "reward"),
    [
        ("length", 8, {"target": 8}, 1),
        ("length", 12, {"target": 8}, 0.5),
        ("length", 0, {"target": 8}, 0),
        ("length", 99, {"target": 8}, 0),
        ("overlong_penalty", 10, {"limit": 10}, 0),
        ("overlong_penalty", 11, {"limit": 10}, -1),
        ("overlong_penalty", 6, {"limit": 10, "slack": 4}, 0),
        ("overlong_penalty", 7, {"limit": 10, "slack": 4}, -0.25),
        ("overlong_penalty", 10, {"limit": 10, "slack": 4}, -1),
        ("overlong_penalty", 50, {"limit": 10, "slack": 4}, -1),
    ],
)
def test_lengths(name: str, tokens: int, arguments: dict[str, int], reward: float) -> None:
    assert score(name, None, "", tokens, **arguments) == reward


def test_numbers_are_compared_within_a_tolerance() -> None:
    assert score("numeric_answer", 100, "101", tolerance=0.02) == 1
    assert score("numeric_answer", 100, "103", tolerance=0.02) == 0


def test_what_a_tool_said_is_not_the_policys_length() -> None:
    # Sampled; from a tool; masked out because other weights made it; in a second sequence.
    first = ((1, 2, 3), (-0.5, 0.0, -0.25), (True, False, False))
    more = Segment((1,), (4, 5), (0.0, 0.0), (True, False))
    whole = Trajectory("p", 0, 1, ORIGIN, 0.0, (), *first, further=(more,))
    assert sampled_token_count(whole) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("regex", {"pattern": "("}, "PatternError|error: missing"),
        ("regex", {"pattern": 5}, "TypeError"),
        ("json_schema", {"schema": {"type": "nothing"}}, "the schema is none"),
        ("json_schema", {"schema": 3}, "TypeError"),
        ("length", {"target": 0}, "ZeroDivisionError"),
        ("length", {"target": "8"}, "TypeError"),
        ("numeric_answer", {"tolerance": "wide"}, "InvalidOperation"),
    ],
)
def test_arguments_are_tried_beforehand(name: str, arguments: dict[str, Any], reason: str) -> None:
    if name == "json_schema":
        pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match=reason):
        check_built_in(name, arguments)
