"""Roll out: sample a chunk of problems, score its groups, hand its part back as they finish. All
chunks that one event loop samples share one window, one gate and one breaker.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from hotload.clients.inference.sampler import InferenceSource, Sampler
from hotload.clients.service.client import HotLoadClient
from hotload.clients.store.store import Store
from hotload.concurrently import RunLogger, all_or_none, beside
from hotload.dataset.rollout_plan import RolloutPart, RolloutPlan
from hotload.errors import StoreError, StoreUnavailableError
from hotload.rollout.admission import Admission
from hotload.rollout.breaker import Breaker
from hotload.rollout.failures import Cause
from hotload.rollout.group_rules import (
    GroupTally,
    JudgedGroup,
    SettledGroup,
    is_outage,
    judge_group,
    stale_group,
)
from hotload.rollout.trajectory import Problem, TrajectoryGroup
from hotload.rollout.window import TracePoint, Window
from hotload.sampling.draw import Drawing
from hotload.sampling.earlier_manifest import named_parts
from hotload.sampling.part_carrier import CarriedPart, PartCarrier, RolloutState, Together
from hotload.sampling.part_writer import PartWriter
from hotload.sampling.reward.scorer import Scorer, open_scorer
from hotload.sampling.row_gate import Gate
from hotload.sampling.sample_group import GroupSampler
from hotload.sampling.stamp import Stamp
from hotload.sampling.watch_versions import VersionWatch, put_stamp
from hotload.spec import CycleSpec

SECONDS_BETWEEN_WRITES = 10.0

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampledService:
    """A service that is sampled from: what it serves, on how many replicas, if that is known, and
    its share.

    `watched` is asked for newer versions, where the spec allows the next cycle to publish while
    this one samples.
    """

    client: InferenceSource
    identity: str
    replica_count: int | None = None
    weight: float = 1.0
    watched: HotLoadClient | None = None
    name: str = ""
    """Of its block, by which a node opens it."""


class Rollout(PartCarrier):
    """What the chunks share that are sampled in one event loop: the sampler with its window, the
    scorer, the store.

    Args:
        numbers: of the parts that are sampled here; all without any.
        together: with the rollouts of the other parts.

    Raises:
        RolloutFunctionError: the spec names a rollout function that cannot be used.
    """

    def __init__(
        self,
        plan: RolloutPlan,
        sampler: Sampler,
        scorer: Scorer,
        store: Store,
        logger: RunLogger = LOGGER,
        *,
        numbers: Collection[int] | None = None,
        together: Together | None = None,
    ) -> None:
        parts = [part for part in plan.parts if numbers is None or part.number in numbers]
        together = together or Together(plan, store, logger)
        super().__init__(plan, {part.number for part in parts}, sampler.breaker, together)
        self._logger = logger
        self._sampler = sampler
        self._scorer = scorer
        self._store = store
        self._rules = sampler.sampling.groups
        admission = Admission(
            group_size=plan.group_size,
            batch_size=sum(len(part.problems) for part in parts) * plan.group_size,
            initial_version=plan.policy_version,
            max_head_offpolicy_versions=sampler.sampling.max_head_offpolicy_versions,
        )
        # A window's worth waits behind the window, or a row where that is more, so that it never
        # runs empty and little is held.
        self.gate = Gate(admission, lambda: sampler.size + max(sampler.size, plan.group_size))
        self._groups = GroupSampler(
            Drawing(sampler.sampling.rollout, sampler.converse),
            self._rules,
            plan.group_size,
            self.gate,
            lambda: not self.breaker.is_open,
        )
        self._writers = [PartWriter(store, plan, part) for part in parts]
        together.writers += self._writers
        together.begin()
        self._names: list[str] | None = None
        self._named: Mapping[str, RolloutPart] = {}
        self._looking = asyncio.Lock()

    @property
    def requests_in_flight(self) -> int:
        """Requests that are in flight now."""
        return self._sampler.in_flight

    async def carry_part(self, number: int) -> CarriedPart:
        """Sample and score what is missing of one part, and write what fills a file.

        Once the store holds up what fills a file, no further row is begun, and those that were end
        first.
        """
        writer = self._writer(number)
        await self._find(writer)
        while to_do := writer.progress.to_do():
            if writer.is_held_up:
                await self._write(writer)
            await self._carry_rows(writer, to_do)
        is_open = self.breaker.is_open
        return CarriedPart(writer.is_answered, is_open, writer.missing, writer.example)

    async def write_part(self, number: int) -> tuple[RolloutPart, ...]:
        """Write the rest of a part, groups without an answer aside; return all its files."""
        writer = self._writer(number)
        await writer.write()
        await self._together.tell()
        return tuple(writer.parts)

    async def keep_unanswered(self) -> None:
        """Write the groups of all parts that were held back without an answer."""
        for writer in self._writers:
            writer.keep_unanswered()
        for writer in self._writers:
            await writer.write()
        await self._together.tell()

    def _writer(self, number: int) -> PartWriter:
        return next(one for one in self._writers if one.part.number == number)

    async def _carry_rows(self, writer: PartWriter, problems: Sequence[Problem]) -> None:
        number = writer.part.number
        async with all_or_none() as rows:
            with self.gate.beginning(number):
                for problem in problems:
                    # Let in before its task is made: rows that wait cost nothing.
                    await self.gate.enter(number)
                    rows.create_task(self._carry_row(writer, problem))
                    if writer.is_held_up:
                        break

    async def _find(self, writer: PartWriter) -> None:
        async with self._looking:
            if self._names is None:
                self._names = await self._store.names(self.plan.directory)
                self._named = await named_parts(self._store, self.plan)
            await writer.find(self._names, self._named)
        await self._together.tell()

    async def _carry_row(self, writer: PartWriter, problem: Problem) -> None:
        """A group, and the next in its place as long as the rules drop it."""
        instead = await self._carry_group(writer, problem)
        while instead is not None and not writer.is_held_up:
            await self.gate.enter(writer.part.number)
            instead = await self._carry_group(writer, instead)

    async def _carry_group(self, writer: PartWriter, problem: Problem) -> Problem | None:
        if self.gate.is_stale:
            self.gate.turn_back(is_kept=True)
            return writer.take(self._stale(problem))
        if self.breaker.is_open:
            self.gate.turn_back(is_kept=False)
            writer.leave_out(problem, Counter({Cause.BREAKER_OPEN.value: self.plan.group_size}))
            return None
        is_kept = False
        try:
            group, tally = await self._groups.sample(problem)
            settled = await self._settle(writer, group, tally)
            self.breaker.note(is_failure=is_outage(settled.group.trajectories_G))
            is_kept = not settled.is_dropped
            instead = writer.take(settled)
            # The row stays in until then, so that the store sets the pace.
            if await writer.make_room():
                await self._together.tell()
        finally:
            self.gate.leave(is_kept=is_kept)
        return instead

    async def _settle(
        self, writer: PartWriter, group: TrajectoryGroup, tally: GroupTally
    ) -> SettledGroup:
        judged = judge_group(await self._scorer.score_group(group), self._rules)
        is_refill = writer.progress.is_refill(group.problem)
        return tally.settle(judged, self._rules, is_refill=is_refill)

    def _stale(self, problem: Problem) -> SettledGroup:
        group = stale_group(
            problem,
            self.plan.group_size,
            identity=self._sampler.identity,
            policy_version=self.plan.policy_version,
            run_seed=self._sampler.sampling.seed,
        )
        return GroupTally().settle(JudgedGroup(group), self._rules, is_refill=False)

    def progress(self) -> RolloutState:
        """Count how far the rollout is."""
        return RolloutState(
            sum(writer.progress.settled_count for writer in self._writers),
            self.gate.in_flight,
            self._sampler.size,
            Counter(self._sampler.failed_attempts),
        )

    def take_stamp(self, stamp: Stamp) -> None:
        """Stamp with it what is sampled from now on, and hold the gate to it."""
        put_stamp(stamp, self._sampler, self.gate)

    @property
    def window(self) -> Window:
        """The window of all its requests."""
        return self._sampler.window

    def let_in(self) -> None:
        """Let in what waits: the window or the gate has become wider from outside."""
        self._sampler.wake()
        self.gate.wake()

    async def write_along(self) -> None:
        """Write groups that have waited for their part to fill up; never ends."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_WRITES)
            for writer in self._writers:
                if writer.waits_seconds < SECONDS_BETWEEN_WRITES:
                    continue
                try:
                    await self._write(writer)
                except StoreUnavailableError as error:
                    self._logger.warning("groups are written later: %s", error)

    async def save(self) -> None:
        """Write whatever has ended, when sampling does before its end."""
        for writer in self._writers:
            with suppress(StoreError):  # what is lost is sampled again
                await writer.write()
        with suppress(StoreError):
            await self._together.tell()

    async def _write(self, writer: PartWriter) -> None:
        """Write before the part has ended."""
        if await writer.write():
            await self._together.tell()

    def trace(self) -> Sequence[TracePoint]:
        """Return the window's path through time."""
        return self._sampler.trace()

    def log_window(self) -> None:
        """Say what the window did, in the flow run's log."""
        self._logger.info("%s", self._sampler.end_step().describe())


