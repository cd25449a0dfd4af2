"""Carry parts: what becomes of a rollout's parts, wherever their rows are sampled, and the manifest
that names their files.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hotload.clients.store.store import Store
from hotload.clock import monotonic
from hotload.concurrently import RunLogger
from hotload.dataset.rollout_plan import (
    MANIFEST_FILE,
    PartPlan,
    RolloutManifest,
    RolloutPart,
    RolloutPlan,
)
from hotload.dataset.sample_extracts import SampleExtract
from hotload.errors import RolloutsFailedError, StoreUnavailableError
from hotload.rollout.breaker import Breaker
from hotload.rollout.counts import in_words
from hotload.rollout.window import TracePoint, Window
from hotload.sampling.part_files import sum_up
from hotload.sampling.stamp import Stamp

SECONDS_BETWEEN_LINES = 30.0

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutState:
    """How far a rollout is; those of several add up."""

    ended: int = 0
    in_flight: int = 0
    window: int = 0
    failed_attempts: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "RolloutState") -> "RolloutState":
        return RolloutState(
            self.ended + other.ended,
            self.in_flight + other.in_flight,
            self.window + other.window,
            self.failed_attempts + other.failed_attempts,
        )

    def describe(self, planned: int) -> str:
        """Say how far it is, for a reader."""
        met = in_words(dict(self.failed_attempts))
        causes = ", ".join(f"{count} × {name}" for name, count in met.items())
        return (
            f"{self.ended} groups ended, {planned} planned; "
            f"{self.in_flight} samples under way, window {self.window}"
            + (f"; requests without an answer: {causes}" if causes else "")
        )


@dataclass(frozen=True, slots=True)
class CarriedPart:
    """A part whose problems are settled or left out."""

    is_answered: bool
    """Whether a group of it got an answer, now or in an earlier run."""
    is_cut_short: bool
    """Whether the breaker was open by then."""
    missing: Counter[str]
    """Samples that are not recorded, by cause: left out, or held back without an answer."""
    example: str
    """What the first of those that are held back met."""


class PartFiles(Protocol):
    """What is known of a part's files; a `PartWriter` knows it of its own."""

    @property
    def part(self) -> PartPlan: ...
    @property
    def parts(self) -> Sequence[RolloutPart]: ...
    @property
    def found(self) -> Sequence[RolloutPart]: ...
    @property
    def extracts(self) -> Sequence[SampleExtract]: ...
    @property
    def is_read(self) -> bool: ...


class Together:
    """What carriers of one plan share that sample parts of it each: the files of all, for one
    manifest."""

    def __init__(self, plan: RolloutPlan, store: Store, logger: RunLogger = LOGGER) -> None:
        self.writers: list[PartFiles] = []
        self._plan, self._store, self._logger = plan, store, logger
        self._started: float | None = None
        self._told = 0
        self._made: set[str] = set()
        self._telling = asyncio.Lock()

    def begin(self) -> None:
        """Take note that sampling can begin."""
        self._started = self._started or monotonic()

    def begin_again(self) -> None:
        """Let other carriers find the files, of which this rollout has made some by now."""
        for writer in self.writers:
            found = {part.file for part in writer.found}
            self._made |= {part.file for part in writer.parts} - found
        self.writers.clear()

    async def tell(self) -> None:
        """Name what is there in the manifest, so that it can be read while sampling goes on."""
        if not all(writer.is_read for writer in self.writers):
            return  # it would name less than an earlier run of this cycle did
        async with self._telling:
            manifest = self.manifest(is_complete=False)
            if len(manifest.parts) == self._told:
                return
            try:
                await self._store.put_bytes(manifest.render(), self._plan.path(MANIFEST_FILE))
                self._told = len(manifest.parts)
            except StoreUnavailableError as error:
                self._logger.warning("the manifest is written later: %s", error)

    def say(self, state: RolloutState) -> None:
        """Log how far a rollout is."""
        self._logger.info("%s", state.describe(self._plan.problem_count))

    def manifest(
        self, *, is_complete: bool, window_trace: Iterable[TracePoint] = ()
    ) -> RolloutManifest:
        """Make the manifest of what is in the store now."""
        writers = sorted(self.writers, key=lambda writer: writer.part.number)
        started = self._started or monotonic()
        return sum_up(
            self._store,
            self._plan,
            [part for writer in writers for part in writer.parts],
            monotonic() - started,
            is_complete=is_complete,
            found=[
                part for writer in writers for part in writer.found if part.file not in self._made
            ],
            extracts=[extract for writer in writers for extract in writer.extracts],
            window_trace=[
                (point.seconds - started, point.size, point.in_flight) for point in window_trace
            ],
        )


