"""Ahead: a run whose sampler goes on from newer weights while its trainer uses what older ones
gave.

After each step the sampler may be `groups_ahead` groups ahead of the trainer. What is missing of
that is the window of the version that the step exports; its record names it.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial

import polars as pl
from prefect import task
from prefect.cache_policies import NO_CACHE

from hotload.clients.handoff.usable_groups import GroupsAhead, StepGroups
from hotload.clients.store import Store
from hotload.clients.store.failures import LONG_AGAIN_SECONDS, asked_again
from hotload.clients.store.publisher_leases import held_leases
from hotload.clients.store.records import read_publication
from hotload.directory.files import remove_tree
from hotload.identity import cycle_name, version_of
from hotload.spec import CycleSpec
from hotload.trainers.declaration import AsyncTrainingSpec
from hotload.training.step_record import StepRecord
from hotload.training.windows import Cursor, OpenWindow
from tasks import RETRIED
from tasks.training.run import LOOK_SECONDS, StepPlace, TrainingRun


class AheadRun(TrainingRun):
    """A run with several windows open at once, each sampled from a version of its own."""

    spec: AsyncTrainingSpec

    def __post_init__(self) -> None:
        """Take over what the last record says is open."""
        super().__post_init__()
        self.groups = GroupsAhead(LOOK_SECONDS)
        self._recorded = list(self.records[-1].open_windows) if self.records else []
        self._next = self.records[-1].cursor if self.records else Cursor()
        self._newest_version = 0
        """The newest that was exported, or that samples older weights under its own number."""
        self._begun: set[int] = set()
        """Versions whose cycles are under way."""
        self._has_ended = asyncio.Event()
        self._forgetting = asyncio.Lock()
        self._to_begin: asyncio.Queue[OpenWindow | None] = asyncio.Queue()

    def open_windows(self) -> None:
        """Open the windows that the newest record names, or the first one."""
        self._newest_version = self.exported_version
        for window in self._recorded:
            self._open(window)
        if not self.records:
            self._open_next(0)

    async def has_more(self) -> bool:
        """Wait until another usable group has come, or everything is trained.

        Where the open windows end without one, the next problems are sampled from the same weights.

        Raises:
            StoreError: as `RolloutReader.next`.
        """
        while not await self.groups.has_more():
            if not self._open_next(self._newest_version + 1):
                self._to_begin.put_nowait(None)
                self.idle = self.groups.counts
                return False
        return True

    async def windows(self) -> AsyncIterator[OpenWindow]:
        """Yield every window once its version may be published."""
        before: int | None = None
        while (window := await self._to_begin.get()) is not None:
            await may_publish(self, window.policy_version, before)
            self.begin_cycle(window)
            yield window
            before = window.policy_version

    async def declare_cycle(self, window: OpenWindow) -> CycleSpec:
        """Write the window's problems, and declare the cycle that samples them."""
        version = window.policy_version
        exported = version if await self._has_own_weights(version) else self.exported_version
        file = await self.write_problems(version, window.epoch, window.positions)
        async with self._forgetting:  # started again, several cycles begin at once
            await asyncio.to_thread(self._forget_before, min(version, exported))
        return self.spec.cycle_of(
            version,
            exported,
            dataset=str(file),
            max_rows=None,
            prompt_groups_per_step=window.count,
        )

    def begin_cycle(self, window: OpenWindow) -> None:
        """Note that the cycle of a window begins."""
        self.note_sampling()
        self._begun.add(window.policy_version)

    def end_cycle(self, window: OpenWindow) -> None:
        """Note that the cycle of a window has ended."""
        self._begun.remove(window.policy_version)
        self._has_ended.set()
        if not self._begun:
            self.note_sampled()

    async def until_near(self, version: int) -> None:
        """Wait until no cycle is under way that this version would be too far ahead of."""
        limit = self.spec.cycle.sampling.max_head_offpolicy_versions
        while version - min(self._begun, default=version) > limit:
            self._has_ended.clear()
            await self._has_ended.wait()

    async def place(self, made: Sequence[StepGroups]) -> StepPlace:
        """Find where a step stands, and what is sampled from the version that it exports."""
        missing = self.spec.groups_ahead - self.groups.live_count
        version = self._newest_version + 1
        count = len(self.problems)
        window = self.spec.windows.window_ahead(self._next, count, version, missing)
        is_end = window is None and not await self.groups.has_more()
        if window is not None:
            await asyncio.to_thread(self.order, window.epoch)  # the streams do not wait for it
        oldest = min(part.sampled_version or 0 for groups in made for part in groups.groups)
        first = next(one for one in self.groups.windows if one.policy_version == oldest)
        opened = () if window is None else (window,)
        cursor = self._next if window is None else window.end
        return StepPlace(
            oldest,
            first.began,
            first.count,
            cursor,
            version,
            is_end,
            (*self.groups.windows, *opened),
        )

    def lag_figures(self, frame: pl.DataFrame) -> Mapping[str, float]:
        """Tell how many versions the trainer is ahead of those that began these samples."""
        identities = frame["first_identity"].drop_nulls()
        found = [version_of(str(one), self.run_id) for one in identities]
        lags = [self.exported_version - one for one in found if one is not None]
        return {
            "async/version_offset_max": float(max(lags, default=0)),
            "async/version_offset_mean": sum(lags) / max(len(lags), 1),
        }

    def add(self, record: StepRecord) -> None:
        """Stand where the run stands after this record; the window that it names last, if it is of
        the exported version, is open from now on."""
        super().add(record)
        self._newest_version, self._next = self.exported_version, record.cursor
        for window in record.open_windows:
            if window.policy_version == self.exported_version:
                self._open(window)

    def go_on_as(self, version: int) -> None:
        """Sample under another version than the one that was recorded, and is spent."""
        super().go_on_as(version)
        spent = self.records[-1].checkpoint
        for place, window in enumerate(self._recorded):
            if spent is not None and window.policy_version == spent.policy_version:
                self._recorded[place] = window.model_copy(update={"policy_version": version})

    async def _has_own_weights(self, version: int) -> bool:
        """Whether the cycle of a version has an export of its own: one that lies here, or one that
        it needs no more, having published. Else, as on another machine, what was not published in
        time is left out: its window samples what is served."""
        exports = (one.checkpoint for one in self.records)
        named = {one.policy_version for one in exports if one is not None}
        if version in {0, self.exported_version, *named} and await asyncio.to_thread(
            self.spec.checkpoint_of(version).exists
        ):
            return True
        look = partial(read_publication, self.store, cycle_name(self.run_id, version))
        return await asked_again("a publication", look, LONG_AGAIN_SECONDS) is not None

    def _open_next(self, version: int) -> bool:
        window = self.spec.windows.window_ahead(
            self._next, len(self.problems), version, self.spec.groups_ahead
        )
        if window is None:
            return False
        self._next = window.end
        self._open(window)
        return True

    def _open(self, window: OpenWindow) -> None:
        self.groups.open(window, self.groups_from(window.policy_version, window.epoch))
        self._to_begin.put_nowait(window)
        self._newest_version = max(self._newest_version, window.policy_version)

    def _forget_before(self, version: int) -> None:
        """Remove the exports before a version, which are published by then, and the problems of
        cycles that have ended."""
        oldest = min(self._begun)
        for kept, name in (
            (version, self.spec.checkpoint_of),
            (oldest, self.spec.problems_of),
        ):
            for each in name(kept).parent.iterdir():
                if each.stem.isdecimal() and int(each.stem) < kept:
                    remove_tree(each)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="may-publish-{version}", **RETRIED)
async def may_publish(run: AheadRun, version: int, before: int | None) -> None:
    """Wait until the version before it is published, since versions are in order, and until no
    cycle is under way that would be more versions behind than it may.

    Raises:
        StoreError: the store refuses.
    """
    await run.until_near(version)
    if before is None:
        return
    name = cycle_name(run.run_id, before)
    while await _is_publishing(run.store, name):  # noqa: ASYNC110 - the store says nothing by itself
        await asyncio.sleep(LOOK_SECONDS)


async def _is_publishing(store: Store, name: str) -> bool:
    if await read_publication(store, name) is None:
        return True
    return any(lease.holder == name for lease in await held_leases(store))
