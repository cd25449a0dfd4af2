"""Roll out: sample a chunk of problems, score its groups, hand its part back as they finish. All
chunks share one window, one gate and one breaker.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from hotload.clients.inference.client import InferenceClient
from hotload.clients.inference.sampler import Sampler
from hotload.clients.service.client import HotLoadClient
from hotload.clients.store.store import Store
from hotload.clock import monotonic
from hotload.concurrently import all_or_none
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutManifest, RolloutPart, RolloutPlan
from hotload.errors import RolloutsFailedError, StoreError, StoreUnavailableError
from hotload.rollout.admission import Admission
from hotload.rollout.counts import in_words
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
from hotload.sampling.draw import Drawing
from hotload.sampling.part_files import named_parts, sum_up
from hotload.sampling.part_writer import PartWriter
from hotload.sampling.reward.scorer import Scorer, open_scorer
from hotload.sampling.row_gate import Gate
from hotload.sampling.sample_group import GroupSampler
from hotload.sampling.watch_versions import RunLogger, first_look, watch_versions
from hotload.spec import CycleSpec

SECONDS_BETWEEN_WRITES = 10.0
SECONDS_BETWEEN_LINES = 30.0

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampledService:
    """A service that is sampled from: what it serves, on how many replicas, and its share.

    `watched` is asked for newer versions, where the spec allows the next cycle to publish while
    this one samples.
    """

    client: InferenceClient
    identity: str
    replica_count: int | None = None
    weight: float = 1.0
    watched: HotLoadClient | None = None


class Together:
    """What rollouts of one plan share that sample parts of it from services of their own: all
    writers, for one manifest."""

    def __init__(self) -> None:
        self.writers: list[PartWriter] = []
        self.told = 0
        self.telling = asyncio.Lock()


class Rollout:
    """What the chunks of one rollout share: the sampler with its window, the scorer, the store.

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
        self.plan = plan
        parts = [part for part in plan.parts if numbers is None or part.number in numbers]
        self._logger = logger
        self._sampler = sampler
        self._scorer = scorer
        self._store = store
        self._rules = sampler.sampling.groups
        self._started = monotonic()
        admission = Admission(
            group_size=plan.group_size,
            batch_size=sum(len(part.problems) for part in parts) * plan.group_size,
            initial_version=plan.policy_version,
            max_head_offpolicy_versions=sampler.sampling.max_head_offpolicy_versions,
        )
        # A window's worth waits behind the window, or a row where that is more, so that it never
        # runs empty and little is held.
        self.gate = Gate(admission, lambda: sampler.size + max(sampler.size, plan.group_size))
        self._breaker = sampler.breaker
        self._groups = GroupSampler(
            Drawing(sampler),
            self._rules,
            plan.group_size,
            self.gate,
            lambda: not self._breaker.is_open,
        )
        self._writers = [PartWriter(store, plan, part) for part in parts]
        self._together = together or Together()
        self._together.writers += self._writers
        self._ended: set[int] = set()
        self._names: list[str] | None = None
        self._named: Mapping[str, RolloutPart] = {}
        self._looking = asyncio.Lock()

    @property
    def requests_in_flight(self) -> int:
        """Requests that are in flight now."""
        return self._sampler.in_flight

    @property
    def seconds(self) -> float:
        """Wall seconds since sampling could begin."""
        return monotonic() - self._started

    async def carry(self, number: int) -> tuple[RolloutPart, ...]:
        """Sample, score and write what is missing of one part; return all its files.

        Once the store holds up what fills a file, no further row is begun, and those that were end
        first. Called again after that, it writes what it has and samples nothing twice.
        """
        writer = next(one for one in self._writers if one.part.number == number)
        await self._find(writer)
        while to_do := writer.progress.to_do():
            if writer.is_held_up:
                await self._write(writer)
            await self._carry_rows(writer, to_do)
        await self._end(writer)
        return tuple(writer.parts)

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

    async def _end(self, writer: PartWriter) -> None:
        """Write the rest of a part, every problem of which is settled or left out.

        Groups without any answer, or any reward as its service was away, are written when the last
        part ends, and only if no service was failing row after row: recorded, they would count as
        done for ever.
        """
        self._ended.add(writer.part.number)
        is_last = len(self._ended) == len(self._writers)
        ending = self._writers if is_last else [writer]
        is_dead = is_last and not any(each.is_answered for each in self._writers)
        is_outage_now = self._breaker.is_open or is_dead
        if is_last and not is_outage_now:
            for each in ending:
                each.keep_unanswered()
        for each in ending:
            await each.write()
        missing = sum((each.missing for each in ending), Counter[str]())
        if is_outage_now and missing:
            causes = ", ".join(f"{cause} {count}" for cause, count in missing.items())
            example = next((each.example for each in ending if each.example), "")
            raise RolloutsFailedError(self.plan.identity, causes, example)
        await self._tell()

    async def _find(self, writer: PartWriter) -> None:
        async with self._looking:
            if self._names is None:
                self._names = await self._store.names(self.plan.directory)
                self._named = await named_parts(self._store, self.plan)
            await writer.find(self._names, self._named)

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
        if self._breaker.is_open:
            self.gate.turn_back(is_kept=False)
            writer.leave_out(problem, Counter({Cause.BREAKER_OPEN.value: self.plan.group_size}))
            return None
        is_kept = False
        try:
            group, tally = await self._groups.sample(problem)
            settled = await self._settle(writer, group, tally)
            self._breaker.note(is_failure=is_outage(settled.group.trajectories_G))
            is_kept = not settled.is_dropped
            instead = writer.take(settled)
            # The row stays in until then, so that the store sets the pace.
            if await writer.make_room():
                await self._tell()
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

    async def tell_along(self) -> None:
        """Log how far the rollout is; never ends."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LINES)
            self._logger.info("%s", self.state())

    def state(self) -> str:
        """Say how far the rollout is, for a reader."""
        ended = sum(writer.progress.settled_count for writer in self._writers)
        met = in_words(dict(self._sampler.failed_attempts))
        causes = ", ".join(f"{count} × {name}" for name, count in met.items())
        return (
            f"{ended} groups ended, {self.plan.problem_count} planned; "
            f"{self.gate.in_flight} samples under way, window {self._sampler.size}"
            + (f"; requests without an answer: {causes}" if causes else "")
        )

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
            await self._tell()

    async def _write(self, writer: PartWriter) -> None:
        """Write before the part has ended."""
        if await writer.write():
            await self._tell()

    async def _tell(self) -> None:
        """Name what is there in the manifest, so that it can be read while sampling goes on."""
        if not all(writer.is_read for writer in self._together.writers):
            return  # it would name less than an earlier run of this cycle did
        async with self._together.telling:
            manifest = self.manifest(is_complete=False)
            if len(manifest.parts) == self._together.told:
                return
            try:
                await self._store.put_bytes(manifest.render(), self.plan.path(MANIFEST_FILE))
                self._together.told = len(manifest.parts)
            except StoreUnavailableError as error:
                self._logger.warning("the manifest is written later: %s", error)

    def manifest(self, *, is_complete: bool) -> RolloutManifest:
        """Make the manifest of what is in the store now, also of the parts sampled elsewhere."""
        writers = sorted(self._together.writers, key=lambda writer: writer.part.number)
        parts = [part for writer in writers for part in writer.parts]
        trace = [
            (point.seconds - self._started, point.size, point.in_flight)
            for point in self._sampler.trace()
        ]
        extracts = [extract for writer in writers for extract in writer.extracts]
        return sum_up(
            self._store,
            self.plan,
            parts,
            self.seconds,
            is_complete=is_complete,
            found=[part for writer in writers for part in writer.found],
            extracts=extracts,
            window_trace=trace,
        )

    def log_window(self) -> None:
        """Say what the window did, in the flow run's log."""
        report = self._sampler.end_step()
        queue = "not known" if report.avg_pq is None else f"{report.avg_pq:.3g} s"
        self._logger.info(
            "%d requests, window %d → %d, at most %d in flight, %d congested answers, "
            "%d samples out of attempts, prefill queue on average %s",
            report.requests,
            report.window,
            report.window_after,
            report.max_in_flight,
            report.congestion_responses,
            report.retry_exhaustions,
            queue,
        )


