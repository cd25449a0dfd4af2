"""Admission: when a row of the problem file may be begun, and when it is too late (protocol §16).

A row is a problem with its G draws, begun together and under one policy version. Pure: who samples
reports what happened, in samples.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Admission:
    """The counts behind the two capacities, in samples.

    Args:
        group_size: G.
        batch_size: B, the samples one policy version is to have.
        initial_version: the version sampling began under.
        max_head_offpolicy_versions: O.
    """

    group_size: int
    batch_size: int
    initial_version: int
    max_head_offpolicy_versions: int
    published_version: int = -1
    """Moves on only after a confirmed hot-load."""
    accepted: int = 0
    """Samples of rows that are kept."""
    reserved: int = 0
    """Samples of rows that were begun and not settled."""
    in_flight: int = 0
    """Draws that were begun and have not ended."""
    is_superseded: bool = False
    """Whether a later line of the run is served, which began before what is sampled here."""
    sampled: int = 0
    """Samples of rows whose draws have all ended and that were not settled."""

    def __post_init__(self) -> None:
        self.published_version = max(self.published_version, self.initial_version)

    @property
    def staleness_capacity(self) -> int:
        """Samples that may still be begun without running ahead of the versions."""
        allowed = self.published_version + self.max_head_offpolicy_versions + 1
        used = self.initial_version * self.batch_size + self.accepted + self.reserved
        return allowed * self.batch_size - used

    def concurrency_capacity(self, limit: int) -> int:
        """Count the samples that may be begun when `limit` (C, at least G) may be in flight."""
        return max(limit, self.group_size) - self.in_flight

    def admits(self, limit: int) -> bool:
        """Tell whether a complete row may be begun.

        Rows that wait to be scored or written hold back new ones too, once they are more than may
        be in flight: a slow reward must not pile up samples. Rows that wait for their slowest draw
        do not, or the window would stand half empty.
        """
        capacity = min(self.staleness_capacity, self.concurrency_capacity(limit))
        return capacity >= self.group_size and self.sampled <= limit

    @property
    def is_stale(self) -> bool:
        """Whether the service is ahead by more than O versions, or has gone on from before: what
        is begun now comes too late.
        """
        ahead = self.published_version - self.initial_version
        return self.is_superseded or ahead > self.max_head_offpolicy_versions

    def begin_row(self) -> None:
        """Count a row as begun: its G draws are in flight."""
        self.reserved += self.group_size
        self.begin_draws(self.group_size)

    def begin_draws(self, count: int) -> None:
        """Draws of a row that was begun before are asked for again, or hedged."""
        self.in_flight += count

    def end_draws(self, count: int = 1) -> None:
        """Draws of a row ended, well or not."""
        self.in_flight -= count

    def end_row(self) -> None:
        """Count a row's last draw as ended; the row waits to be settled."""
        self.sampled += self.group_size

    def settle_row(self, *, is_kept: bool) -> None:
        """Settle a row that has ended: kept, or dropped so that another may take its place."""
        self.sampled -= self.group_size
        self.reserved -= self.group_size
        self.accepted += self.group_size if is_kept else 0

    def publish(self, version: int) -> bool:
        """Take note of `version`, which every replica was seen to serve; tell whether it is new."""
        if version <= self.published_version:
            return False
        self.published_version = version
        return True
