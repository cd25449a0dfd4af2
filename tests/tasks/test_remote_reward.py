"""Remote rewards against a server that answers byte for byte as a script says."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hotload.errors import RewardError
from hotload.options import RewardSpec
from hotload.reward.outcome import RewardOutcome, Score, Unscored
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import Problem, Trajectory, TrajectoryGroup
from hotload.sampling.reward.remote import RemoteReward
from hotload.sampling.reward.scorer import open_scorer
from tests.blocks.scripted_inference import Naps
from tests.factories import trajectory
from tests.scripted_server import Request, ScriptedServer, http, never

KEY = "key-of-the-judge"
PROBLEM = Problem("p", "1 + 1 =", answer="2")


def samples(count: int = 1) -> list[Trajectory]:
    return [trajectory(number=n, text=f"text {n}") for n in range(count)]


def answer(*rewards: Any, **headers: str) -> bytes:
    return http(json.dumps({"rewards": rewards}).encode(), content_type="application/json")


def declared(script: ScriptedServer, **fields: Any) -> RewardSpec:
    arguments = {"url": f"http://127.0.0.1:{script.port}/v1/score", **fields.pop("arguments", {})}
    return RewardSpec(name="remote", arguments=arguments, **fields)


@asynccontextmanager
async def asking(
    *replies: bytes, **fields: Any
) -> AsyncIterator[tuple[RemoteReward, ScriptedServer, Naps]]:
    naps = Naps()
    async with ScriptedServer(*replies).running() as script:
        reward = RemoteReward(declared(script, **fields), naps, lambda: 0.5)
        await reward.start()
        try:
            yield reward, script, naps
        finally:
            await reward.stop()


async def test_one_request_for_each_sample() -> None:
    arguments = {"arguments": {"rubric": "tone"}}
    async with asking(answer(0.5), arguments=arguments) as (reward, script, _):
        assert await reward.score_samples(PROBLEM, samples(3)) == [Score(0.5)] * 3
    assert [request.path for request in script.requests] == ["/v1/score"] * 3
    bodies = [request.body for request in script.requests]
    assert sorted(body["trajectories"][0]["text"] for body in bodies) == [
        "text 0",
        "text 1",
        "text 2",
    ]
    assert all(body["arguments"] == {"rubric": "tone"} for body in bodies)
    assert all("authorization" not in request.headers for request in script.requests)


async def test_one_request_for_a_group() -> None:
    replies = answer(1, {"tone": 0.25, "facts": 0.5}, None)
    async with asking(replies, per_group=True) as (reward, script, _):
        first, second, third = await reward.score_samples(PROBLEM, samples(3))
    assert (first, second) == (Score(1), Score(0.75, {"tone": 0.25, "facts": 0.5}))
    assert isinstance(third, Unscored)
    assert len(script.requests) == 1


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_JUDGE_KEY", f" {KEY}\n")
    arguments = {"key_variable": "REWARD_JUDGE_KEY"}
    refused = http(f"no such key: {KEY}".encode(), status=401)
    async with asking(answer(1), refused, arguments=arguments) as (reward, script, _):
        assert await reward.score_samples(PROBLEM, samples()) == [Score(1)]
        assert script.requests[0].headers["authorization"] == f"Bearer {KEY}"
        with pytest.raises(
            RewardError, match="HTTP 401: mend the key in REWARD_JUDGE_KEY"
        ) as caught:
            await reward.score_samples(PROBLEM, samples(2))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_a_service_that_lets_nobody_in_marks_no_sample(status: int) -> None:
    async with ScriptedServer(http(b"", status=status)).running() as script:
        remote = {"name": "remote", "arguments": dict(declared(script).arguments)}
        parts = [{"name": "exact_match"}, remote]
        spec = RewardSpec(name="weighted_sum", arguments={"parts": parts})
        async with open_scorer(spec) as scorer:
            with pytest.raises(
                RewardError, match=f"HTTP {status}: mend the service's `key_variable`"
            ):
                await scorer.score_group(TrajectoryGroup(PROBLEM, tuple(samples(2))))


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines", "schlüssel"])
async def test_a_key_that_cannot_be_sent(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("REWARD_JUDGE_KEY", raising=False)
    else:
        monkeypatch.setenv("REWARD_JUDGE_KEY", value)
    arguments = {"url": "https://judge.example", "key_variable": "REWARD_JUDGE_KEY"}
    with pytest.raises(RewardError, match="REWARD_JUDGE_KEY holds no key"):
        async with open_scorer(RewardSpec(name="remote", arguments=arguments)):
            pass


CUT = http(b'{"rewards": [1', length=50)


@pytest.mark.parametrize(
    ("replies", "requests", "waits", "outcome"),
    [
        ([http(b"", 503), answer(1)], 2, [2], Score(1)),
        ([http(b"", 429, retry_after="7"), answer(1)], 2, [7], Score(1)),
        ([http(b"", 429, retry_after="soon"), answer(1)], 2, [2], Score(1)),
        ([CUT, http(b"", 500), answer(1)], 3, [2, 4], Score(1)),
        ([b"not HTTP\r\n\r\n", answer(1)], 2, [2], Score(1)),
        ([http(b"", 500)], 7, [2, 4, 8, 16, 30, 30], "HTTP 500"),
        ([http(b"", 404)], 1, [], "HTTP 404"),
        ([http(b"", 307, location="/elsewhere")], 1, [], "HTTP 307"),
    ],
)
async def test_one_layer_of_attempts(
    replies: list[bytes], requests: int, waits: list[float], outcome: Score | str
) -> None:
    async with asking(*replies, timeout_seconds=600) as (reward, script, naps):
        (found,) = await reward.score_samples(PROBLEM, samples())
    expected: RewardOutcome = (
        Unscored(Cause.REWARD_UNAVAILABLE, outcome) if isinstance(outcome, str) else outcome
    )
    assert found == expected
    assert len(script.requests) == requests
    assert naps.seconds == waits


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        (http(b"", 400), "HTTP 400"),
        (http(b"", 413), "HTTP 413"),
        (http(b" " * (1 << 21)), "an answer of more than 1048576 bytes"),
    ],
)
async def test_what_a_service_will_not_score_is_no_outage(reply: bytes, detail: str) -> None:
    async with asking(reply) as (reward, script, naps):
        (found,) = await reward.score_samples(PROBLEM, samples())
    assert found == Unscored(Cause.REWARD_REFUSED, detail)
    assert (len(script.requests), naps.seconds) == (1, [])


async def test_nothing_is_waited_for_that_would_come_too_late() -> None:
    async with asking(http(b"", 503), timeout_seconds=5) as (reward, script, naps):
        (found,) = await reward.score_samples(PROBLEM, samples())
        assert found == Unscored(Cause.REWARD_UNAVAILABLE, "HTTP 503")
        # The naps take no time here: 2 s and 4 s are within the limit, 8 s are not.
        assert (len(script.requests), naps.seconds) == (3, [2, 4])


async def test_a_service_that_hangs() -> None:
    async def hangs(request: Request) -> AsyncIterator[bytes]:
        yield http(b"{", length=50)
        await never()

    async with (
        ScriptedServer(hangs).running() as script,
        open_scorer(declared(script, timeout_seconds=0.3)) as scorer,
    ):
        scored = await scorer.score_group(TrajectoryGroup(PROBLEM, tuple(samples(2))))
    assert {each.failure for each in scored.trajectories_G} == {"reward_timeout"}
    assert {each.detail for each in scored.trajectories_G} == {"no reward within 0.3 s"}


async def test_nobody_listens() -> None:
    async with ScriptedServer(b"").running() as script:
        spec = declared(script, timeout_seconds=1)
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(TrajectoryGroup(PROBLEM, tuple(samples())))
    assert scored.trajectories_G[0].failure == "reward_unavailable"
    assert scored.trajectories_G[0].detail == "ClientConnectorError"


async def test_a_remote_part_of_a_weighted_sum() -> None:
    async with ScriptedServer(answer({"tone": 0.5})).running() as script:
        parts = [
            {"name": "exact_match"},
            {"name": "remote", "weight": 2, "arguments": dict(declared(script).arguments)},
        ]
        spec = RewardSpec(name="weighted_sum", arguments={"parts": parts})
        async with open_scorer(spec) as scorer:
            scored = await scorer.score_group(TrajectoryGroup(PROBLEM, tuple(samples())))
    assert scored.rewards_G == (1,)
    assert scored.reward_parts_G == ({"exact_match": 0, "remote": 0.5, "remote/tone": 0.5},)
