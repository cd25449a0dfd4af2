"""The coordinator of sampling processes: it shares out parts and window, starts again what was
lost, and judges over all of them. It alone writes the manifest and what a person sees.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from hotload.clients.store.store import Store
from hotload.clock import monotonic
from hotload.concurrently import RunLogger, beside, overlap
from hotload.dataset.rollout_plan import PartPlan, RolloutPart, RolloutPlan, share_parts
from hotload.dataset.sample_extracts import SampleExtract
from hotload.errors import RolloutsFailedError, StoreError
from hotload.rollout.breaker import Breaker
from hotload.rollout.window import SharedWindow, TracePoint
from hotload.sampling.part_carrier import CarriedPart, PartCarrier, RolloutState, Together
from hotload.sampling.processes.child import ProcessLostError, SamplingProcess
from hotload.sampling.processes.work import SamplingWork
from hotload.sampling.rollout import SampledService, open_rollout
from hotload.sampling.stamp import Stamp
from hotload.sampling.watch_versions import VersionWatch
from hotload.spec import CycleSpec

LOSSES = 3


@dataclass
class _ReportedPart:
    """The files of a part, as the process that samples it last reported them."""

    part: PartPlan
    parts: Sequence[RolloutPart] = ()
    found: Sequence[RolloutPart] = ()
    extracts: Sequence[SampleExtract] = ()
    is_read: bool = False

    def take(
        self,
        parts: Sequence[RolloutPart],
        found: Sequence[RolloutPart],
        extracts: Sequence[SampleExtract],
    ) -> None:
        if not self.is_read:  # a process in the place of a lost one finds what that one wrote
            self.found = found
        self.parts, self.extracts, self.is_read = parts, extracts, True


class _Place:
    """A place for one process, which is started again after it was lost."""

    def __init__(self, rollout: "RolloutProcesses", number: int, work: SamplingWork) -> None:
        self._rollout, self.number, self.work = rollout, number, work
        self.numbers = {part.number for part in work.plan.parts}
        self.state = RolloutState()
        self._process: SamplingProcess | None = None
        self._starting = asyncio.Lock()
        self._losses = 0
        self._has_ended = False

    async def process(self) -> SamplingProcess:
        """Return the process with its rollout open.

        Raises:
            RolloutsFailedError: it was lost again and again.
            RewardError, RolloutFunctionError, ServiceRefusedError: as `open_rollout`.
        """
        async with self._starting:
            while self._process is None or self._process.lost is not None:
                if self._process is not None:
                    self._note_loss(str(self._process.lost))
                    await self._process.end()
                self._process = await SamplingProcess.start(self._take)
                with suppress(ProcessLostError):
                    await self._process.begin(self.work)
            return self._process

    def _take(self, kind: str, values: tuple[Any, ...]) -> None:
        self._rollout.take(self, kind, values)

    def _note_loss(self, how: str) -> None:
        self._losses += 1
        if self._losses > LOSSES:
            missing = f"sampling process {self.number} was lost {self._losses} times"
            raise RolloutsFailedError(self.work.plan.identity, missing, how)
        self._rollout.logger.warning(
            "sampling process %d is started again, its parts go on from what is in the store: it "
            "ended with %s",
            self.number,
            how,
        )

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Return the answer to a call, of another process if one is lost over it."""
        while not self._has_ended:
            with suppress(ProcessLostError):
                return await (await self.process()).ask(method, *arguments)
        raise ProcessLostError("its rollout has ended")

    def tell(self, method: str, *arguments: Any, **known: Any) -> None:
        """Make a call without waiting; `known` is what a process knows from its start instead."""
        self.work = replace(self.work, **known)
        if self._process is not None:
            self._process.tell(method, *arguments)

    async def end(self) -> None:
        """End the process, and start no other."""
        self._has_ended = True
        if self._process is not None:
            await self._process.end()


