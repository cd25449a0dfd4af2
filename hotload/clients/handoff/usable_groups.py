"""Groups that a trainer can learn from, in steps, as cycles write them: those of one window, and
those of all windows that are open in an asynchronous loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from hotload.clients.handoff.directory import find_rollouts, read_groups
from hotload.clients.handoff.reader import Delivery, RolloutReader
from hotload.clients.store.failures import LONG_AGAIN_SECONDS, asked_again
from hotload.clients.store.store import Store
from hotload.clock import monotonic
from hotload.dataset.rollout_plan import RolloutPart
from hotload.errors import StoreError
from hotload.identity import NamedVersion
from hotload.rollout.counts import GroupCounts
from hotload.training.step_record import StepRecord, TrainedGroups
from hotload.training.windows import OpenWindow

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import ArrayLike

RowKey = tuple[str, int, int]
"""Problem, number of the sample and number of the segment."""


@dataclass(frozen=True, slots=True, eq=False)
class StepGroups:
    """The groups of one optimizer step, in the order they are trained in."""

    frame: pl.DataFrame
    """Their rows."""
    groups: tuple[TrainedGroups, ...]

    @property
    def problem_ids(self) -> tuple[str, ...]:
        """The problem of each group."""
        return tuple(problem for part in self.groups for problem in part.problem_ids)


class ChosenGroup(NamedTuple):
    """A group that was taken for a step: its rows, the digest of its part, its problem, and, where
    a step has groups of several versions, whose cycle sampled it."""

    rows: pl.DataFrame
    part_sha256: str
    problem_id: str
    sampled_version: int | None = None


class UsableGroups:
    """Takes the groups of a window out of a reader, a step's worth at a time.

    A group is usable if it has a row to train on and not all of its advantages are 0; the others
    are acknowledged with the step that they come before, and used for none. A step's groups are
    sorted by their positions, so the same groups give the same bits in whatever order they came.
    A step in the making cannot be repeated, so a store that does not answer is asked again here.

    Args:
        positions: of every problem of the epoch, by its id.
        trained: problems that a record says are trained already: their groups, if they come again,
            are acknowledged alone.
    """

    def __init__(
        self, reader: RolloutReader, positions: Mapping[str, int], trained: Collection[str]
    ) -> None:
        self.positions, self.trained = positions, frozenset(trained)
        self.waiting: dict[str, ChosenGroup] = {}
        """By problem, the usable groups that have come and were not taken."""
        self.has_ended = False
        """Whether no further group comes."""
        self.unusable_count = self.taken_count = 0
        """Groups that have come and are not usable; those that were taken."""
        self._reader = reader
        self._open: list[Delivery] = []
        self._logprobs: dict[RowKey, ArrayLike] = {}
        self._waited = 0.0

    async def chunks(self, sizes: Sequence[int]) -> AsyncIterator[StepGroups]:
        """Take so many groups, and so many more, as they come; at the window's end fewer."""
        for size in sizes:
            if await self.has_more():
                yield await self.take(size)

    async def take(self, count: int) -> StepGroups:
        """Wait for the next usable groups, `count` of them or, at the window's end, fewer.

        Raises:
            StoreError: as `RolloutReader.next`.
            ValueError: there is none: `has_more` says so before.
        """
        await self._fill(count)
        chosen = sorted(list(self.waiting)[:count], key=self.positions.__getitem__)
        if not chosen:
            raise ValueError("the window has no further usable group")
        return step_groups([self.pop(one) for one in chosen])

    def pop(self, problem: str) -> ChosenGroup:
        """Take a group that waits."""
        self.taken_count += 1
        return self.waiting.pop(problem)

    async def has_more(self) -> bool:
        """Wait until another usable group has come, or the window has ended.

        Raises:
            StoreError: as `RolloutReader.next`.
        """
        await self._fill(1)
        return bool(self.waiting)

    def waited_seconds(self) -> float:
        """Count the seconds that were waited for groups since this was asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def look_now(self) -> None:
        """Look at once, as `RolloutReader.look_now`."""
        self._reader.look_now()

    @property
    def counts(self) -> GroupCounts:
        """Count what the rules did in the window so far."""
        return self._reader.counts.groups

    def raw_rewards(self) -> dict[str, float]:
        """Average the rewards of all samples of the window so far, those of groups that the rules
        dropped included, as a cycle's metrics do."""
        return raw_rewards(self.counts)

    async def acknowledge(self, trainer_logprobs: Mapping[RowKey, ArrayLike]) -> None:
        """Acknowledge all that was delivered and does not wait to be taken.

        Args:
            trainer_logprobs: the trainer's own, of the rows that were trained on.

        Raises:
            LeaseLostError, StoreError: as `RolloutReader.acknowledge`.
        """
        self._logprobs.update(trainer_logprobs)
        done = [one for one in self._open if not self.waiting.keys() & set(one.problem_ids)]
        for delivery in done:
            keys = delivery.frame.select("problem_id", "sample_number", "segment_number").rows()
            logprobs = [self._logprobs.get(key) for key in keys]
            is_trained = any(one is not None for one in logprobs)
            await self._reader.acknowledge(delivery, logprobs if is_trained else None)
            self._open.remove(delivery)
            for key in keys:
                self._logprobs.pop(key, None)

    async def poll(self, count: int) -> None:
        """Let come what is there now, at most so many groups.

        Raises:
            StoreError: as `RolloutReader.next`.
        """
        look = partial(self._reader.poll, count)
        delivery, may_come = await asked_again("a group", look, LONG_AGAIN_SECONDS)
        self.has_ended = not may_come
        if delivery is not None:
            self._take_in(delivery)

    def _take_in(self, delivery: Delivery) -> None:
        self._open.append(delivery)
        parts = zip(delivery.claims, delivery.part_sha256s, strict=True)
        part_of = {problem: digest for (_, _, some), digest in parts for problem in some}
        for rows in delivery.frame.partition_by("problem_id", maintain_order=True):
            problem = str(rows["problem_id"][0])
            if problem in self.trained:
                continue
            if is_usable(rows):
                self.waiting[problem] = ChosenGroup(rows, part_of[problem], problem)
            else:
                self.unusable_count += 1

    async def _fill(self, count: int) -> None:
        began = monotonic()
        while not self.has_ended and len(self.waiting) < count:
            look = partial(self._reader.next, count - len(self.waiting))
            delivery = await asked_again("a group", look, LONG_AGAIN_SECONDS)
            if delivery is None:
                self.has_ended = True
            else:
                self._take_in(delivery)
        self._waited += monotonic() - began


