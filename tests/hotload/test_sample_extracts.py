"""Samples to show: which ones, and how much of them."""

from typing import Any

from hotload.dataset.sample_extracts import (
    MESSAGE_LIMIT,
    TEXT_LIMIT_CHARACTERS,
    ExtractReason,
    SampleExtract,
    choose_extracts,
    merge_extracts,
)
from hotload.rollout.trajectory import Problem, ScoredGroup, Trajectory
from tests.factories import provenance, scored_group, trajectory

NOW, NEXT = "run-000003-0123abcd", "run-000004-0123abcd"


def sample(number: int, text: str = "four", **changes: Any) -> Trajectory:
    return trajectory(number=number, text=text, **{"provenance": provenance(NOW)} | changes)


def group(*scored: tuple[Trajectory, float | None], **problem: Any) -> ScoredGroup:
    samples = tuple(one for one, _ in scored)
    rewards = tuple(reward for _, reward in scored)
    return scored_group(*samples, problem=Problem("p", **problem), rewards=rewards)


def numbers(extracts: tuple[SampleExtract, ...]) -> dict[str, int]:
    return {extract.reason.value: extract.sample_number for extract in extracts}


def test_which_samples_are_shown() -> None:
    straddling = provenance(NOW, NEXT)
    made = group(
        (sample(0), 0.5),
        (sample(1), 0.0),
        (sample(2, turn_count=3), 1.0),
        (sample(3, provenance=straddling), 0.25),
        (sample(4, failure="timeout", detail="late"), None),
        prompt="2 + 2?",
    )
    assert numbers(choose_extracts([made])) == {
        "highest reward": 2,
        "lowest reward": 1,
        "two versions of the weights": 3,
        "failed": 4,
        "most turns": 2,
        "median reward of its part": 0,
    }
    assert choose_extracts([]) == ()


def test_of_two_files_the_better_the_worse_and_else_the_first_counts() -> None:
    first = choose_extracts([group((sample(0), 0.5), (sample(1), 0.25), prompt="x")])
    other = choose_extracts([group((sample(2), 0.75), (sample(3), 0.25), prompt="x")])
    assert numbers(merge_extracts((*first, *other))) == {
        "highest reward": 2,
        "lowest reward": 1,
        "median reward of its part": 0,
    }
    assert merge_extracts(merge_extracts((*first, *other))) == merge_extracts((*first, *other))


def test_an_extract_is_small_however_much_was_said() -> None:
    long = "é" * 1_000_000
    transcript = [{"role": "user", "content": long, "n": n} for n in range(100)]
    chat = sample(0, long, transcript=tuple(transcript), failure="timeout", detail=long)
    (extract,) = choose_extracts([group((chat, None), prompt=long, answer={"a": long})])
    assert extract.reason is ExtractReason.FAILED
    assert len(extract.messages) == MESSAGE_LIMIT + 1
    assert extract.messages[MESSAGE_LIMIT // 2] == ("", "… 88 messages left out")
    role, text = extract.messages[0]
    left_out = len(long) + len('\n{"n": 0}') - TEXT_LIMIT_CHARACTERS
    assert (role, text) == (
        "user",
        f"{long[:TEXT_LIMIT_CHARACTERS]}\n… {left_out:,} more characters",
    )
    # Two bytes for each of its letters.
    assert len(extract.model_dump_json().encode()) < 2 * 16 * TEXT_LIMIT_CHARACTERS
    assert SampleExtract.model_validate_json(extract.model_dump_json()) == extract


def test_what_was_said() -> None:
    text = choose_extracts([group((sample(0), 1.0), prompt="2 + 2?", answer="4")])[0]
    assert text.messages == (("prompt", "2 + 2?"), ("answer of the model", "four"))
    assert text.expected == "4"
    messages = ({"role": "user", "content": ["part"], "tool": 1},)
    chat = choose_extracts([group((sample(0), 1.0), messages=messages, answer=[4])])[0]
    assert chat.messages[0] == ("user", '["part"]\n{"tool": 1}')
    assert chat.expected == "[4]"
    tokens = choose_extracts([group((sample(0), 1.0), prompt=(1, 2))])[0]
    assert tokens.messages == (("answer of the model", "four"),)
    assert tokens.expected is None
