"""What a gate says, and what follows from the samples of canaries and of the rest. Pure.

Both were asked the same problems with the same seeds, so the samples are compared in pairs: the
rewards problem by problem, the log-probabilities token by token up to the first token that differs,
because so far both had the same context.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean, stdev

from pydantic import Field

from hotload.dataset.logprob_drift import measure_drift
from hotload.options import Declared
from hotload.rollout.trajectory import ScoredGroup, Trajectory

PROBLEMS_NEEDED = 20
"""With fewer, the standard error is itself noise."""
TOKENS_NEEDED = 100
STANDARD_ERRORS = 2.0
CAUSES_SHOWN = 4


class GateLimits(Declared):
    """How far canaries may lie from the rest, and from nothing."""

    max_failure_rate: float = Field(0.02, ge=0, lt=1, allow_inf_nan=False)
    """Share of the canaries' samples that may fail: without a usable answer, or without a reward
    that is a number."""
    min_reward: float | None = Field(None, allow_inf_nan=False)
    """Mean reward that the canaries have to reach, whatever the rest does."""
    max_reward_drop: float = Field(0.0, ge=0, allow_inf_nan=False)
    """How far the canaries' mean reward may lie below that of the rest, once two standard errors of
    the difference are granted."""
    max_divergence: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Nats a token, the mean of exp(r) − 1 − r with r = log p of the rest − log p of the canaries,
    over the tokens that both gave in the same context."""


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """Whether a snapshot may go on, and why, with figures; a "no" that `is_about_bytes` holds for
    every other snapshot of the same content."""

    is_good: bool
    reason: str
    is_about_bytes: bool = True


@dataclass(frozen=True, slots=True)
class SampledSide:
    """Scored groups by problem, of those that had ended, and the number of samples asked for."""

    groups: Mapping[str, ScoredGroup]
    asked_count: int

    @property
    def causes(self) -> Counter[str]:
        """Why samples failed; a number that is none is a failure, too."""
        pairs = [pair for group in self.groups.values() for pair in _rewarded(group)]
        return Counter(cause for pair in pairs if (cause := _failure_of(*pair)))

    @property
    def failure_rate(self) -> float:
        """Share of failed samples among all that were asked for."""
        return self.causes.total() / self.asked_count

    def reward_of(self, problem: str) -> float | None:
        """Mean reward of the samples of a problem that have one."""
        group = self.groups.get(problem)
        rewards = [
            reward
            for sample, reward in (_rewarded(group) if group else ())
            if reward is not None and not _failure_of(sample, reward)
        ]
        return fmean(rewards) if rewards else None


def judge_samples(limits: GateLimits, canaries: SampledSide, rest: SampledSide) -> GateVerdict:
    """Hold the canaries' samples to the limits, by those of the rest.

    Where the rest does not answer either, the verdict is a "no" that says nothing of the bytes.
    """
    failed = f"{_failures(canaries)} failed"
    if canaries.failure_rate > limits.max_failure_rate:
        also = rest.failure_rate > limits.max_failure_rate
        beside = f"; of the rest {_failures(rest)}" if also else ""
        reason = f"{failed}{beside}; max_failure_rate is {limits.max_failure_rate:.2%}"
        return GateVerdict(False, reason, is_about_bytes=not also)
    pairs_P = [
        (ours, theirs)
        for problem in canaries.groups
        if (ours := canaries.reward_of(problem)) is not None
        and (theirs := rest.reward_of(problem)) is not None
    ]
    if len(pairs_P) < PROBLEMS_NEEDED:
        found = f"{len(pairs_P)} problems have rewards on both sides, {PROBLEMS_NEEDED} are needed"
        reason = f"{found}: of the rest {_failures(rest)} failed; of the canaries {failed}"
        return GateVerdict(False, reason, is_about_bytes=False)
    refusals = [*_reward_refusals(limits, pairs_P)]
    divergence, is_too_far = _divergence(limits, canaries, rest)
    figures = [_reward_figures(pairs_P), failed]
    (refusals if is_too_far else figures).append(divergence)
    return GateVerdict(not refusals, "; ".join([*refusals, *figures]))


