"""Roll out: sample a chunk of problems, score it, hand its part back. All chunks share one
window.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import ceil
from time import monotonic

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from blocks.checkpoint_store import CheckpointStore
from blocks.rollout_client import RolloutClient
from blocks.sampler import Sampler
from hotload.errors import RolloutsFailedError
from hotload.faults import Cause
from hotload.parts import PartPlan, RolloutPart, RolloutPlan
from hotload.spec import CycleSpec
from hotload.trajectories import ScoredGroup, TrajectoryGroup
from tasks.hand_back import read_part, write_part
from tasks.overlap import overlap
from tasks.retrying import RETRIED
from tasks.score import Scorer, open_scorer

# What another try may mend; a request that is refused, or too long, is so every time.
OUTAGES = frozenset(
    {
        Cause.TIMEOUT,
        Cause.OVERLOADED,
        Cause.SERVER_ERROR,
        Cause.CONNECTION,
        Cause.TRUNCATED,
        Cause.SWAP_TIMEOUT,
        Cause.MALFORMED,
        Cause.MISSING_TOKEN_IDS,
        Cause.MISSING_LOGPROBS,
    }
)


class Rollout:
    """What the chunks of one rollout share: the sampler with its window, the scorer, the store."""

    def __init__(
        self, plan: RolloutPlan, sampler: Sampler, scorer: Scorer, store: CheckpointStore
    ) -> None:
        self.plan = plan
        self._sampler = sampler
        self._scorer = scorer
        self._store = store
        self._started = monotonic()
        per_part = len(plan.parts[0].problems) * sampler.sampling.completions_per_prompt
        # Enough parts to fill the window twice; the others wait, so that memory stays bounded.
        parts = 1 + ceil(2 * sampler.widest / per_part)
        self._under_way = asyncio.Semaphore(parts)
        self._unwritten: dict[int, tuple[ScoredGroup, ...]] = {}

    @property
    def seconds(self) -> float:
        """Wall seconds since sampling could begin."""
        return monotonic() - self._started

    async def carry(self, part: PartPlan) -> RolloutPart:
        """Sample, score and write one part, or find that an earlier run has written it.

        Called again after the store failed, it writes what it has and samples nothing twice.
        """
        async with self._under_way:
            groups = self._unwritten.get(part.number)
            if groups is None:
                if found := await read_part(self._store, self.plan, part):
                    return found
                groups = await self._scorer.score(await self._sample(part))
                self._unwritten[part.number] = groups
            written = await write_part(self._store, self.plan, part, groups)
            del self._unwritten[part.number]
            return written

    async def _sample(self, part: PartPlan) -> list[TrajectoryGroup]:
        count = self._sampler.sampling.completions_per_prompt
        samples = await overlap(
            self._sampler.sample(problem, number)
            for problem in part.problems
            for number in range(count)
        )
        # Recorded, a part without one answer would count as done for ever.
        causes = Counter(sample.failure for sample in samples)
        if all(cause in OUTAGES for cause in causes):
            told = ", ".join(f"{cause} {count}" for cause, count in causes.items())
            raise RolloutsFailedError(self.plan.identity, told)
        return [
            TrajectoryGroup(problem, tuple(samples[i * count : (i + 1) * count]))
            for i, problem in enumerate(part.problems)
        ]

    def log_window(self) -> None:
        """Say what the window did, in the flow run's log."""
        report = self._sampler.end_step()
        get_run_logger().info(
            "%d requests, window %d → %d, at most %d in flight, %d congested answers",
            report.requests,
            report.window,
            report.window_after,
            report.max_in_flight,
            report.congestion_responses,
        )


@asynccontextmanager
async def open_rollout(
    spec: CycleSpec,
    plan: RolloutPlan,
    client: RolloutClient,
    store: CheckpointStore,
    replica_count: int | None,
) -> AsyncIterator[Rollout]:
    """What the chunks of `plan` share, for as long as they run in this event loop.

    Args:
        replica_count: for the window's first size; `None` is not known.

    Raises:
        RewardError: the reward cannot be used; nothing was sampled.
        ServiceRefusedError: there is no API key.
    """
    async with (
        open_scorer(spec.reward) as scorer,
        client.session(
            spec.sampling,
            identity=plan.identity,
            policy_version=plan.policy_version,
            replica_count=replica_count,
            swap_timeout_seconds=spec.readiness.weight_sync_timeout,
        ) as sampler,
    ):
        yield Rollout(plan, sampler, scorer, store)


# A retry writes what was sampled; only the sampler's own budget repeats a request.
@task(cache_policy=NO_CACHE, task_run_name="roll-out-{number}", **RETRIED)
async def roll_out_chunk(rollout: Rollout, number: int) -> RolloutPart:
    """One part of the rollout in the store, and the counts of what is in it.

    Raises:
        ServiceRefusedError: key, names or billing are wrong: no sample can succeed.
        StoreError: the store refuses.
        RolloutsFailedError: not one sample of the part got an answer; nothing is recorded.
    """
    part = await rollout.carry(rollout.plan.parts[number])
    get_run_logger().info(
        "%d samples, %d failed, %d bytes",
        part.sample_count,
        sum(part.failed_samples.values()),
        part.size_bytes,
    )
    return part
