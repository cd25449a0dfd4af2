"""The gate by samples: asks canaries and the rest the same, scores both; numbers decide."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, replace
from itertools import cycle

from agent.door.canary import CanarySnapshot
from agent.door.gate_file import GateSpec
from agent.door.gate_verdict import GateVerdict, SampledSide, judge_samples
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.clients.inference.sampler import Sampler
from hotload.concurrently import both, overlap
from hotload.reward.answers import check_answers
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import (
    Problem,
    ScoredGroup,
    Trajectory,
    TrajectoryGroup,
    Weights,
)
from hotload.sampling.draw import Drawing, load_rollout
from hotload.sampling.problems import read_problems
from hotload.sampling.reward.scorer import Scorer, open_scorer

KEY_VARIABLE = "HOTLOAD_GATE_KEY"
BASE = "base"  # what agents call base weights
SWAP_SECONDS = 60.0  # nothing is swapped while a gate asks; a reload that was late may end
UNTOLD = {Cause.MISSING_LOGPROBS, Cause.MISSING_TOKEN_IDS}


@dataclass(frozen=True, slots=True)
class SampleGate:
    """Judges a canary by samples of the servers themselves, as a file declares; called like any
    gate."""

    spec: GateSpec
    problems: tuple[Problem, ...]

    @classmethod
    async def open(cls, spec: GateSpec) -> SampleGate:
        """Read the problems, and see that reward and rollout function can be used.

        Raises:
            InvalidProblemsError, RewardError, RolloutFunctionError: they cannot.
            StoreUnavailableError: the dataset's store is away.
        """
        declared = spec.problems
        problems = await asyncio.to_thread(
            read_problems,
            declared.dataset,
            prompt_field=declared.prompt_field,
            answer_field=declared.answer_field,
            max_rows=declared.max_rows,
        )
        if spec.sampling.rollout is not None:
            load_rollout(spec.sampling.rollout)
        async with open_scorer(spec.reward):
            check_answers(declared, problems, spec.reward)
        return cls(spec, problems)

    async def __call__(self, snapshot: CanarySnapshot) -> GateVerdict:
        """Sample both sides at once, and judge.

        Raises:
            ValueError: there is nobody to compare with, or nobody else.
            ServiceError: a server cannot be asked at all.
            RewardError: no sample can be scored.
        """
        if not snapshot.other_servers:
            raise ValueError("no other agent is ready with what was served before")
        if same := {*snapshot.servers} & {*snapshot.other_servers}:
            one = min(same)
            raise ValueError(f"{one} is said to answer for canaries and others: --serves of agents")
        async with open_scorer(self.spec.reward) as scorer:
            canaries, rest = await both(
                self._sample(snapshot.servers, snapshot.identity, scorer),
                self._sample(snapshot.other_servers, snapshot.served_before or BASE, scorer),
            )
        # Millions of tokens may be compared: meanwhile the door has to answer.
        return await asyncio.to_thread(judge_samples, self.spec.limits, canaries, rest)

    async def _sample(self, servers: Sequence[str], identity: str, scorer: Scorer) -> SampledSide:
        """Sample and score every problem by one of the servers; what is under way when too many
        have failed is given up."""
        groups: dict[str, ScoredGroup] = {}
        asked_count = len(self.problems) * self.spec.sampling.completions_per_prompt
        failed_count = 0

        async def take(problem: Problem, sampler: Sampler) -> None:
            nonlocal failed_count
            group = groups[problem.id] = await self._ask(problem, sampler, scorer)
            failed_count += SampledSide({problem.id: group}, asked_count).causes.total()
            if failed_count > self.spec.limits.max_failure_rate * asked_count:
                raise _DecidedError

        async with AsyncExitStack() as stack:
            samplers = [
                await stack.enter_async_context(self._session(url, identity)) for url in servers
            ]
            with suppress(_DecidedError):
                await overlap(map(take, self.problems, cycle(samplers)))
        return SampledSide(groups, asked_count)

    def _session(self, url: str, identity: str) -> AbstractAsyncContextManager[Sampler]:
        spec = self.spec
        access = Access(
            account_id="gate",
            model_id=spec.model,
            deployment_id="gate",
            base_url=url,
            api_key=os.environ.get(KEY_VARIABLE, ""),
            block="of the gate",
            dialect="plain",
        )
        client = InferenceClient(access, engine=spec.engine, path_prefix=spec.path_prefix)
        # The version is part of every seed: with one for all, both sides get the same seeds.
        return client.session(
            spec.sampling, identity=identity, policy_version=0, swap_timeout_seconds=SWAP_SECONDS
        )

    async def _ask(self, problem: Problem, sampler: Sampler, scorer: Scorer) -> ScoredGroup:
        numbers = range(self.spec.sampling.completions_per_prompt)
        samples = await overlap(self._draw(problem, number, sampler) for number in numbers)
        return await scorer.score_group(TrajectoryGroup(problem, tuple(samples)))

    async def _draw(self, problem: Problem, number: int, sampler: Sampler) -> Trajectory:
        if (rollout := self.spec.sampling.rollout) is not None:
            sample = await Drawing(rollout, sampler.converse).begin(problem, number).answer()
        else:
            conversation = sampler.converse(problem, number)
            answer, failure = await conversation.ask(problem, self.spec.sampling)
            sample = conversation.trajectory()
            if failure is not None and failure.cause in UNTOLD:
                # A trainer could not learn from it; a reward can score it.
                sample = replace(sample, text=answer.text, failure=None, detail="")
        if sample.failure is None and sample.weights in (Weights.OTHER, Weights.STRADDLING):
            return replace(sample, failure=Cause.OTHER_WEIGHTS.value)
        return sample


class _DecidedError(Exception):
    """So many samples have failed that the verdict is known."""