class RolloutProcesses(PartCarrier):
    """Parts that are sampled in processes, each of which has a share of them and of the window's
    slots."""

    def __init__(
        self,
        plan: RolloutPlan,
        works: Sequence[SamplingWork],
        window: SharedWindow,
        logger: RunLogger,
        together: Together,
    ) -> None:
        self._parts = {part.number: _ReportedPart(part) for one in works for part in one.plan.parts}
        super().__init__(plan, self._parts, Breaker(), together)
        self.logger = logger
        self._places = [_Place(self, number, work) for number, work in enumerate(works)]
        self._place_of = {number: place for place in self._places for number in place.numbers}
        self._window = window
        self._under_way = set(self._parts)
        self._is_news = asyncio.Event()
        together.writers += self._parts.values()

    async def start(self) -> None:
        """Start all processes.

        Raises:
            RewardError, RolloutFunctionError, ServiceRefusedError: as `open_rollout`.
        """
        await overlap(place.process() for place in self._places)
        self._together.begin()

    async def end(self) -> None:
        """End all processes; what they had ended is in the store and in the manifest."""
        await asyncio.gather(*(place.end() for place in self._places))
        with suppress(StoreError):
            await self._together.tell()

    async def carry_part(self, number: int) -> CarriedPart:
        """Have one part carried by the process that has it."""
        carried: CarriedPart = await self._place_of[number].ask("carry_part", number)
        self._under_way.discard(number)
        self.let_in()
        return carried

    async def write_part(self, number: int) -> tuple[RolloutPart, ...]:
        """Have the rest of a part written; return all its files."""
        files: tuple[RolloutPart, ...] = await self._place_of[number].ask("write_part", number)
        return files

    async def keep_unanswered(self) -> None:
        """Have the groups written that were held back without an answer."""
        await overlap(place.ask("keep_unanswered") for place in self._places)

    def take_stamp(self, stamp: Stamp) -> None:
        """Hand on what samples are stamped with from now on."""
        for place in self._places:
            place.tell("take_stamp", stamp, stamp=stamp)

    def take(self, place: _Place, kind: str, values: tuple[Any, ...]) -> None:
        """Take what a process reports unasked."""
        match kind, values:
            case "files", (number, *files):
                self._parts[number].take(*files)
                self._is_news.set()
            case "notes", (notes,):
                for note in notes:
                    self._note(place, *note)
                self.let_in()
            case "state", (state,):
                place.state = state
            case "log", (level, text):
                self.logger.log(level, "process %d: %s", place.number, text)

    def _note(self, place: _Place, kind: str, noted: tuple[Any, ...]) -> None:
        match kind, noted:
            case "row", (is_failure,):
                self.breaker.note(is_failure=is_failure)
            case "request", (failure, met_swap):
                self.breaker.note_request(failure, met_swap=met_swap)
            case "attempt", (attempt, in_flight):
                self._window.take(place.number, attempt, in_flight, monotonic())
            case "exhaustion", ():
                self._window.note_exhaustion()
        if self.breaker.is_open and not place.work.is_breaker_open:
            for each in self._places:
                each.tell("open_breaker", is_breaker_open=True)

    @property
    def window(self) -> SharedWindow:
        """The window of all processes."""
        return self._window

    def let_in(self) -> None:
        """Share the slots out between the processes that have something to sample."""
        busy = [place for place in self._places if place.numbers & self._under_way] or self._places
        for place, slots in zip(busy, self._window.share(len(busy)), strict=True):
            if place.work.slots != slots:
                place.tell("have_slots", slots, slots=slots)

    async def name_along(self) -> None:
        """Name new files in the manifest; never ends."""
        while True:
            await self._is_news.wait()
            self._is_news.clear()
            await self._together.tell()

    def progress(self) -> RolloutState:
        """Count how far all processes were when they last reported."""
        return sum((place.state for place in self._places), RolloutState())

    def trace(self) -> Sequence[TracePoint]:
        """Return the window's path through time."""
        return self._window.trace()

    def log_window(self) -> None:
        """Say what the window did, in the flow run's log."""
        self.logger.info("%s", self._window.end_step().describe())


@asynccontextmanager
async def open_processes(
    spec: CycleSpec,
    plan: RolloutPlan,
    source: SampledService,
    store: Store,
    logger: RunLogger,
    *,
    numbers: Collection[int],
    together: Together,
    count: int,
) -> AsyncIterator[RolloutProcesses]:
    """Open what parts are sampled with in `count` processes, or one a part if those are fewer.

    Raises:
        As `open_rollout`.
        StoreError: the store lies in the memory of this process.
    """
    if store.url.startswith("memory://"):
        raise StoreError(store.url, "no other process reaches it: expected sampling.processes 1")
    parts = [part for part in plan.parts if part.number in numbers]
    count = min(count, len(parts))
    window = SharedWindow(spec.sampling.concurrency, replica_count=source.replica_count)
    stamp = Stamp(source.identity, plan.policy_version)
    works = [
        SamplingWork(
            spec,
            replace(plan, parts=tuple(part for part in parts if part.number in share)),
            source.client,
            store,
            stamp,
            slots,
        )
        for share, slots in zip(share_parts(parts, [1.0] * count), window.share(count), strict=True)
    ]
    rollout = RolloutProcesses(plan, works, window, logger, together)
    watch = None
    if source.watched is not None:
        watch = VersionWatch(source.watched, spec, stamp, rollout.take_stamp, logger)
        await watch.first_look()
    try:
        await rollout.start()
        async with beside(
            logger,
            naming_along=rollout.name_along,
            telling_along=rollout.tell_along,
            watching_for_versions=watch.go_on if watch else None,
        ):
            yield rollout
    finally:
        await rollout.end()


def open_carrier(
    spec: CycleSpec,
    plan: RolloutPlan,
    source: SampledService,
    store: Store,
    logger: RunLogger,
    *,
    numbers: Collection[int],
    together: Together,
    service_count: int,
) -> AbstractAsyncContextManager[PartCarrier]:
    """Open what parts are sampled with from one of several services, as the spec says: in this
    event loop, or in its share of the processes.

    Raises:
        As `open_rollout`, `open_processes`.
    """
    if spec.sampling.processes > 1:
        count = max(1, spec.sampling.processes // service_count)
        return open_processes(
            spec, plan, source, store, logger, numbers=numbers, together=together, count=count
        )
    return open_rollout(spec, plan, source, store, logger, numbers=numbers, together=together)
