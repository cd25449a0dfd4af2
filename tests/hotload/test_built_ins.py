"""Built-in rewards by tables of answers and texts."""

from typing import Any

import pytest

from hotload.reward.built_ins import BUILT_INS, check_answer, check_built_in
from hotload.rollout.trajectory import Problem
from tests.factories import segment, trajectory


def score(name: str, answer: object, text: str, tokens: int = 1, **arguments: object) -> float:
    problem = Problem("p", "x", answer=answer)
    return BUILT_INS[name](problem, trajectory(segment((5,) * tokens), text=text), **arguments)


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
        ("exact_match", True, "true", 1),
        ("exact_match", False, "False", 1),
        ("exact_match", True, "1", 0),
        ("exact_match", 1.0, "1", 1),
        ("exact_match", 1.0, "1.0", 1),
        ("exact_match", 0.5, "0.5", 1),
        ("normalised_match", True, "TRUE.", 1),
        ("normalised_match", "-5", "5", 0),
        ("normalised_match", "-5", "**\u22125**", 1),
        ("normalised_match", "-$5", "$5", 0),
        ("normalised_match", "x+1", "x-1", 0),
        ("normalised_match", "x+1", "x + 1.", 1),
        ("normalised_match", "3.14", "3 14", 0),
        ("normalised_match", "50%", "50", 0),
        ("normalised_match", "50%", "50 %", 1),
        ("normalised_match", "1/2", "1 2", 0),
        ("normalised_match", "10:30", "10.30", 0),
        ("normalised_match", "10\u00b2", "102", 0),
        ("normalised_match", "10\u00b2", "10^2", 1),
        ("normalised_match", "+", "=", 0),
        ("normalised_match", "\u0915\u093f", "\u0915\u093e", 0),  # one consonant, two vowel signs
        ("normalised_match", "caf\u00e9", "Cafe\u0301", 1),
        ("normalised_match", "STRASSE", "stra\u00dfe", 1),
        ("normalised_match", "\uff21\uff11", "a1", 1),
        ("contains", "5", "It is 5.", 1),
        ("contains", "5", "It is `5`!", 1),
        ("contains", "5", "<answer>5</answer>", 1),
        ("contains", "5", "x=5", 1),
        ("contains", "5", "It costs $5", 1),
        ("contains", "5", "It is 1.5", 0),
        ("contains", "5", "It is .5", 0),
        ("contains", "5", "It is -5", 0),
        ("contains", "5", "It is 5/6", 0),
        ("contains", "-5", "It is 5", 0),
        ("contains", "-5", "It is (-5).", 1),
        ("contains", "10", "It is 10,000", 0),
        ("contains", "C++", "C# is it", 0),
        ("contains", "C++", "It is C++.", 1),
        ("contains", "C", "C++ is it", 0),
        ("contains", 1.0, "It is 1", 1),
        ("numeric_answer", 72, "so it is 72.", 1),
        ("numeric_answer", "steps … #### 1,234", "The answer is \\boxed{1234}, not 7", 1),
        ("numeric_answer", "#### 5", "first 5 then 6", 0),
        ("numeric_answer", "0.5", "= .50", 1),
        ("numeric_answer", "-3", "minus: -3.0", 1),
        ("numeric_answer", "2", "no number", 0),
        ("numeric_answer", "5", "The answer is \u22125.", 0),
        ("numeric_answer", "1/2", "3/2", 0),
        ("numeric_answer", "1/2", r"\boxed{\frac{7}{2}}", 0),
        ("numeric_answer", 0.5, r"\boxed{1/2}", 1),
        ("numeric_answer", "20{,}000", r"\boxed{10{,}000}", 0),
        ("numeric_answer", "10,000", r"\boxed{10,\!000}", 1),
        ("numeric_answer", "0.0000005", "0", 0),
        ("numeric_answer", 1_000_000, "1000001", 0),
        ("numeric_answer", 0.1, "1/10", 1),
        ("numeric_answer", "1e3", "1000", 1),
        ("numeric_answer", "1", "1" * 100_000, 0),
    ],
)
def test_matches(name: str, answer: object, text: str, reward: float) -> None:
    assert score(name, answer, text) == reward