class GroupsAhead:
    """Takes usable groups out of several windows while their cycles write them.

    What has come of the oldest window is taken first; a group that is not there yet holds up none
    of a later window. A step has no two groups of one problem, which two epochs may have open.

    Args:
        poll_seconds: between two looks at cycles that still sample.
    """

    def __init__(self, poll_seconds: float = 0.5) -> None:
        self._poll_seconds = poll_seconds
        self._windows: dict[OpenWindow, UsableGroups] = {}
        self._chosen: set[tuple[OpenWindow, str]] = set()
        """Window and problem of each group taken since the last acknowledgement."""
        self._waited = 0.0

    def open(self, window: OpenWindow, groups: UsableGroups) -> None:
        """Take groups of this window, too; its version comes after those of the others."""
        self._windows[window] = groups

    @property
    def windows(self) -> tuple[OpenWindow, ...]:
        """Those of which a group may come, waits, or is to be acknowledged."""
        chosen = {window for window, _ in self._chosen}
        return tuple(
            window
            for window, groups in self._windows.items()
            if not groups.has_ended or groups.waiting or window in chosen
        )

    @property
    def live_count(self) -> int:
        """Groups that wait to be taken, or may still come."""
        return sum(
            len(groups.waiting)
            if groups.has_ended
            else window.count - len(groups.trained) - groups.taken_count - groups.unusable_count
            for window, groups in self._windows.items()
        )

    async def chunks(self, sizes: Sequence[int]) -> AsyncIterator[StepGroups]:
        """Take so many groups, and so many more, as they come; when all windows have ended
        fewer.

        Raises:
            StoreError: as `RolloutReader.next`.
        """
        for size in sizes:
            await self._fill(size)
            if chosen := self._available()[:size]:
                self._chosen.update(chosen)
                # In order, so that the same groups give the same bits in whatever order they came.
                chosen.sort(key=self._place)
                yield step_groups(
                    self._windows[window]
                    .pop(problem)
                    ._replace(sampled_version=window.policy_version)
                    for window, problem in chosen
                )

    async def has_more(self) -> bool:
        """Wait until another usable group has come, or all windows have ended.

        Raises:
            StoreError: as `RolloutReader.next`.
        """
        if not any(groups.waiting for groups in self._windows.values()):
            await self._fill(1)
        return any(groups.waiting for groups in self._windows.values())

    def waited_seconds(self) -> float:
        """Count the seconds that were waited for groups since this was asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    @property
    def counts(self) -> GroupCounts:
        """Count what the rules did in the windows since the last acknowledgement."""
        return GroupCounts.total(groups.counts for groups in self._windows.values())

    def raw_rewards(self) -> dict[str, float]:
        """Average as `UsableGroups.raw_rewards`, over the windows that groups were taken of since
        the last acknowledgement: those that the step is made of."""
        chosen = {window for window, _ in self._chosen}
        mine = (groups.counts for window, groups in self._windows.items() if window in chosen)
        return raw_rewards(GroupCounts.total(mine))

    async def acknowledge(self, trainer_logprobs: Mapping[RowKey, ArrayLike]) -> None:
        """Acknowledge all that was delivered and does not wait to be taken.

        Args:
            trainer_logprobs: the trainer's own, of the rows that were trained on.

        Raises:
            LeaseLostError, StoreError: as `RolloutReader.acknowledge`.
        """
        for window, groups in list(self._windows.items()):
            own = {
                key: values
                for key, values in trainer_logprobs.items()
                if (window, key[0]) in self._chosen
            }
            await groups.acknowledge(own)
            if groups.has_ended and not groups.waiting:
                del self._windows[window]
        self._chosen.clear()

    async def _fill(self, count: int) -> None:
        """Wait until so many groups can be taken, or all windows have ended."""
        began = monotonic()
        while not await self._has_come(count):  # noqa: ASYNC110 - the store says nothing by itself
            await asyncio.sleep(self._poll_seconds)
        self._waited += monotonic() - began

    async def _has_come(self, count: int) -> bool:
        """Look into the windows, oldest first, until there are as many as are wanted."""
        for groups in self._windows.values():
            while not groups.has_ended and (missing := count - len(self._available())) > 0:
                came = len(groups.waiting) + groups.unusable_count
                await groups.poll(missing)
                if len(groups.waiting) + groups.unusable_count == came:
                    break
        has_ended = all(groups.has_ended for groups in self._windows.values())
        return has_ended or len(self._available()) >= count

    def _available(self) -> list[tuple[OpenWindow, str]]:
        """List the groups that the step may have, oldest window first, then as they came."""
        taken = {problem for _, problem in self._chosen}
        found = []
        for window, groups in self._windows.items():
            mine = [problem for problem in groups.waiting if problem not in taken]
            taken.update(mine)
            found += [(window, problem) for problem in mine]
        return found

    def _place(self, chosen: tuple[OpenWindow, str]) -> tuple[int, int]:
        window, problem = chosen
        return window.policy_version, self._windows[window].positions[problem]


def raw_rewards(did: GroupCounts) -> dict[str, float]:
    """Name the figures of all samples that the rules for groups were given."""
    if not did.raw_reward_count:
        return {}
    return {
        "rollout/raw_reward": did.raw_reward_sum / did.raw_reward_count,
        "rollout/raw_samples": float(did.raw_samples),
    }


def is_usable(rows: pl.DataFrame) -> bool:
    """Tell whether a trainer learns from the rows of a group."""
    from hotload.dataset.trainer_batch import trainable

    return bool((trainable(rows)["advantage"] != 0).any())


def step_groups(chosen: Iterable[ChosenGroup]) -> StepGroups:
    """Lay groups end to end."""
    import polars as pl

    groups = list(chosen)
    trained = tuple(
        TrainedGroups(
            part_sha256=digest,
            problem_ids=tuple(one.problem_id for one in some),
            sampled_version=version,
        )
        for (digest, version), some in groupby(
            groups, key=lambda one: (one.part_sha256, one.sampled_version)
        )
    )
    return StepGroups(pl.concat([one.rows for one in groups]), trained)


async def read_recorded(store: Store, record: StepRecord) -> list[ChosenGroup]:
    """Read the groups of a recorded step again, in recorded order.

    Raises:
        StoreError: a part or a group is not there any more, or the store refuses.
    """
    parts: dict[int, dict[str, tuple[str, RolloutPart]]] = {}
    chosen: list[ChosenGroup] = []
    for trained in record.groups:
        number = trained.sampled_version
        version = NamedVersion(
            record.run_id, 0, record.sampled_version if number is None else number
        )
        if version.policy_version not in parts:
            parts[version.policy_version] = {
                part.sha256: (stored.directory, part)
                for stored in await find_rollouts(store, version)
                for part in stored.manifest.parts
            }
        found = parts[version.policy_version].get(trained.part_sha256)
        if found is None:
            missing = f"no part has the digest {trained.part_sha256[:12]}… that a step was made of"
            raise StoreError(f"rollouts of {version.run_id}-{version.policy_version}", missing)
        directory, part = found
        rows = await read_groups(store, directory, part)
        if lost := [one for one in trained.problem_ids if one not in rows]:
            raise StoreError(f"{directory}/{part.file}", f"has no group of {lost[0]!r}")
        chosen += [
            ChosenGroup(rows[one], trained.part_sha256, one, number) for one in trained.problem_ids
        ]
    return chosen
