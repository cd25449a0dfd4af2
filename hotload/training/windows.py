"""Windows: which problems are sampled between two publications, in which order, and how far a run
has come through them.

A position counts the problems of one epoch in the order they are sampled in. A window holds the
problems of `weight_sync_interval` steps that come next, and never reaches into the next epoch,
since a cycle samples a problem once; the last window of an epoch may be shorter. In an asynchronous
loop several windows are open at once, each as large as the sampler may then be ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from hotload.records import Record
from hotload.training.settings import TrainingPart

RESERVE_WINDOWS = 3
"""A window may draw on as many further windows' problems for what its rules drop."""


class Windows(TrainingPart):
    """How a run goes through its problems: so many a step, so many steps a window."""

    epochs: int = Field(1, ge=1, le=10**6)
    """Times the run goes through the problems."""
    shuffle: bool = True
    """Take the problems in another order each epoch; off is the file's."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the order; with the epoch it decides it, on any machine."""
    prompt_groups_per_step: int = Field(8, ge=1, le=100_000)
    """P: usable groups per optimizer step."""
    weight_sync_interval: int = Field(1, ge=0, le=10_000)
    """N: optimizer steps between two publications; 0 publishes the start and the last weights
    alone."""

    def order(self, epoch: int, problem_count: int) -> tuple[int, ...]:
        """Order the problems' numbers for an epoch; it follows from seed and epoch alone."""
        if not self.shuffle:
            return tuple(range(problem_count))

        def key(number: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/{epoch}/{number}".encode()).digest()

        return tuple(sorted(range(problem_count), key=key))

    def next_window(
        self, cursor: Cursor, problem_count: int, *, size: int | None = None
    ) -> TrainingWindow | None:
        """Find what is sampled next: the first problems that are not done, and the rows after them
        that take the place of dropped ones; None once all epochs are over.

        Args:
            cursor: where the window before ended.
            size: its problems, where it has begun; else as many as are declared.

        Raises:
            ValueError: there are no problems.
        """
        for here in self._epochs_from(cursor, problem_count):
            if left := here.left_of(problem_count):
                size = size or self.window_size(problem_count)
                reserve = left[size : (1 + RESERVE_WINDOWS) * size]
                return TrainingWindow(here.epoch, left[:size], reserve)
        return None

    def window_ahead(
        self, cursor: Cursor, problem_count: int, policy_version: int, group_count: int
    ) -> OpenWindow | None:
        """Find what a version of an asynchronous loop samples: the problems after those of the
        windows before it, so many or as many as the epoch has left; None once all epochs are over.

        Args:
            cursor: where the window before ended.

        Raises:
            ValueError: there are no problems.
        """
        for here in self._epochs_from(cursor, problem_count):
            if (left := min(group_count, problem_count - here.done_before)) > 0:
                return OpenWindow(
                    policy_version=policy_version,
                    epoch=here.epoch,
                    first=here.done_before,
                    count=left,
                )
        return None

    def _epochs_from(self, cursor: Cursor, problem_count: int) -> Iterator[Cursor]:
        """Stand in the cursor's epoch, then at the beginning of the next, as far as there are."""
        if problem_count < 1:
            raise ValueError("there are no problems: whoever wrote the dataset must act")
        for epoch in range(cursor.epoch, min(cursor.epoch + 2, self.epochs)):
            yield cursor.in_epoch(epoch)

    def window_size(self, problem_count: int) -> int:
        """Count the problems of a full window."""
        return self.weight_sync_interval * self.prompt_groups_per_step or problem_count

    def step_limit(self, problem_count: int) -> int:
        """Count the optimizer steps of a run of whose groups all are usable; others make fewer."""
        full, rest = divmod(problem_count, self.window_size(problem_count))
        groups = self.prompt_groups_per_step
        a_window = -(-self.window_size(problem_count) // groups)
        return self.epochs * (full * a_window + -(-rest // groups))


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """Positions of an epoch that are sampled from one version of the weights."""

    epoch: int
    positions: tuple[int, ...]
    reserve: tuple[int, ...] = ()
    """Positions that take the place of dropped ones, in order."""

    def rows(self, policy_version: int) -> tuple[int, ...]:
        """Order positions and reserve as the file of which the cycle of a version, which is told
        how many problems it has, takes the window's and then the reserve: its own turn in the file
        comes first, so the file is turned the other way.
        """
        rows = (*self.positions, *self.reserve)
        start = policy_version * len(self.positions) % len(rows)
        return (*rows[len(rows) - start :], *rows[: len(rows) - start])


class Cursor(Record):
    """Problems that are done with: trained, or given up for good.

    All positions of the epoch before `done_before`, and those in `done_beyond`.
    """

    epoch: int = Field(0, ge=0)
    done_before: int = Field(0, ge=0)
    done_beyond: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        places = (self.done_before, *self.done_beyond)
        if any(later <= earlier for earlier, later in pairwise(places)):
            raise ValueError("done_beyond: expected growing positions beyond done_before")
        return self

    def done(self, positions: Collection[int]) -> Cursor:
        """Return the cursor with these positions of its epoch done, too."""
        beyond = {*self.done_beyond, *positions}
        before = self.done_before
        while before in beyond:
            before += 1
        rest = tuple(sorted(place for place in beyond if place > before))
        return Cursor(epoch=self.epoch, done_before=before, done_beyond=rest)

    def left_of(self, problem_count: int) -> tuple[int, ...]:
        """List the positions of the epoch that are still to be trained."""
        done = set(self.done_beyond)
        return tuple(one for one in range(self.done_before, problem_count) if one not in done)

    def is_over(self, window: TrainingWindow) -> bool:
        """Tell whether all problems of a window are done."""
        done = set(self.done_beyond)
        return window.epoch < self.epoch or (
            window.epoch == self.epoch
            and all(one < self.done_before or one in done for one in window.positions)
        )

    def in_epoch(self, epoch: int) -> Cursor:
        """Return the cursor for work in this epoch: itself, or the start of a later one.

        Raises:
            ValueError: the epoch is over.
        """
        if epoch < self.epoch:
            raise ValueError(f"epoch {epoch} is over: the run is in epoch {self.epoch}")
        return self if epoch == self.epoch else Cursor(epoch=epoch)


class OpenWindow(Record):
    """Neighbouring positions of an epoch that a version of an asynchronous loop samples, while
    those before and after it are sampled and trained, too."""

    policy_version: int = Field(ge=0, lt=10**9)
    epoch: int = Field(ge=0)
    first: int = Field(ge=0)
    count: int = Field(ge=1)

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions, in order."""
        return tuple(range(self.first, self.first + self.count))

    @property
    def began(self) -> Cursor:
        """What was in a window before this one."""
        return Cursor(epoch=self.epoch, done_before=self.first)

    @property
    def end(self) -> Cursor:
        """What is in a window once this one is open: the next one begins here."""
        return Cursor(epoch=self.epoch, done_before=self.first + self.count)