@pytest.mark.parametrize("piece", ["!", "-", "1.", "a+", "$", "e\u0301", "\u0301\u0316", "\u00b2"])
def test_a_long_text_is_normalised_in_little_time(piece: str) -> None:
    """With work that grows as the square of the text no time limit would do."""
    text = f"word {piece * 250_000} word"
    assert score("contains", "word", text) == 1
    assert score("normalised_match", "word", text) == 0


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
        (r"answer: (?P<answer>\S+)", "5", "answer: -5", 0),
        (r"answer: (?P<answer>\S+)", "yes", "answer: Yes", 0),
        (r"answer: (?P<answer>\S+)", True, "answer: true", 1),
    ],
)
def test_patterns(pattern: str, answer: object, text: str, reward: float) -> None:
    assert score("regex", answer, text, pattern=pattern) == reward


THOUGHT = "<think>Try \\boxed{5}. Hmm, no"


@pytest.mark.parametrize(
    ("name", "answer", "text", "arguments", "reward"),
    [
        ("numeric_answer", "5", THOUGHT, {}, 1),
        ("numeric_answer", "5", THOUGHT, {"after": "</think>"}, 0),
        ("numeric_answer", "5", f"{THOUGHT}</think>The answer is 7", {"after": "</think>"}, 0),
        ("numeric_answer", "7", f"{THOUGHT}</think>The answer is 7", {"after": "</think>"}, 1),
        ("numeric_answer", "7", "</think>5</think>7", {"after": "</think>"}, 1),
        ("numeric_answer", "18", "#### 18\n\nAnd?\n#### 4", {"which": "first"}, 1),
        ("numeric_answer", "18", "#### 18\n\nAnd?\n#### 4", {"which": "last"}, 0),
        ("contains", "blue", "<think>blue</think>red", {"after": "</think>"}, 0),
        ("contains", "red", "<think>blue</think>red", {"after": "</think>"}, 1),
        ("multiple_choice", "B", "B</think>so\nC", {"after": "</think>"}, 0),
        ("multiple_choice", "C", "B</think>so\nC", {"after": "</think>"}, 1),
    ],
)
def test_which_part_of_a_text_counts(
    name: str, answer: str, text: str, arguments: dict[str, str], reward: float
) -> None:
    assert score(name, answer, text, **arguments) == reward


@pytest.mark.parametrize(
    ("name", "arguments", "answer", "reason"),
    [
        ("exact_match", {}, None, "found none"),
        ("exact_match", {}, [1], r"found \[1\]"),
        ("normalised_match", {}, "!", "nothing is left"),
        ("contains", {}, "", "found none"),
        ("numeric_answer", {}, "five", "one number, found 'five'"),
        ("numeric_answer", {"tolerance": 0.1}, True, "one number, found 'true'"),
        ("math_verify", {}, None, "found none"),
        ("math_verify", {}, "2 1/2", "that math-verify reads, found '2 1/2'"),
        ("math_verify", {}, "so \\boxed{", "that math-verify reads"),
        ("multiple_choice", {}, "5", "one letter, found '5'"),
        ("regex", {"pattern": "(?P<answer>x)"}, None, "found none"),
        ("json_schema", {}, "5", "expected a JSON schema, found '5'"),
    ],
)
def test_an_answer_that_cannot_be_used_is_known_beforehand(
    name: str, arguments: dict[str, object], answer: object, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check_answer(name, arguments, Problem("p", "x", answer=answer))


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("exact_match", {}, 0),
        ("numeric_answer", {}, "so #### 5"),
        ("regex", {"pattern": "x"}, None),
        ("json_schema", {}, {"type": "object"}),
        ("json_schema", {"schema": {}}, None),
        ("length", {}, None),
        ("overlong_penalty", {"limit": 5}, None),
        ("multiple_choice", {}, "(b)"),
        ("math_verify", {}, r"so \boxed{\frac12}"),
    ],
)
def test_an_answer_that_can_be_used(
    name: str, arguments: dict[str, object], answer: object
) -> None:
    check_answer(name, arguments, Problem("p", "x", answer=answer))


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


