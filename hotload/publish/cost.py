"""Cost: what a full snapshot and a delta would take, and which of the two is worth publishing.

There are two ways and no third: a delta is made on what the replicas serve, so it is one delta
however many versions they are behind, the fold of all the steps between. A full costs its bytes for
every replica; a delta has fewer, and adds a link that a replica which joins late has to replay.
With prices their money is compared. Without, the bytes that travel are, times the seconds where
those were measured. A delta has to save a quarter: for less, nobody encodes, applies and keeps one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hotload.identity import SnapshotKind
from hotload.options import Prices
from hotload.publish.snapshot import SnapshotPlan
from hotload.quantities import BYTES_PER_GB, duration, number, percent

WORTHWHILE = 0.75
"""What a delta may cost of a full's, at most. Weights that have nothing to do with the base still
compress to 80 %, since exponents are alike."""
NOISE_SECONDS = 30.0
"""Less time than this counts as this: between two cycles it moves by as much for other reasons."""
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class TimeTaken:
    """What a published snapshot took from the first encoded byte to the last replica."""

    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SnapshotCost:
    """What publishing in one way takes; `None` where nothing says.

    `egress_bytes` leave the store for the replicas that are there; a replica that joins afterwards
    loads `replay_bytes`: the anchor and every delta after it.
    """

    kind: SnapshotKind
    size_bytes: int
    egress_bytes: int
    replay_bytes: int
    seconds: float | None
    money: float | None


@dataclass(frozen=True, slots=True)
class CostChoice:
    """The ways that were compared, the one to take, and why."""

    options: tuple[SnapshotCost, ...]
    kind: SnapshotKind
    reason: str


@dataclass(frozen=True, slots=True)
class PublicationPreview:
    """What a cycle would publish now, and what every replica serves, in words.

    Without a plan the cycle has ended; without `options` it would upload nothing.
    """

    plan: SnapshotPlan | None
    options: tuple[SnapshotCost, ...]
    served: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CostBasis:
    """What the cost of a snapshot rests on.

    Args:
        replica_count: replicas that load it.
        full_every: publications in a chain; one replica is taken to join late in each, so that a
            publication pays for that share of a replay.
        taken: what the last full and the last delta took, as far as there was one.
    """

    replica_count: int
    full_every: int
    prices: Prices
    taken: Mapping[SnapshotKind, TimeTaken]

    def of_full(self, size_bytes: int) -> SnapshotCost:
        """Cost a full snapshot of `size_bytes`."""
        return self._cost(SnapshotKind.FULL, size_bytes, replay_bytes=size_bytes)

    def of_delta(self, size_bytes: int, *, full_bytes: int, chain_bytes: int) -> SnapshotCost:
        """Cost a delta of `size_bytes`.

        Args:
            full_bytes: of the full snapshot it stands for, and so of the anchor, whose layout is
                the same.
            chain_bytes: of the deltas before it.
        """
        replay_bytes = full_bytes + chain_bytes + size_bytes
        return self._cost(SnapshotKind.DELTA, size_bytes, replay_bytes=replay_bytes)

    def choose(self, full: SnapshotCost, delta: SnapshotCost) -> CostChoice:
        """Choose between the two; a tie is a full's, which ends the chain."""
        ours, theirs = self._moved_bytes(delta), self._moved_bytes(full)
        reason = f"a delta would move {percent(ours, theirs)} of the bytes of a full"
        if full.money and delta.money is not None:
            ours, theirs = delta.money, full.money
            reason = f"a delta would cost {number(ours)}, a full {number(theirs)}"
        elif full.seconds is not None and delta.seconds is not None:
            spent, instead = (max(one.seconds or 0, NOISE_SECONDS) for one in (delta, full))
            ours, theirs = ours * spent, theirs * instead
            if spent != instead:
                reason += f" in {duration(delta.seconds)}, not {duration(full.seconds)}"
        if ours < WORTHWHILE * theirs:
            return CostChoice((full, delta), SnapshotKind.DELTA, reason)
        reason += f": it is worth its place in the chain below {percent(WORTHWHILE, 1)}"
        return CostChoice((full, delta), SnapshotKind.FULL, reason)

    def _cost(self, kind: SnapshotKind, size_bytes: int, *, replay_bytes: int) -> SnapshotCost:
        egress_bytes, seconds = size_bytes * self.replica_count, self._seconds(kind, size_bytes)
        fetched_bytes = egress_bytes + replay_bytes / self.full_every
        # Where one of the two ways was never timed, neither pays for its time.
        is_timed = {SnapshotKind.FULL, SnapshotKind.DELTA} <= self.taken.keys()
        money = money_of(
            self.prices,
            stored_bytes=size_bytes,
            fetched_bytes=fetched_bytes,
            seconds=seconds if is_timed else None,
        )
        return SnapshotCost(kind, size_bytes, egress_bytes, replay_bytes, seconds, money)

    def _moved_bytes(self, cost: SnapshotCost) -> float:
        """Bytes up once, down to every replica, and a share of one that joins late."""
        return cost.size_bytes + cost.egress_bytes + cost.replay_bytes / self.full_every

    def _seconds(self, kind: SnapshotKind, size_bytes: int) -> float | None:
        """What the last one of the kind took, and the difference in bytes at the rate of a full."""
        last, full = self.taken.get(kind), self.taken.get(SnapshotKind.FULL)
        if last is None:
            return None
        per_byte = full.seconds / full.size_bytes if full and full.size_bytes else 0.0
        return max(last.seconds + (size_bytes - last.size_bytes) * per_byte, 0.0)


def money_of(
    prices: Prices, *, stored_bytes: int, fetched_bytes: float, seconds: float | None
) -> float | None:
    """Price bytes that are stored for a month, bytes that are fetched, and time; None without
    prices."""
    if prices == Prices():
        return None
    return (
        stored_bytes / BYTES_PER_GB * (prices.per_gb_month or 0.0)
        + fetched_bytes / BYTES_PER_GB * (prices.per_gb_egress or 0.0)
        + (seconds or 0.0) / SECONDS_PER_HOUR * (prices.per_hour_waited or 0.0)
    )