@asynccontextmanager
async def open_rollout(
    spec: CycleSpec,
    plan: RolloutPlan,
    source: SampledService,
    store: Store,
    logger: RunLogger = LOGGER,
    *,
    numbers: Collection[int] | None = None,
    together: Together | None = None,
    breaker: Breaker | None = None,
    window: Window | None = None,
) -> AsyncIterator[Rollout]:
    """Open what the chunks of `plan` share, for as long as they run in this event loop.

    Args:
        numbers, together: as `Rollout`.
        breaker, window: are told of every request, instead of those of its own.

    Raises:
        RewardError, RolloutFunctionError: the user's own code cannot be used; nothing was sampled.
        ServiceRefusedError: there is no API key.
        ReadinessTimeoutError: as `VersionWatch.first_look`.
    """
    async with (
        open_scorer(spec.reward) as scorer,
        source.client.session(
            spec.sampling,
            identity=source.identity,
            policy_version=plan.policy_version,
            replica_count=source.replica_count,
            swap_timeout_seconds=spec.readiness.weight_sync_timeout,
            window=window,
        ) as sampler,
    ):
        sampler.breaker = breaker or sampler.breaker
        rollout = Rollout(plan, sampler, scorer, store, logger, numbers=numbers, together=together)
        watch = None
        if source.watched is not None:
            stamp = Stamp(source.identity, plan.policy_version)
            watch = VersionWatch(source.watched, spec, stamp, rollout.take_stamp, logger)
            await watch.first_look()
        async with beside(
            logger,
            writing_along=rollout.write_along,
            telling_along=rollout.tell_along,
            watching_for_versions=watch.go_on if watch else None,
        ):
            try:
                yield rollout
            finally:
                await rollout.save()
