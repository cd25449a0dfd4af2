"""Reads the scored groups of one policy version, also while its cycle still samples.

Several consumers may read one rollout. Each group is delivered to one of them, again if that one
dies before it has acknowledged it, and never after it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from hotload.clients.handoff.directory import (
    StoredRollouts,
    acknowledged_drift,
    claims_log,
    find_rollouts,
    find_version,
    read_claims,
    read_groups,
    read_holdings,
)
from hotload.clients.store.store import Store
from hotload.clock import utc_now
from hotload.dataset.claims import CONSUMER_LIMIT_CHARACTERS, Claim, Holding, claims_path
from hotload.dataset.logprob_drift import LogprobDrift
from hotload.dataset.rollout_plan import PARTS, RolloutPart
from hotload.errors import LeaseLostError, StoreUnavailableError
from hotload.identity import NamedVersion, cycle_name
from hotload.rollout.counts import RolloutCounts

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import ArrayLike

LONGEST_LEASE_SECONDS = 7 * 86_400


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Complete groups for one consumer, to be acknowledged; `frame` has the rows of `Rollouts`."""

    frame: pl.DataFrame
    claims: tuple[tuple[str, int, tuple[str, ...]], ...]
    """The problems of the groups, by the log of the part they lie in and the number of the lease
    in it that they were delivered under."""
    row_counts: tuple[int, ...]
    """The rows of `frame` that belong to each of the claims, in order."""
    part_sha256s: tuple[str, ...]
    """Digest of the part file of each of the claims."""

    @property
    def problem_ids(self) -> tuple[str, ...]:
        """The problem of each group, in order."""
        return tuple(problem for _, _, problems in self.claims for problem in problems)


@dataclass(eq=False)
class _Part:
    """What the reader knows of a part: its log so far, and the groups it has not delivered."""

    info: RolloutPart
    path: str
    log: list[Claim] = field(default_factory=list)
    groups: dict[str, pl.DataFrame] | None = None

    @property
    def holding(self) -> Holding:
        return Holding.of(self.log)

    @property
    def is_done(self) -> bool:
        return len(self.holding.acknowledged) >= self.info.group_count


