"""A reward service over HTTP: one JSON request for some trajectories of one problem, one reward for
each in the answer.

Request::

    {"problem": {"id", "prompt", "messages", "answer", "extra"},
     "trajectories": [{"sample_number", "text", "finish_reason", "completion_token_count",
                       "turn_count", "transcript"}],
     "arguments": {…}}

Answer: `{"rewards": [0.5, {"format": 1, "answer": 0}]}`, each a number or named parts, as a reward
function returns them; `null` for one that has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, ValidationError, field_validator

from hotload.errors import RewardError
from hotload.options import Declared, RewardSpec
from hotload.reward.outcome import RewardOutcome, Unscored, read_outcomes
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import Problem, Trajectory


class RewardService(Declared):
    """The `arguments` of a remote reward."""

    url: str = Field(max_length=2048)
    """Where to POST; without credentials and without a query."""
    key_variable: str | None = Field(None, pattern=r"^REWARD_[A-Z0-9_]{1,64}$")
    """The variable of the environment whose value is sent as bearer token. Its name begins with
    `REWARD_`, so that whoever declares a cycle cannot have another secret sent away."""
    arguments: dict[str, JsonValue] = Field({})
    """Sent along with every request."""

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("expected an http or https address")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("expected an address without credentials, query or fragment")
        return url


def read_reward_service(reward: RewardSpec) -> RewardService:
    """Read the service a declared reward names.

    Raises:
        RewardError: naming the argument that is wrong.
    """
    try:
        return RewardService.model_validate(reward.arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise RewardError(reward.name, f"{place}: {first['msg']}") from None


def request_body(
    problem: Problem, samples: Sequence[Trajectory], arguments: Mapping[str, JsonValue]
) -> bytes:
    """Write the body of one request; it holds no token ids and no log-probabilities."""
    body = {
        "problem": {
            "id": problem.id,
            "prompt": problem.prompt,
            "messages": problem.messages,
            "answer": problem.answer,
            "extra": dict(problem.extra),
        },
        "trajectories": [
            {
                "sample_number": sample.sample_number,
                "text": sample.text,
                "finish_reason": sample.finish_reason,
                "completion_token_count": sample.completion_token_count,
                "turn_count": sample.turn_count,
                "transcript": sample.transcript,
            }
            for sample in samples
        ],
        "arguments": dict(arguments),
    }
    return json.dumps(body).encode()


def parse_rewards(data: bytes, count: int) -> list[RewardOutcome]:
    """Parse the outcomes in a good answer, one for each of `count` trajectories."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or "rewards" not in answer:
        reason = "the service's answer is no JSON object with `rewards`"
        return [Unscored(Cause.REWARD_NOT_A_NUMBER, reason)] * count
    return read_outcomes(answer["rewards"], count)
