"""What a gate makes of the samples of canaries and of the rest: numbers in, a verdict out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from agent.door.gate_verdict import GateLimits, SampledSide, judge_samples
from hotload.rollout.trajectory import Trajectory
from tests.factories import scored_group, segment, trajectory

TOKENS = (5, 6, 7, 8, 9, 10, 11, 12)


def side(
    rewards_P: Sequence[float | None],
    *,
    tokens: Sequence[int] = TOKENS,
    logprob: float = -0.5,
    asked_count: int | None = None,
    **fields: Any,
) -> SampledSide:
    """One sample for each problem; one without a reward has failed."""

    def sample(number: int, reward: float | None) -> Trajectory:
        failure = "refused" if reward is None else None
        one = segment(tokens, logprobs=[logprob] * len(tokens))
        made = {"problem_id": f"p{number}", "failure": failure} | fields
        return trajectory(one, **made)

    groups = {
        f"p{number}": scored_group(sample(number, reward), rewards=[reward])
        for number, reward in enumerate(rewards_P)
    }
    return SampledSide(groups, asked_count or len(groups))


def test_the_same_samples_pass() -> None:
    rewards = [number % 2 for number in range(40)]
    verdict = judge_samples(GateLimits(max_divergence=0.01), side(rewards), side(rewards))
    assert verdict.is_good, verdict.reason
    assert verdict.reason == (
        "reward 0.5, of the rest 0.5, difference +0 ± 0 over 40 problems;"
        " 0 of 40 samples failed; divergence 0 nats a token over 320 tokens"
    )


def test_noise_alone_does_not_refuse_and_a_drop_does() -> None:
    random = np.random.default_rng(0)

    def refused(drop: float) -> int:
        """Of 200 canaries whose chance of a reward is lower by so much than the rest's 0.6."""
        count = 0
        for _ in range(200):
            ours, theirs = random.random(60) < 0.6 - drop, random.random(60) < 0.6
            verdict = judge_samples(
                GateLimits(), side([*map(float, ours)]), side([*map(float, theirs)])
            )
            count += not verdict.is_good
        return count

    assert refused(0.0) < 200 * 0.06
    assert refused(0.3) > 200 * 0.85
    assert refused(-0.1) < 200 * 0.03


def test_a_drop_that_is_allowed_passes() -> None:
    ours, theirs = side([0.5] * 20), side([0.6] * 20)
    verdict = judge_samples(GateLimits(), ours, theirs)
    assert not verdict.is_good
    assert verdict.is_about_bytes
    assert verdict.reason.startswith("reward is 0.1 below that of the rest, more than max_reward")
    assert judge_samples(GateLimits(max_reward_drop=0.11), ours, theirs).is_good


def test_a_reward_below_the_declared_one_is_refused_whatever_the_rest_has() -> None:
    low = side([0.25] * 20)
    verdict = judge_samples(GateLimits(min_reward=0.3), low, low)
    assert verdict.reason.startswith("reward 0.25 is below min_reward 0.3; reward 0.25, of the")
    assert judge_samples(GateLimits(min_reward=0.25), low, low).is_good


def test_failed_samples_are_counted_among_all_that_were_asked_for() -> None:
    rest = side([1.0] * 50)
    ours = side([None, *[1.0] * 49])
    assert judge_samples(GateLimits(max_failure_rate=0.02), ours, rest).is_good
    verdict = judge_samples(GateLimits(max_failure_rate=0.01), ours, rest)
    assert (verdict.is_good, verdict.is_about_bytes) == (False, True)
    assert verdict.reason == "1 of 50 samples (1 refused) failed; max_failure_rate is 1.00%"
    # Given up early: those that had not ended are not taken for good ones, nor for failed.
    early = side([None] * 3, asked_count=50)
    assert judge_samples(GateLimits(max_failure_rate=0.06), early, rest).reason.startswith("0 prob")
    assert "3 of 50" in judge_samples(GateLimits(max_failure_rate=0.05), early, rest).reason


def test_where_the_rest_fails_too_nothing_is_said_of_the_bytes() -> None:
    broken = side([None] * 30)
    for limits, ours in (
        (GateLimits(), broken),
        (GateLimits(max_failure_rate=0.9), side([1.0] * 30)),
    ):
        verdict = judge_samples(limits, ours, broken)
        assert (verdict.is_good, verdict.is_about_bytes) == (False, False), verdict.reason
        assert "of the rest 30 of 30 samples (30 refused)" in verdict.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_a_failed_sample(value: float) -> None:
    rest = side([1.0] * 20)
    verdict = judge_samples(GateLimits(), side([value] * 20), rest)
    assert "20 of 20 samples (20 reward_not_a_number) failed" in verdict.reason
    verdict = judge_samples(GateLimits(), side([1.0] * 20, logprob=value), rest)
    assert "20 of 20 samples (20 logprob_not_a_number) failed" in verdict.reason
    verdict = judge_samples(GateLimits(), rest, side([value] * 20))
    assert (verdict.is_good, verdict.is_about_bytes) == (False, False)


def test_the_divergence_is_that_of_the_tokens_both_gave_in_one_context() -> None:
    rest = side([1.0] * 20, logprob=-0.5)
    ours = side([1.0] * 20, logprob=-0.9, tokens=[*TOKENS[:5], 99, 11, 12])
    ratio = 0.4  # log p of the rest − log p of the canaries
    expected = math.exp(ratio) - 1 - ratio
    verdict = judge_samples(GateLimits(max_divergence=expected * 1.001), ours, rest)
    assert verdict.is_good
    assert "divergence 0.0918 nats a token over 100 tokens" in verdict.reason
    verdict = judge_samples(GateLimits(max_divergence=expected * 0.999), ours, rest)
    assert (verdict.is_good, verdict.is_about_bytes) == (False, True)
    assert verdict.reason.startswith("divergence 0.0918 nats a token over 100 tokens, max_div")


def test_a_token_that_a_tool_said_is_not_compared() -> None:
    def with_tool(logprob: float) -> SampledSide:
        one = segment(TOKENS, logprobs=[logprob] * 8, mask=[True] * 6 + [False] * 2)
        groups = {
            f"p{n}": scored_group(trajectory(one, problem_id=f"p{n}"), rewards=[1.0])
            for n in range(20)
        }
        return SampledSide(groups, 20)

    assert "over 120 tokens" in judge_samples(GateLimits(), with_tool(-1), with_tool(-2)).reason


def test_too_few_tokens_are_told_and_refused_where_a_divergence_is_declared() -> None:
    rest, ours = side([1.0] * 20), side([1.0] * 20, tokens=[*TOKENS[:4], 99, 1, 2, 3])
    words = "divergence is not known, 80 tokens were the same; 100 are needed"
    verdict = judge_samples(GateLimits(), ours, rest)
    assert verdict.is_good
    assert verdict.reason.endswith(words)
    verdict = judge_samples(GateLimits(max_divergence=1.0), ours, rest)
    assert not verdict.is_good
    assert verdict.reason.startswith(words)
    untold = side([1.0] * 20, tokens=())
    told = judge_samples(GateLimits(max_divergence=1.0), untold, untold)
    assert "the servers tell no log-probabilities" in told.reason
    assert not told.is_good