@asynccontextmanager
async def open_rollout(
    spec: CycleSpec,
    plan: RolloutPlan,
    client: InferenceClient,
    store: Store,
    replica_count: int | None,
    service: HotLoadClient | None = None,
    logger: RunLogger = LOGGER,
    *,
    identity: str | None = None,
    numbers: Collection[int] | None = None,
    together: Together | None = None,
) -> AsyncIterator[Rollout]:
    """Open what the chunks of `plan` share, for as long as they run in this event loop.

    Args:
        replica_count: for the window's first size; `None` is not known.
        service: watched for newer versions, where the spec allows the next cycle to publish while
            this one samples.
        identity: what this service serves, if that is not the plan's.
        numbers, together: as `Rollout`.

    Raises:
        RewardError, RolloutFunctionError: the user's own code cannot be used; nothing was sampled.
        ServiceRefusedError: there is no API key.
        ReadinessTimeoutError: as `first_look`.
    """
    async with (
        open_scorer(spec.reward) as scorer,
        client.session(
            spec.sampling,
            identity=identity or plan.identity,
            policy_version=plan.policy_version,
            replica_count=replica_count,
            swap_timeout_seconds=spec.readiness.weight_sync_timeout,
        ) as sampler,
    ):
        rollout = Rollout(plan, sampler, scorer, store, logger, numbers=numbers, together=together)
        if service is not None:
            await first_look(service, spec.run_id, sampler, rollout.gate, spec.readiness, logger)
        beside = [
            asyncio.create_task(_beside("writing along", rollout.write_along, logger)),
            asyncio.create_task(_beside("telling along", rollout.tell_along, logger)),
        ]
        if service is not None:
            seconds = spec.readiness.poll_interval_seconds
            watching = partial(
                watch_versions, service, spec.run_id, sampler, rollout.gate, seconds, logger
            )
            beside.append(asyncio.create_task(_beside("watching for versions", watching, logger)))
        try:
            yield rollout
        finally:
            for each in beside:
                each.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await rollout.save()


async def _beside(name: str, endless: Callable[[], Awaitable[None]], logger: RunLogger) -> None:
    """Run what serves the chunks; should it end, they go on without it, and the log says so."""
    try:
        await endless()
    except Exception:  # no caller waits for it
        logger.exception("%s came to an end", name)
