"""Reward calls: how a group is shared out to the calls of a declared reward."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hotload.reward.outcome import Outcome
from hotload.rollout.trajectory import Problem, Trajectory
from hotload.sampling.concurrently import overlap
from hotload.spec import RewardSpec

Call = Callable[[Problem, Sequence[Trajectory]], Coroutine[Any, Any, list[Outcome]]]


async def judge_by_calls(
    reward: RewardSpec, call: Call, problem: Problem, samples: Sequence[Trajectory]
) -> list[Outcome]:
    """An outcome for each sample: by one call where the spec says `per_group`, else by one each."""
    if reward.per_group:
        return await call(problem, samples)
    answers = await overlap(call(problem, (sample,)) for sample in samples)
    return [outcome for answer in answers for outcome in answer]
