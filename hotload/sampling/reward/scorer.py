"""Score: a reward and an advantage for every sample that has an answer.

Quick built-ins run here, remote services are asked from here; a user's own reward runs in processes
of its own. Each under a time limit where it needs one, so that a reward that hangs, raises, dies or
returns nonsense costs one sample, marked, and never a batch.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from hotload.concurrently import overlap
from hotload.errors import RewardError
from hotload.options import RewardSpec
from hotload.reward.advantages import advantages
from hotload.reward.built_ins import BUILT_INS, QUICK_BUILT_INS
from hotload.reward.outcome import (
    REMOTE,
    WEIGHTED_SUM,
    RewardOutcome,
    Score,
    Unscored,
    check_arguments,
    load_reward,
    read_outcome,
)
from hotload.reward.weighted_sum import sum_weighted, weighted_parts
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import Problem, ScoredGroup, Trajectory, TrajectoryGroup
from hotload.sampling.reward.processes import RewardProcesses
from hotload.sampling.reward.remote import RemoteReward
from hotload.sampling.reward.user_errors import DETAIL_LIMIT_CHARACTERS, replace_surrogates


class RewardSource(Protocol):
    """Gives rewards: a built-in, processes, a service or a weighted sum of them."""

    async def start(self) -> None:
        """Look at the reward before anything is sampled; raises RewardError."""

    async def score_samples(
        self, problem: Problem, samples: Sequence[Trajectory]
    ) -> list[RewardOutcome]:
        """Return a reward, or why there is none, for each sample of a group.

        Raises:
            RewardError: no sample can have one.
        """

    async def stop(self) -> None:
        """End what `start` began."""


class Scorer:
    """Scores groups by one declared reward; made by `open_scorer`."""

    def __init__(self, reward: RewardSpec, source: RewardSource) -> None:
        self._spec = reward
        self._source = source

    async def score_group(self, group: TrajectoryGroup) -> ScoredGroup:
        """Return the group with rewards and advantages; what could not be scored is marked with
        its cause. Samples that failed before are not scored, and a reward called per group does not
        see them.

        Raises:
            RewardError: the reward's service refuses the key.
        """
        answered = [one for one in group.trajectories_G if one.failure is None]
        outcomes = iter(
            await self._source.score_samples(group.problem, answered) if answered else ()
        )
        outcomes_G = [
            None if one.failure is not None else next(outcomes) for one in group.trajectories_G
        ]
        scores_G = [outcome if isinstance(outcome, Score) else None for outcome in outcomes_G]
        rewards_G = tuple(None if score is None else score.reward for score in scores_G)
        parts_G = tuple({} if score is None else score.parts for score in scores_G)
        return ScoredGroup(
            problem=group.problem,
            trajectories_G=tuple(
                _marked(one, outcome) if isinstance(outcome, Unscored) else one
                for one, outcome in zip(group.trajectories_G, outcomes_G, strict=True)
            ),
            rewards_G=rewards_G,
            advantages_G=advantages(rewards_G, self._spec.advantage),
            reward_parts_G=parts_G if any(parts_G) else (),
        )


@asynccontextmanager
async def open_scorer(reward: RewardSpec) -> AsyncIterator[Scorer]:
    """Open a scorer and check its reward; its processes and connections end with it.

    Raises:
        RewardError: the reward is unknown or not importable, it cannot take the declared arguments,
            or it asks for a variable of the environment that is not set.
    """
    source = _reward_source(reward)
    try:
        await source.start()
        yield Scorer(reward, source)
    finally:
        await source.stop()


def _reward_source(reward: RewardSpec) -> RewardSource:
    if reward.name == WEIGHTED_SUM:
        return _WeightedSum(reward)
    if reward.name == REMOTE:
        return RemoteReward(reward)
    if reward.name in BUILT_INS or ":" not in reward.name:
        return _BuiltIn(reward)
    return RewardProcesses.of(reward)


def _marked(sample: Trajectory, outcome: Unscored) -> Trajectory:
    detail = replace_surrogates(outcome.detail[:DETAIL_LIMIT_CHARACTERS])
    return replace(sample, failure=outcome.cause.value, detail=detail)


class _BuiltIn:
    """Runs a built-in in this process if it is quick, else in one that can be ended."""

    def __init__(self, reward: RewardSpec) -> None:
        self._spec = reward
        self._elsewhere = None if reward.name in QUICK_BUILT_INS else RewardProcesses.of(reward)

    async def start(self) -> None:
        self._reward = load_reward(self._spec.name)
        if self._spec.per_group:
            raise RewardError(self._spec.name, "it looks at one sample: leave out `per_group`")
        if self._elsewhere is not None:
            await self._elsewhere.start()  # which looks at the arguments there
        else:
            check_arguments(self._spec.name, self._reward, self._spec.arguments)

    async def score_samples(
        self, problem: Problem, samples: Sequence[Trajectory]
    ) -> list[RewardOutcome]:
        if self._elsewhere is not None:
            return await self._elsewhere.score_samples(problem, samples)
        return [self._call(problem, sample) for sample in samples]

    def _call(self, problem: Problem, sample: Trajectory) -> RewardOutcome:
        try:
            return read_outcome(self._reward(problem, sample, **self._spec.arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, the sample is what failed
            return Unscored(Cause.REWARD_RAISED, f"{type(error).__name__}: {error}")

    async def stop(self) -> None:
        if self._elsewhere is not None:
            await self._elsewhere.stop()


class _WeightedSum:
    """Adds up several rewards, which run where they belong."""

    def __init__(self, reward: RewardSpec) -> None:
        self._spec = reward
        self._opened = AsyncExitStack()

    async def start(self) -> None:
        self._parts = weighted_parts(self._spec)
        self._sources = [_reward_source(part.reward) for part in self._parts]
        for source in self._sources:
            self._opened.push_async_callback(source.stop)
            await source.start()

    async def score_samples(
        self, problem: Problem, samples: Sequence[Trajectory]
    ) -> list[RewardOutcome]:
        by_part = await overlap(source.score_samples(problem, samples) for source in self._sources)
        return [sum_weighted(self._parts, outcomes) for outcomes in zip(*by_part, strict=True)]

    async def stop(self) -> None:
        await self._opened.aclose()