class RolloutReader:
    """Reads the groups of one policy version of a run, in deliveries of `groups_per_batch`.

    `async for delivery in reader`, or `for delivery in reader.blocking()` where there is no event
    loop; then `acknowledge` it when it must not come again, for instance when the step that used it
    is saved. The last delivery may be smaller. It ends when every group of the ended cycle is
    acknowledged by somebody or delivered to this reader. After an error the next call goes on.

    A version that is published again, under another identity, supersedes itself: also a reader that
    has begun goes on with the new rollouts, less the problems that somebody acknowledged, or this
    reader was given, before. In a new line of the run they come again: other weights made them.

    Args:
        consumer: a name a person recognises.
        groups_per_batch: groups per delivery.
        lease_seconds: how long a delivered group stays this consumer's without an acknowledgement
            or another call; longer than a training step, at least 1.
        poll_seconds: between two looks at a cycle that still samples.
        patience_seconds: of one call's waiting in which the cycle wrote no further group, before
            StoreUnavailableError says so.
        nonce: what tells this consumer from every other, for one that is killed and goes on with
            its own leases: 16 to 64 characters. Without it each reader is another.
        line: which line of the run; a trainer's own, so that it never gets what its line has not
            sampled. Without it, the line that this version of the run is of.
        clock: the time, compared between consumers.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        policy_version: int,
        *,
        consumer: str,
        groups_per_batch: int = 32,
        lease_seconds: float = 900.0,
        poll_seconds: float = 2.0,
        patience_seconds: float = 3600.0,
        nonce: str | None = None,
        line: int | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        if type(groups_per_batch) is not int or groups_per_batch < 1:
            raise ValueError(f"groups_per_batch: expected 1 or more, not {groups_per_batch}")
        if not 1 <= lease_seconds <= LONGEST_LEASE_SECONDS:
            expected = f"expected 1 to {LONGEST_LEASE_SECONDS}"
            raise ValueError(f"lease_seconds: {expected}, not {lease_seconds:g}")
        if not 0 < len(consumer) <= CONSUMER_LIMIT_CHARACTERS:
            expected = f"expected 1 to {CONSUMER_LIMIT_CHARACTERS} characters"
            raise ValueError(f"consumer: {expected}, not {len(consumer)}")
        self._store = store
        self._name = cycle_name(run_id, policy_version, line or 0)
        self._version = NamedVersion(run_id, line or 0, policy_version)
        self._follows_lines = line is None
        self._consumer, self._nonce = consumer, nonce or secrets.token_hex(16)
        self._groups_per_batch = groups_per_batch
        self._lease = timedelta(seconds=lease_seconds)
        self._poll_seconds = poll_seconds
        self._patience = timedelta(seconds=patience_seconds)
        self._clock = clock
        self._is_told = asyncio.Event()
        self._rollouts: list[StoredRollouts] = []
        self._parts: dict[str, _Part] = {}
        self._delivered: dict[str, str] = {}
        """By problem, the path of the part its group came from."""
        self._used: set[str] = set()
        """Problems acknowledged in superseded rollouts, as far as this reader knows."""

    def __aiter__(self) -> Self:
        """The reader itself."""
        return self

    async def __anext__(self) -> Delivery:
        """The next delivery, as `next`."""
        delivery = await self.next()
        if delivery is None:
            raise StopAsyncIteration
        return delivery

    async def __aenter__(self) -> Self:
        """The reader itself; leaving gives back what was not acknowledged."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """As `give_back`."""
        await self.give_back()

    async def next(self, groups: int | None = None) -> Delivery | None:
        """Wait for the next groups while the cycle samples; `None` when there will be no more.

        Args:
            groups: so many this time, instead of `groups_per_batch`.

        Raises:
            StoreUnavailableError: the store does not answer, or no group was written for
                `patience_seconds`; call again.
            StoreError: a part is not what the manifest says, or the store refuses.
        """
        wanted = groups or self._groups_per_batch
        since, seen = self._clock(), (f"{PARTS}/{self._name}", 0)
        while True:
            if (rollouts := await self._look()) is not None:
                leased, others_have_some = await self._collect(rollouts, wanted)
                count = sum(len(problems) for _, problems in leased)
                is_complete = rollouts.manifest.is_complete
                if count >= wanted or (count and is_complete):
                    return self._deliver(leased)
                if is_complete and not others_have_some:
                    return None
                if (there := (rollouts.directory, rollouts.group_count)) != seen:
                    since, seen = self._clock(), there
            if self._clock() - since > self._patience:
                waited = f"no group came for {self._patience.total_seconds():g} s"
                raise StoreUnavailableError(seen[0], f"{waited}: {self._reason()}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_told.wait(), self._poll_seconds)
            self._is_told.clear()

    @property
    def counts(self) -> RolloutCounts:
        """Count what the version's rollouts had at the last look, and what their rules dropped."""
        parts = self._rollouts[0].manifest.parts if self._rollouts else ()
        return RolloutCounts.total(parts)

    def look_now(self) -> None:
        """Let a call of `next` that waits look at once: whoever sampled knows that it has ended."""
        self._is_told.set()

    async def poll(self, groups: int) -> tuple[Delivery | None, bool]:
        """Take the groups that are there now, at most so many; and tell whether more may come.

        Raises:
            StoreError: as `next`.
        """
        if (rollouts := await self._look()) is None:
            return None, True
        leased, others_have_some = await self._collect(rollouts, groups)
        if leased:
            return self._deliver(leased), True
        return None, others_have_some or not rollouts.manifest.is_complete

    async def acknowledge(
        self, delivery: Delivery, trainer_logprobs: Sequence[ArrayLike | None] | None = None
    ) -> None:
        """Record that these groups are used: no consumer gets them again. May be repeated.

        Args:
            trainer_logprobs: the trainer's own log-probabilities, from which the drift is recorded
                with it: for each row of `delivery.frame` one number per completion token, or `None`
                for a row that was not trained on. `Batch.by_frame_row` makes them of a batch's.

        Raises:
            ValueError: the log-probabilities do not fit the rows; nothing was acknowledged.
            LeaseLostError: the lease expired and another consumer has taken them, or had them for
                a while; what was learnt from them may count twice now. Groups of other parts may be
                acknowledged already.
            StoreError: as `next`; call again.
        """
        drifts: list[LogprobDrift | None] = [None] * len(delivery.claims)
        if trainer_logprobs is not None:
            from hotload.dataset.logprob_drift import drifts_of

            drifts = drifts_of(trainer_logprobs, delivery.frame, delivery.row_counts)
        for (path, leased_at, problems), drift in zip(delivery.claims, drifts, strict=True):
            part = self._parts[path]
            while not self._is_acknowledged(part, leased_at, problems):
                await self._append(part, self._claim("acknowledge", problems, drift))
            self._used.update(one for one in problems if self._delivered.get(one) == path)

    async def drift(self) -> LogprobDrift | None:
        """Measure how far trainers' log-probabilities are from the sampler's, over all
        acknowledgements of this version that have some so far; `None` without any.

        Raises:
            StoreError: as `next`; call again.
        """
        await self._follow_lines()
        return await acknowledged_drift(self._store, self._version)

    async def give_back(self) -> None:
        """Let other consumers have at once what was delivered or leased and not acknowledged.

        Raises:
            StoreError: as `next`; the leases then expire.
        """
        for part in self._parts.values():
            while part.holding.is_held_by(self._nonce) and not part.is_done:
                await self._append(part, self._claim("give back"))
            part.groups = None
        self._delivered.clear()

    def blocking(self) -> BlockingReader:
        """Return the same reader for code without an event loop."""
        return BlockingReader(self)

    def _reason(self) -> str:
        """What a reader that has waited in vain waits for."""
        if not self._rollouts:
            return "no cycle of this run and version has written rollouts here"
        now = self._clock()
        for part in self._parts.values():
            if part.holding.is_busy(self._nonce, now) and (lease := part.holding.lease):
                return f"consumer {lease.consumer!r} has groups until {lease.expires_at}"
        return "the cycle has not written another; see whether it still runs"

    async def _look(self) -> StoredRollouts | None:
        """The version's rollouts, if there are any; until complete, others may supersede them."""
        if not self._rollouts or not self._rollouts[0].manifest.is_complete:
            await self._follow_lines()
            self._rollouts = await find_rollouts(self._store, self._version)
        return self._rollouts[0] if self._rollouts else None

    async def _follow_lines(self) -> None:
        if not self._follows_lines:
            return
        run_id, _, policy_version = self._version
        found = await find_version(self._store, run_id, policy_version)
        if found != self._version:
            self._version = found
            self._delivered.clear()
            self._used.clear()

    async def _collect(
        self, rollouts: StoredRollouts, missing: int
    ) -> tuple[list[tuple[_Part, tuple[str, ...]]], bool]:
        """Groups to deliver next, at most as many as are missing, all leased by us; and whether
        other consumers have groups that may still become free."""
        leased: list[tuple[_Part, tuple[str, ...]]] = []
        others_have_some = False
        parts = []
        for info in rollouts.manifest.parts:
            path = claims_path(rollouts.directory, info)
            parts.append(self._parts.setdefault(path, _Part(info, path)))
        for part in parts:  # also those that this batch will not come to
            if part.holding.is_held_by(self._nonce) and not part.is_done:
                await self._hold(part)
        for part in parts:
            if missing == 0 or part.is_done:
                continue
            if not await self._hold(part):
                others_have_some |= not part.is_done
            elif problems := (await self._problems(part, rollouts.directory))[:missing]:
                leased.append((part, problems))
                missing -= len(problems)
        return leased, others_have_some

    async def _hold(self, part: _Part) -> bool:
        """Whether the part is ours for a while; not if another consumer has it, or none of its
        groups is left."""
        while part.holding.needs_renewal(self._nonce, self._clock()):
            await read_claims(self._store, part.path, part.log)
            if part.is_done or part.holding.is_busy(self._nonce, self._clock()):
                return False
            if not part.holding.is_held_by(self._nonce):
                part.groups = None  # ours no longer: what was delivered comes again
            await self._append(part, self._claim("lease"))
        return True

    async def _problems(self, part: _Part, directory: str) -> tuple[str, ...]:
        """The problems of a leased part whose groups are to be delivered, in order."""
        if part.groups is None:
            for superseded in self._rollouts[1:]:
                for holding in await read_holdings(self._store, *superseded):
                    self._used.update(holding.acknowledged)
            groups = await read_groups(self._store, directory, part.info)
            done = part.holding.acknowledged
            part.groups = {name: rows for name, rows in groups.items() if name not in done}
        if used := tuple(problem for problem in part.groups if problem in self._used):
            # In this log, too, so that the part is done when its other groups are.
            await self._append(part, self._claim("acknowledge", used))
            for problem in used:
                del part.groups[problem]
        # What the superseded rollouts gave us is ours still.
        return tuple(p for p in part.groups if self._delivered.get(p, part.path) == part.path)

    def _deliver(self, leased: list[tuple[_Part, tuple[str, ...]]]) -> Delivery:
        import polars as pl

        frames = []
        for part, problems in leased:
            assert part.groups is not None
            frames.append(pl.concat([part.groups.pop(problem) for problem in problems]))
            self._delivered.update(dict.fromkeys(problems, part.path))
        claims = tuple((part.path, self._leased_at(part), problems) for part, problems in leased)
        heights = tuple(frame.height for frame in frames)
        digests = tuple(part.info.sha256 for part, _ in leased)
        return Delivery(pl.concat(frames), claims, heights, digests)

    def _leased_at(self, part: _Part) -> int:
        """The number in its log of our last lease of the part."""
        leases = (n for n, claim in enumerate(part.log) if claim.kind == "lease")
        return max(n for n in leases if part.log[n].nonce == self._nonce)

    def _is_acknowledged(self, part: _Part, leased_at: int, problems: tuple[str, ...]) -> bool:
        """Whether we have acknowledged the groups.

        Raises:
            LeaseLostError: we have not, and may not any more.
        """
        done = part.holding.acknowledged
        if all(done.get(problem) == self._nonce for problem in problems):
            return True
        since = [claim for claim in part.log[leased_at:] if claim.kind == "lease"]
        others = [lease.consumer for lease in since if lease.nonce != self._nonce]
        if others or not part.holding.is_held_by(self._nonce):
            holder = others[-1] if others else None
            reason = f"groups of {part.info.file} were leased again before they were acknowledged"
            raise LeaseLostError(holder, reason)
        return False

    def _claim(
        self,
        kind: Literal["lease", "acknowledge", "give back"],
        problems: tuple[str, ...] = (),
        drift: LogprobDrift | None = None,
    ) -> Claim:
        now = self._clock()
        return Claim(
            kind=kind,
            consumer=self._consumer,
            nonce=self._nonce,
            at=now,
            expires_at=now + self._lease if kind == "lease" else None,
            problem_ids=problems,
            drift=drift,
        )

    async def _append(self, part: _Part, claim: Claim) -> None:
        """Write the entry after those we know, unless somebody else has; then read what stands
        there."""
        await claims_log(self._store, part.path).create(len(part.log), claim.render())
        await read_claims(self._store, part.path, part.log)


class BlockingReader:
    """A reader for code without an event loop; it has one of its own between `with` and the end."""

    def __init__(self, reader: RolloutReader) -> None:
        self._reader = reader
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        """The reader itself; leaving gives back what was not acknowledged."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """As `RolloutReader.give_back`."""
        with self._runner as runner:
            runner.run(self._reader.give_back())

    def __iter__(self) -> Iterator[Delivery]:
        """Deliveries, as `RolloutReader.next`."""
        while (delivery := self._runner.run(self._reader.next())) is not None:
            yield delivery

    def acknowledge(
        self, delivery: Delivery, trainer_logprobs: Sequence[ArrayLike | None] | None = None
    ) -> None:
        """Acknowledge as `RolloutReader.acknowledge` does."""
        self._runner.run(self._reader.acknowledge(delivery, trainer_logprobs))

    def drift(self) -> LogprobDrift | None:
        """Read the drift as `RolloutReader.drift` does."""
        return self._runner.run(self._reader.drift())