def _reward_refusals(limits: GateLimits, pairs_P: list[tuple[float, float]]) -> Iterator[str]:
    reward = fmean(ours for ours, _ in pairs_P)
    if limits.min_reward is not None and reward < limits.min_reward:
        yield f"reward {reward:.4g} is below min_reward {limits.min_reward:g}"
    difference, error = _difference(pairs_P)
    if difference + STANDARD_ERRORS * error < -limits.max_reward_drop:
        allowed = f"max_reward_drop {limits.max_reward_drop:g} and two standard errors"
        yield f"reward is {-difference:.4g} below that of the rest, more than {allowed}"


def _difference(pairs_P: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of canaries less rest over the problems, and its standard error."""
    differences_P = [ours - theirs for ours, theirs in pairs_P]
    return fmean(differences_P), stdev(differences_P) / math.sqrt(len(differences_P))


def _reward_figures(pairs_P: list[tuple[float, float]]) -> str:
    difference, error = _difference(pairs_P)
    ours, theirs = (fmean(side) for side in zip(*pairs_P, strict=True))
    both = f"reward {ours:.4g}, of the rest {theirs:.4g}"
    return f"{both}, difference {difference:+.3g} ± {error:.2g} over {len(pairs_P)} problems"


def _divergence(limits: GateLimits, canaries: SampledSide, rest: SampledSide) -> tuple[str, bool]:
    """The divergence in words, and whether it is refused."""
    pairs = [
        pair
        for problem, group in canaries.groups.items()
        if (other := rest.groups.get(problem)) is not None
        for ours, theirs in zip(_rewarded(group), _rewarded(other), strict=True)
        if not _failure_of(*ours) and not _failure_of(*theirs)
        for pair in _same_tokens(ours[0], theirs[0])
    ]
    if len(pairs) < TOKENS_NEEDED:
        is_told = any(
            segment.token_ids_T
            for group in canaries.groups.values()
            for sample in group.trajectories_G
            for segment in sample.segments
        )
        why = "" if is_told else ": the servers tell no log-probabilities"
        words = f"divergence is not known, {len(pairs)} tokens were the same{why}"
        return f"{words}; {TOKENS_NEEDED} are needed", limits.max_divergence is not None
    ours_T, theirs_T = zip(*pairs, strict=True)
    drift = measure_drift(theirs_T, ours_T, [True] * len(pairs))
    assert drift is not None
    assert drift.k3 is not None
    words = f"divergence {drift.k3:.3g} nats a token over {len(pairs)} tokens"
    if limits.max_divergence is None or drift.k3 <= limits.max_divergence:
        return words, False
    return f"{words}, max_divergence is {limits.max_divergence:g}", True


def _same_tokens(ours: Trajectory, theirs: Trajectory) -> Iterator[tuple[float, float]]:
    """The log-probabilities by both of the tokens that both sampled in the same context."""
    one, other = ours.segments[0], theirs.segments[0]
    if one.prompt_token_ids != other.prompt_token_ids:
        return
    tokens = zip(
        zip(one.token_ids_T, one.loss_mask_T, strict=True),
        zip(other.token_ids_T, other.loss_mask_T, strict=True),
        zip(one.sampling_logprobs_T, other.sampling_logprobs_T, strict=False),
        strict=False,
    )
    for (_, is_sampled), _, logprobs in takewhile(lambda both: both[0] == both[1], tokens):
        if is_sampled:
            yield logprobs


def _rewarded(group: ScoredGroup) -> list[tuple[Trajectory, float | None]]:
    return list(zip(group.trajectories_G, group.rewards_G, strict=True))


def _failure_of(sample: Trajectory, reward: float | None) -> str | None:
    if sample.failure is not None:
        return sample.failure
    if reward is None or not math.isfinite(reward):
        return "reward_not_a_number"
    told = [value for segment in sample.segments for value in segment.sampling_logprobs_T]
    return None if all(map(math.isfinite, told)) else "logprob_not_a_number"


def _failures(side: SampledSide) -> str:
    """`3 of 80 samples (2 timeout, 1 refused)`."""
    causes = side.causes
    words = f"{causes.total()} of {side.asked_count} samples"
    shown = ", ".join(f"{count} {cause}" for cause, count in causes.most_common(CAUSES_SHOWN))
    return f"{words} ({shown})" if shown else words