class PartCarrier(ABC):
    """Samples parts of a plan from one service, in this event loop or in others, and judges what it
    means that samples are missing."""

    def __init__(
        self, plan: RolloutPlan, numbers: Collection[int], breaker: Breaker, together: Together
    ) -> None:
        self.plan, self.breaker = plan, breaker
        self._numbers = frozenset(numbers)
        self._together = together
        self._carried: dict[int, CarriedPart] = {}

    async def carry(self, number: int) -> tuple[RolloutPart, ...]:
        """Sample, score and write what is missing of one part; return all its files.

        Groups without any answer, or any reward as its service was away, are written when the last
        part ends, and only if no service was failing row after row: recorded, they would count as
        done for ever. Called again after an error, it writes what it has and samples nothing twice.

        Raises:
            RolloutsFailedError: a service failed row after row, or nothing at all was answered.
        """
        carried = self._carried[number] = await self.carry_part(number)
        ending, is_outage = [carried], carried.is_cut_short
        if self._carried.keys() == self._numbers:
            ending = list(self._carried.values())
            is_outage = self.breaker.is_open or not any(each.is_answered for each in ending)
            if not is_outage:
                await self.keep_unanswered()
        files = await self.write_part(number)
        missing = sum((each.missing for each in ending), Counter[str]())
        if is_outage and missing:
            causes = ", ".join(f"{cause} {count}" for cause, count in missing.items())
            example = next((each.example for each in ending if each.example), "")
            raise RolloutsFailedError(self.plan.identity, causes, example)
        return files

    @abstractmethod
    async def carry_part(self, number: int) -> CarriedPart:
        """Sample and score what is missing of one part, and write what fills a file."""

    @abstractmethod
    async def write_part(self, number: int) -> tuple[RolloutPart, ...]:
        """Write the rest of a part, groups without an answer aside; return all its files."""

    @abstractmethod
    async def keep_unanswered(self) -> None:
        """Write the groups of all parts that were held back without an answer."""

    @abstractmethod
    def take_stamp(self, stamp: Stamp) -> None:
        """Stamp with it what is sampled from now on."""

    @property
    @abstractmethod
    def window(self) -> Window:
        """The window of all its requests."""

    @abstractmethod
    def let_in(self) -> None:
        """Let in what waits: the window has become wider from outside."""

    @abstractmethod
    def progress(self) -> RolloutState:
        """Count how far the rollout is."""

    @abstractmethod
    def trace(self) -> Sequence[TracePoint]:
        """Return the window's path through time."""

    @abstractmethod
    def log_window(self) -> None:
        """Say what the window did."""

    def manifest(self, *, is_complete: bool) -> RolloutManifest:
        """Make the manifest of what is in the store now, also of the parts sampled elsewhere."""
        return self._together.manifest(is_complete=is_complete, window_trace=self.trace())

    def state(self) -> str:
        """Say how far the rollout is, for a reader."""
        return self.progress().describe(self.plan.problem_count)

    async def tell_along(self) -> None:
        """Say how far the rollout is; never ends."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LINES)
            self._together.say(self.progress())
