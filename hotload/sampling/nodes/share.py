"""A share of a rollout's parts, as the node sees it that samples them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from hotload.clients.store.store import Store
from hotload.clock import monotonic
from hotload.concurrently import all_or_none
from hotload.dataset.rollout_plan import RolloutPlan
from hotload.errors import InvalidProblemsError, StoreError
from hotload.sampling.nodes.notes import (
    SECONDS_BETWEEN_NOTES,
    CycleNote,
    NodeNote,
    SamplingShare,
    cycle_path,
    node_path,
)
from hotload.sampling.part_carrier import PartCarrier, RolloutState, Together
from hotload.sampling.stamp import Stamp

GONE_SECONDS = 60.0
SECONDS_BETWEEN_FIRST_NOTES = 0.1


class NamedElsewhere(Together):
    """Names nothing: the cycle does, by what lies in the store."""

    async def tell(self) -> None:
        """Do nothing."""


class NodeRollout:
    """The rollouts of a share, one for each service, and what is heard of their cycle."""

    def __init__(
        self, work: SamplingShare, carriers: Mapping[str, PartCarrier], store: Store
    ) -> None:
        self._work, self._carriers, self._store = work, carriers, store
        self._stamps: dict[str, Stamp] = {}
        self._said = self._heard = 0
        self._heard_at = monotonic()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Run a block once the cycle was heard of, and as long as it is.

        Raises:
            StoreError: nothing new was heard of it for a minute.
        """
        while not self._heard:
            await self._hear()
            await asyncio.sleep(SECONDS_BETWEEN_FIRST_NOTES)
        async with all_or_none() as beside:
            listening = beside.create_task(self._listen())
            yield
            listening.cancel()

    async def _listen(self) -> None:
        """Do as the cycle says, and say how far this node is, again and again; never ends."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_NOTES)
            await self._hear()
            self._said += 1
            carriers = self._carriers.items()
            note = NodeNote(
                number=self._said,
                state=sum((one.progress() for _, one in carriers), RolloutState()),
                widths={name: one.window.width for name, one in carriers},
            )
            with suppress(StoreError):
                await note.write(self._store, node_path(self._work.talk, self._work.share))

    async def _hear(self) -> None:
        path = cycle_path(self._work.talk)
        note = await CycleNote.read(self._store, path)
        if note is None or note.number <= self._heard:
            if monotonic() - self._heard_at > GONE_SECONDS:
                reason = f"nothing new of the cycle for {GONE_SECONDS:.0f} s: it has ended, or died"
                raise StoreError(path, reason)
            return
        self._heard, self._heard_at = note.number, monotonic()
        shift = note.shifts.get(self._work.share)
        for name, carrier in self._carriers.items():
            stamp = note.stamps.get(name)
            if stamp is not None and stamp != self._stamps.get(name):
                self._stamps[name] = stamp
                carrier.take_stamp(stamp)
            if shift is not None and shift.number == self._said:
                carrier.window.shift(shift.slots.get(name, 0.0))
                carrier.let_in()


def check_plan(work: SamplingShare, plan: RolloutPlan) -> None:
    """Check that a plan is the one whose parts were dealt.

    Raises:
        InvalidProblemsError: the problems that were read for it are others.
    """
    if plan.digest != work.digest:
        raise InvalidProblemsError(
            work.spec.to_sample.dataset,
            0,
            f"they, or this version of hotload, make plan {plan.digest[:12]} on this node; expected"
            f" {work.digest[:12]}, as where the cycle runs: let all machines read the same",
        )
