"""The nodes that sample a rollout's parts, as its cycle sees them: it deals the parts, names what
lies in the store, and has all hold to the same stamps and windows.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from hotload.clients.store.store import Store
from hotload.clock import monotonic
from hotload.concurrently import RunLogger, beside, overlap
from hotload.dataset.rollout_plan import RolloutPlan, share_parts
from hotload.errors import StoreError, StoreUnavailableError
from hotload.rollout.window import Window, divide_window
from hotload.sampling.earlier_manifest import named_parts
from hotload.sampling.nodes.notes import (
    SECONDS_BETWEEN_NOTES,
    CycleNote,
    NodeNote,
    SamplingShare,
    SharedService,
    Shift,
    cycle_path,
    node_path,
)
from hotload.sampling.part_carrier import SECONDS_BETWEEN_LINES, RolloutState, Together
from hotload.sampling.part_writer import PartWriter
from hotload.sampling.rollout import SampledService
from hotload.sampling.stamp import Stamp
from hotload.sampling.watch_versions import VersionWatch
from hotload.spec import CycleSpec

SECONDS_BETWEEN_LOOKS = 10.0
STALE_SECONDS = 5.0


class RolloutNodes:
    """Parts that are sampled on nodes.

    Args:
        advance: is told how many more groups lie in the store.
    """

    def __init__(
        self,
        spec: CycleSpec,
        plan: RolloutPlan,
        sources: Sequence[SampledService],
        store: Store,
        logger: RunLogger,
        together: Together,
        advance: Callable[[int], Awaitable[None]],
    ) -> None:
        self._spec, self._plan, self._sources = spec, plan, sources
        self._store, self._logger, self._together = store, logger, together
        self._advance, self._settled = advance, 0
        self._writers = [PartWriter(store, plan, part) for part in plan.parts]
        together.writers += self._writers
        together.begin()
        self._talk = secrets.token_hex(16)
        self._number = 0
        self._stamps = {one.name: Stamp(one.identity, plan.policy_version) for one in sources}
        self._notes: dict[str, NodeNote] = {}
        self._noted_at: dict[str, float] = {}

    @property
    def missing(self) -> int:
        """Count the problems that are not settled by a file in the store."""
        return sum(len(writer.progress.to_do()) for writer in self._writers)

    async def find_files(self) -> None:
        """Read the files that have come into the store, and name them in the manifest.

        Raises:
            StoreError: the store refuses.
        """
        names = await self._store.names(self._plan.directory)
        is_first = not all(writer.is_read for writer in self._writers)
        named = await named_parts(self._store, self._plan) if is_first else {}
        for writer in self._writers:
            await writer.find(names, named)
        await self._together.tell()
        before, self._settled = self._settled, self._settled_count
        await self._advance(self._settled - before)

    @property
    def _settled_count(self) -> int:
        return sum(writer.progress.settled_count for writer in self._writers)

    def shares(self) -> list[SamplingShare]:
        """Deal the parts of which something is missing out to the nodes; a node without any, or
        without a slot, is left out.
        """
        spec, concurrency = self._spec, self._spec.sampling.concurrency
        parts = [writer.part for writer in self._writers if writer.progress.to_do()]
        slots = [
            Window(concurrency, replica_count=one.replica_count).widest for one in self._sources
        ]
        nodes = spec.sampling.nodes[: min(*slots, len(parts))]
        dealt = share_parts(parts, [1.0] * len(nodes))
        services: dict[str, list[SharedService]] = {node: [] for node in nodes}
        of_sources = share_parts(self._plan.parts, [one.weight for one in self._sources])
        for source, of_source in zip(self._sources, of_sources, strict=True):
            sampled = {
                node: numbers & of_source
                for node, numbers in zip(nodes, dealt, strict=True)
                if numbers & of_source
            }
            windows = divide_window(
                concurrency, len(sampled) or 1, replica_count=source.replica_count
            )
            for (node, numbers), window in zip(sampled.items(), windows, strict=False):
                services[node].append(
                    SharedService(
                        rollouts=source.name,
                        identity=source.identity,
                        parts=tuple(sorted(numbers)),
                        concurrency=window,
                    )
                )
        return [
            SamplingShare(
                spec=spec,
                share=node,
                identity=self._plan.identity,
                digest=self._plan.digest,
                services=tuple(shared),
                talk=self._talk,
            )
            for node, shared in services.items()
        ]

    @asynccontextmanager
    async def talking(self) -> AsyncIterator[None]:
        """Watch the services, tell nodes and hear of them, and name their files along.

        Raises:
            ReadinessTimeoutError, ServiceRefusedError: as `VersionWatch.first_look`.
        """
        watches = [
            VersionWatch(
                one.watched, self._spec, self._stamps[one.name], self._take(one.name), self._logger
            )
            for one in self._sources
            if one.watched is not None
        ]
        for watch in watches:
            await watch.first_look()
        going_on = {f"watch_{number}": watch.go_on for number, watch in enumerate(watches)}
        try:
            async with beside(
                self._logger,
                talking_to_nodes=self._talk_along,
                naming_along=self._name_along,
                telling_along=self._tell_along,
                **going_on,
            ):
                yield
        finally:
            nodes = self._spec.sampling.nodes
            for path in (cycle_path(self._talk), *(node_path(self._talk, one) for one in nodes)):
                with suppress(StoreError):
                    await self._store.delete_file(path)

    def _take(self, name: str) -> Callable[[Stamp], None]:
        return lambda stamp: self._stamps.update({name: stamp})

    async def _talk_along(self) -> None:
        while True:
            self._number += 1
            shifts = even_out(self._fresh())
            note = CycleNote(number=self._number, stamps=self._stamps, shifts=shifts)
            with suppress(StoreError):
                await note.write(self._store, cycle_path(self._talk))
            await asyncio.sleep(SECONDS_BETWEEN_NOTES)
            await overlap(self._hear(share) for share in self._spec.sampling.nodes)

    async def _hear(self, share: str) -> None:
        note = await NodeNote.read(self._store, node_path(self._talk, share))
        if note is not None and note != self._notes.get(share):
            self._notes[share], self._noted_at[share] = note, monotonic()

    def _fresh(self) -> dict[str, NodeNote]:
        now = monotonic()
        return {
            share: note
            for share, note in self._notes.items()
            if now - self._noted_at[share] < STALE_SECONDS
        }

    async def _name_along(self) -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            with suppress(StoreUnavailableError):
                await self.find_files()

    async def _tell_along(self) -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LINES)
            now = sum((note.state for note in self._fresh().values()), RolloutState())
            met = sum((note.state for note in self._notes.values()), RolloutState())
            self._together.say(
                RolloutState(self._settled_count, now.in_flight, now.window, met.failed_attempts)
            )


def even_out(notes: Mapping[str, NodeNote]) -> dict[str, Shift]:
    """Return what makes the windows of all nodes equally wide that sample from the same service;
    slots are moved, none is added or lost.
    """
    widths: dict[str, list[float]] = {}
    for note in notes.values():
        for name, width in note.widths.items():
            widths.setdefault(name, []).append(width)
    means = {name: sum(found) / len(found) for name, found in widths.items()}
    return {
        share: Shift(
            number=note.number,
            slots={name: means[name] - width for name, width in note.widths.items()},
        )
        for share, note in notes.items()
    }
