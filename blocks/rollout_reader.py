"""The reader's side of the hand-off: scored groups of one policy version, also while its cycle
still samples.

Several consumers may read one rollout. Each group is delivered to one of them, again if that one
dies before it has acknowledged it, and never after it has.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Literal, Self

import polars as pl
from numpy.typing import ArrayLike

from blocks.checkpoint_store import CheckpointStore
from blocks.rollout_directory import acknowledged_drift, find_rollouts, read_log, read_manifest
from hotload.claims import Claim, Holding, claim_file, claims_path
from hotload.drift import LogprobDrift
from hotload.errors import LeaseLostError, StoreError, StoreUnavailableError
from hotload.part_files import parse_rollouts
from hotload.parts import PARTS, RolloutManifest, RolloutPart
from hotload.snapshot import cycle_name
from hotload.trainer_logprobs import drifts_of


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Whole groups for one consumer, to be acknowledged; `frame` has the rows of `Rollouts`."""

    frame: pl.DataFrame
    claims: tuple[tuple[str, int, tuple[str, ...]], ...]
    """The problems of the groups, by the log of the part they lie in and the number of the lease
    in it that they were delivered under."""
    row_counts: tuple[int, ...]
    """The rows of `frame` that each of the claims has, in order."""

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
    """The groups of one policy version of a run, in deliveries of `groups_per_batch`.

    `async for delivery in reader`, or `for delivery in reader.blocking()` where there is no event
    loop; then `acknowledge` it when it must not come again, for instance when the step that used it
    is saved. The last delivery may be smaller. It ends when every group of the ended cycle is
    acknowledged by somebody or delivered to this reader. After an error the next call goes on.

    Args:
        consumer: a name a person recognises.
        groups_per_batch: groups per delivery.
        lease_seconds: how long a delivered group stays this consumer's without an acknowledgement
            or another call; longer than a training step.
        poll_seconds: between two looks at a cycle that still samples.
        patience_seconds: of waiting without a new group before StoreUnavailableError says so.
        clock: the time, compared between consumers.
    """

    def __init__(
        self,
        store: CheckpointStore,
        run_id: str,
        policy_version: int,
        *,
        consumer: str,
        groups_per_batch: int = 32,
        lease_seconds: float = 900.0,
        poll_seconds: float = 2.0,
        patience_seconds: float = 3600.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if groups_per_batch < 1:
            raise ValueError(f"groups_per_batch: expected at least 1, not {groups_per_batch}")
        self._store = store
        self._name = cycle_name(run_id, policy_version)
        self._run_id, self._policy_version = run_id, policy_version
        self._consumer, self._nonce = consumer, secrets.token_hex(16)
        self._groups_per_batch = groups_per_batch
        self._lease = timedelta(seconds=lease_seconds)
        self._poll_seconds = poll_seconds
        self._patience = timedelta(seconds=patience_seconds)
        self._clock = clock
        self._directory: str | None = None
        self._parts: dict[str, _Part] = {}

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

    async def next(self) -> Delivery | None:
        """The next groups, waited for while the cycle samples; `None` when there will be no more.

        Raises:
            StoreUnavailableError: the store does not answer, or no group came for
                `patience_seconds`; call again.
            StoreError: a part is not what the manifest says, or the store refuses.
        """
        began = self._clock()
        while True:
            manifest = await self._manifest()
            if manifest is not None:
                found, others_have_some = await self._collect(manifest)
                count = sum(len(problems) for _, problems in found)
                if count >= self._groups_per_batch or (count and manifest.is_complete):
                    return self._deliver(found)
                if manifest.is_complete and not others_have_some:
                    return None
            if self._clock() - began > self._patience:
                waited = f"no group came for {self._patience.total_seconds():g} s"
                raise StoreUnavailableError(self._directory or f"{PARTS}/{self._name}", waited)
            await asyncio.sleep(self._poll_seconds)

    async def acknowledge(
        self, delivery: Delivery, trainer_logprobs: Sequence[ArrayLike | None] | None = None
    ) -> None:
        """Record that these groups are used: nobody gets them again. Repeating it changes nothing.

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
            drifts = drifts_of(trainer_logprobs, delivery.frame, delivery.row_counts)
        for (path, leased_at, problems), drift in zip(delivery.claims, drifts, strict=True):
            part = self._parts[path]
            while not self._is_acknowledged(part, leased_at, problems):
                await self._append(part, self._claim("acknowledge", problems, drift))

    async def drift(self) -> LogprobDrift | None:
        """How far trainers' log-probabilities are from the sampler's, over all that consumers told
        with their acknowledgements of this version so far; `None` where none did.

        Raises:
            StoreError: as `next`; call again.
        """
        return await acknowledged_drift(self._store, self._run_id, self._policy_version)

    async def give_back(self) -> None:
        """Let other consumers have at once what was delivered or leased and not acknowledged.

        Raises:
            StoreError: as `next`; the leases then expire.
        """
        for part in self._parts.values():
            while part.holding.is_held_by(self._nonce) and not part.is_done:
                await self._append(part, self._claim("give back"))
            part.groups = None

    def blocking(self) -> BlockingReader:
        """The same for code without an event loop."""
        return BlockingReader(self)

    async def _manifest(self) -> RolloutManifest | None:
        if self._directory is None:
            self._directory = await find_rollouts(self._store, self._run_id, self._policy_version)
        if self._directory is None:
            return None
        return await read_manifest(self._store, self._directory)

    async def _collect(
        self, manifest: RolloutManifest
    ) -> tuple[list[tuple[_Part, tuple[str, ...]]], bool]:
        """Groups to deliver next, at most a batch, all leased by us; and whether other consumers
        have groups that may still become free."""
        found: list[tuple[_Part, tuple[str, ...]]] = []
        missing = self._groups_per_batch
        others_have_some = False
        for info in manifest.parts:
            path = claims_path(f"{self._directory}", info)
            part = self._parts.setdefault(path, _Part(info, path))
            if missing == 0 or part.is_done:
                continue
            groups = await self._lease_part(part)
            if groups is None:
                others_have_some |= not part.is_done
            elif groups:
                found.append((part, tuple(groups)[:missing]))
                missing -= len(found[-1][1])
        return found, others_have_some

    async def _lease_part(self, part: _Part) -> dict[str, pl.DataFrame] | None:
        """The groups of a part that are ours to deliver, in order; `None` if another consumer has
        it, or none is left."""
        while part.holding.needs_renewal(self._nonce, self._clock()):
            await read_log(self._store, part.path, part.log)
            if part.is_done or part.holding.is_busy(self._nonce, self._clock()):
                return None
            if not part.holding.is_held_by(self._nonce):
                part.groups = None  # ours no longer: what was delivered comes again
            await self._append(part, self._claim("lease"))
        if part.groups is None:
            path = f"{self._directory}/{part.info.file}"
            data = await self._store.read_bytes(path, limit_bytes=part.info.size_bytes)
            groups = await asyncio.to_thread(_parse, data, part.info, path)
            done = part.holding.acknowledged
            part.groups = {name: rows for name, rows in groups.items() if name not in done}
        return part.groups

    def _deliver(self, found: list[tuple[_Part, tuple[str, ...]]]) -> Delivery:
        frames = []
        for part, problems in found:
            assert part.groups is not None
            frames.append(pl.concat([part.groups.pop(problem) for problem in problems]))
        claims = tuple((part.path, self._leased_at(part), problems) for part, problems in found)
        return Delivery(pl.concat(frames), claims, tuple(frame.height for frame in frames))

    def _leased_at(self, part: _Part) -> int:
        """The number in its log of our last lease of the part."""
        leases = (n for n, each in enumerate(part.log) if each.kind == "lease")
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
            holder = others[-1] if others else "nobody"
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
        # What it returns does not matter: an answer can be lost on the way. What is stored decides.
        path = f"{part.path}/{claim_file(len(part.log))}"
        await self._store.create_bytes(claim.render(), path)
        await read_log(self._store, part.path, part.log)


def _parse(data: bytes, info: RolloutPart, path: str) -> dict[str, pl.DataFrame]:
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise StoreError(path, "its SHA-256 is not the manifest's")
    frame, _ = parse_rollouts(data, path=path)
    return {
        str(rows["problem_id"][0]): rows
        for rows in frame.partition_by("problem_id", maintain_order=True)
    }


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
        """As `RolloutReader.acknowledge`."""
        self._runner.run(self._reader.acknowledge(delivery, trainer_logprobs))

    def drift(self) -> LogprobDrift | None:
        """As `RolloutReader.drift`."""
        return self._runner.run(self._reader.drift())
