"""What is said to a reward service, and how its answers are read."""

import json
from typing import Any

import pytest

from hotload.errors import RewardError
from hotload.options import RewardSpec
from hotload.reward.http_service import parse_rewards, read_reward_service, request_body
from hotload.reward.outcome import RewardOutcome, Score
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import Problem
from tests.factories import segment, trajectory

URL = "https://judge.example/v1/score"


def test_a_request() -> None:
    problem = Problem("p-1", None, ({"role": "user", "content": "hi"},), 4, {"level": "easy"})
    said = ({"role": "assistant", "content": "\ud800"},)
    sample = trajectory(segment((3, 4)), number=3, text="four", turn_count=2, transcript=said)
    assert json.loads(request_body(problem, [sample], {"rubric": "tone"})) == {
        "problem": {
            "id": "p-1",
            "prompt": None,
            "messages": [{"role": "user", "content": "hi"}],
            "answer": 4,
            "extra": {"level": "easy"},
        },
        "trajectories": [
            {
                "sample_number": 3,
                "text": "four",
                "finish_reason": "stop",
                "completion_token_count": 2,
                "turn_count": 2,
                "transcript": list(said),
            }
        ],
        "arguments": {"rubric": "tone"},
    }


@pytest.mark.parametrize(
    ("answer", "rewards"),
    [
        (b'{"rewards": [1, 0.5]}', [1, 0.5]),
        (b'{"rewards": [{"a": 1, "b": 2}, null]}', [3, None]),
        (b'{"rewards": [NaN, 1e999]}', [None, None]),
        (b'{"rewards": [true, "1"]}', [1, None]),
        (b'{"rewards": [1]}', [None, None]),
        (b'{"rewards": [1, 2, 3]}', [None, None]),
        (b'{"rewards": "ab"}', [None, None]),
        (b'{"rewards": {"a": 1, "b": 2}}', [None, None]),
        (b'{"scores": [1, 2]}', [None, None]),
        (b"[1, 2]", [None, None]),
        (b"", [None, None]),
        (b"<html>", [None, None]),
        (b'{"rewards": [1, 2]', [None, None]),
        (b"\xff\xfe", [None, None]),
        (b"[" * 100_000, [None, None]),
        (b'{"rewards": [' + b"9" * 5000 + b", 1]}", [None, None]),
    ],
)
def test_an_answer(answer: bytes, rewards: list[float | None]) -> None:
    outcomes = parse_rewards(answer, 2)
    assert [_reward(each) for each in outcomes] == rewards


def _reward(outcome: RewardOutcome) -> float | None:
    if isinstance(outcome, Score):
        return outcome.reward
    assert outcome.cause is Cause.REWARD_NOT_A_NUMBER
    return None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "url: Field required"),
        ({"url": "judge.example/score"}, "url: .*http or https"),
        ({"url": "file:///etc/passwd"}, "url: .*http or https"),
        ({"url": "https://"}, "url: .*http or https"),
        ({"url": "https://judge.example:port/"}, "url: "),
        ({"url": "https://name:secret@judge.example/"}, "url: .*without credentials"),
        ({"url": f"{URL}?key=secret"}, "url: .*without credentials, query"),
        ({"url": URL, "key_variable": "AWS_SECRET_ACCESS_KEY"}, "key_variable: "),
        ({"url": URL, "key_variable": "FIREWORKS_API_KEY"}, "key_variable: "),
        ({"url": URL, "key": "secret"}, "key: Extra inputs"),
    ],
)
def test_what_is_declared_wrongly(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(RewardError, match=reason) as refused:
        read_reward_service(RewardSpec(name="remote", arguments=arguments))
    assert "secret" not in str(refused.value)