TREE = {"items": {"$ref": "#"}, "type": "array"}


def test_json_too_deep_to_be_looked_at_keeps_no_schema() -> None:
    pytest.importorskip("jsonschema")
    assert score("json_schema", None, "[" * 9 + "]" * 9, schema=TREE) == 1
    assert score("json_schema", None, "[" * 900 + "]" * 900, schema=TREE) == 0
    assert score("json_schema", None, "1e999", schema={"multipleOf": 0.01}) == 0


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


@pytest.mark.parametrize(
    ("answer", "text", "tolerance", "reward"),
    [
        (100, "101", 0.02, 1),
        (100, "103", 0.02, 0),
        (99, "100", 0.01, 1),
        (-100, "-101", 0.02, 1),
        (100, "-100", 0.02, 0),
        ("0.0000005", "0", 0.5, 0),
        (0, "0.0", 0.5, 1),
        ("1/3", "0.333333333", 1e-6, 1),
    ],
)
def test_a_tolerance_is_a_share(answer: object, text: str, tolerance: float, reward: int) -> None:
    assert score("numeric_answer", answer, text, tolerance=tolerance) == reward


NO_TEXT: list[object] = [None, "", " \n", ["a"], {"a": 1}, float("nan"), float("inf")]


@pytest.mark.parametrize("answer", NO_TEXT, ids=repr)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("exact_match", {}),
        ("normalised_match", {}),
        ("contains", {}),
        ("numeric_answer", {}),
        ("regex", {"pattern": "(?P<answer>x)"}),
    ],
)
def test_a_problem_without_an_answer_is_not_scored(
    name: str, arguments: dict[str, Any], answer: object
) -> None:
    for text in (str(answer), "None of these", ""):
        with pytest.raises(ValueError, match=r"expected an answer|not JSON compliant"):
            score(name, answer, text, **arguments)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("normalised_match", "..."),
        ("contains", "-"),
        ("numeric_answer", "(1,2)"),
        ("numeric_answer", "none"),
        ("numeric_answer", "2 000"),
        ("numeric_answer", True),
    ],
)
def test_an_answer_a_reward_cannot_use_is_not_scored(name: str, answer: object) -> None:
    for text in (str(answer), "1", ""):
        with pytest.raises(ValueError, match=r"nothing is left|one number"):
            score(name, answer, text)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("regex", {"pattern": "("}, "PatternError|error: missing"),
        ("regex", {"pattern": 5}, "TypeError"),
        ("json_schema", {"schema": {"type": "nothing"}}, "the schema is none"),
        ("json_schema", {"schema": 3}, "TypeError"),
        ("json_schema", {"schema": {"$ref": "#"}}, "leads back to itself"),
        ("length", {"target": 0}, "target: found 0, expected a number above 0"),
        ("length", {"target": -5}, "target: found -5"),
        ("length", {"target": True}, "target: found True"),
        ("length", {"target": "8"}, "TypeError"),
        ("overlong_penalty", {"limit": -1}, "limit: found -1, expected a number above 0"),
        ("overlong_penalty", {"limit": 4, "slack": -1}, "slack: found -1, expected .* limit 4"),
        ("overlong_penalty", {"limit": 4, "slack": 5}, "slack: found 5, expected .* limit 4"),
        ("numeric_answer", {"tolerance": -1}, "tolerance: found -1, expected a number from 0"),
        ("numeric_answer", {"tolerance": float("nan")}, "tolerance: found nan"),
        ("numeric_answer", {"tolerance": "wide"}, "TypeError"),
        ("numeric_answer", {"which": "middle"}, "which: found 'middle', expected first or last"),
        ("numeric_answer", {"after": 5}, "after: found 5, expected text"),
    ],
)
def test_arguments_are_tried_beforehand(name: str, arguments: dict[str, Any], reason: str) -> None:
    if name == "json_schema":
        pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match=reason):
        check_built_in(name, arguments)
