"""Divide a group among the calls of a declared reward."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hotload.concurrently import overlap
from hotload.options import RewardSpec
from hotload.reward.outcome import RewardOutcome
from hotload.rollout.trajectory import Problem, Trajectory

RewardCall = Callable[[Problem, Sequence[Trajectory]], Coroutine[Any, Any, list[RewardOutcome]]]


async def score_by_calls(
    reward: RewardSpec, call: RewardCall, problem: Problem, samples: Sequence[Trajectory]
) -> list[RewardOutcome]:
    """Score samples by one call where the spec says `per_group`, else by one call each."""
    if reward.per_group:
        return await call(problem, samples)
    answers = await overlap(call(problem, (sample,)) for sample in samples)
    return [outcome for answer in answers for outcome in answer]
