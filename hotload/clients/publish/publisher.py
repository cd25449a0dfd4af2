"""Publish a policy version from the ranks of a trainer, each its own shards, without Prefect.

What lies in the store is a delta like any other once rank 0 has committed it, and nothing before
(docs/ranks.md). Its cycle says `checkpoint: ranks`, and begins at the signal.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self, TypeVar

from hotload.clients.publish.served_shard import ServedShard
from hotload.clients.publish.tensors import TensorShard
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.clients.store.failures import asked_again
from hotload.clients.store.rank_records import (
    commit,
    last_served,
    open_attempt,
    read_attempt,
    read_committed,
    read_shards,
    record_shard,
)
from hotload.clients.store.records import read_published, read_snapshot_manifest, write_manifest
from hotload.clients.store.side_files import in_order, put_again
from hotload.clock import utc_now
from hotload.concurrently import raise_first
from hotload.delta.byte_io import Bytes
from hotload.delta.encode import DeltaStats, encode_shard
from hotload.delta.ordered_threads import Workers
from hotload.directory.files import ComposedFile, refuse_file
from hotload.directory.shards import open_shard
from hotload.errors import (
    Finding,
    IdentityConflictError,
    InvalidCheckpointError,
    InvalidIdentityError,
    LayoutMismatchError,
    StoreError,
)
from hotload.identity import NamedVersion, SnapshotKind, cycle_name, ranks_identity
from hotload.publish.snapshot import CheckpointContent, Shard, SnapshotManifest, SnapshotPlan

UNDER_WAY_LIMIT = 8
"""Deltas that are put, and so held in memory, while the next is made."""
T = TypeVar("T")


class ShardPublisher:
    """Publishes what one rank has of one policy version, for code without an event loop.

        with ShardPublisher(store, "grpo7", 12, rank, of, served, attempt=attempt) as publisher:
            for file in publisher.share:
                publisher.put(file, tensors_of(file))
            publisher.flush()
            barrier()
            if rank == 0:
                publisher.commit()

    Rank 0 enters first and tells the others its `attempt`. What is put and never committed is
    served to nobody, and retention removes it.

    Args:
        rank, of: this rank, and how many there are.
        served: this rank's copy of the shards that it hands over, by name; the same for every
            version.
        previous: of rank 0: the identity that the version follows; without it, what the newest
            version of the run before left served. The other ranks take it from the attempt.
        attempt: what rank 0's publisher says; a rank that was started again goes on in it. Rank 0
            itself begins a new one without it, as after a restart from an earlier checkpoint.
        line: as of the cycle.
        service: gets a hint for each shard that is put, where its block would give them.

    Raises:
        ValueError: rank and number of ranks do not fit, or a rank other than 0 has no attempt.
        InvalidIdentityError: run, version or line could not begin an identity.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        policy_version: int,
        rank: int,
        of: int,
        served: Mapping[str, ServedShard],
        *,
        previous: str | None = None,
        attempt: int | None = None,
        line: int = 0,
        service: HotLoadClient | None = None,
    ) -> None:
        if not 0 <= rank < of:
            raise ValueError(f"rank: expected 0 to {of - 1}, not {rank}")
        if rank and attempt is None:
            raise ValueError("attempt: expected the number that rank 0's publisher has; send it")
        self._name = cycle_name(run_id, policy_version, line)
        self._version = NamedVersion(run_id, line, policy_version)
        self._store, self._served, self._service = store, served, service
        self._rank, self._of = rank, of
        self._previous_name, self._attempt = previous, attempt
        self._previous: SnapshotManifest | None = None
        self._under_way: list[tuple[str, Future[None]]] = []
        self._failed: dict[str, BaseException] = {}

    def __enter__(self) -> Self:
        """Open the attempt, or read it.

        Raises:
            InvalidIdentityError: the store knows nothing that the version could follow.
            ValueError: rank 0 began the attempt for another number of ranks.
            StoreError: there is no such attempt, or the store refuses.
        """
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._thread = Thread(target=self._loop.run_forever, name="put", daemon=True)
        self._thread.start()
        self._pool = Workers(os.cpu_count() or 1)
        try:
            self._previous = self._ask("the attempt", self._open)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Flush what is under way, unless the block failed; then end its threads. What was put
        stays.

        Raises:
            IdentityConflictError, StoreError: as `flush`.
        """
        try:
            if kind is None and self._under_way:
                self.flush()
        finally:
            self._end()

    @property
    def attempt(self) -> int:
        """The attempt at the version, for the other ranks."""
        assert self._attempt is not None, "enter the publisher first"
        return self._attempt

    @property
    def identity(self) -> str:
        """The identity that the version gets when it is committed."""
        previous = self._followed.identity
        return ranks_identity(self._name, previous=previous, attempt=self.attempt)

    @property
    def share(self) -> tuple[str, ...]:
        """The shards that fall to this rank where every rank has all tensors; which rank puts a
        shard changes none of its bytes."""
        return tuple(shard.file for shard in self._followed.shards)[self._rank :: self._of]

    def put(self, file: str, tensors: Mapping[str, object] | Path) -> Shard:
        """Make the delta of one shard on the copy of what is served, and put it into the store.

        The tensors may change once this returns: the delta is made, and is put while the next ones
        are. The same shard again is fine, also from another rank.

        Args:
            file: name of the shard as it is served.
            tensors: all tensors of the shard by name, contiguous and on the CPU: numpy's, or
                whatever has a buffer or `__dlpack__`; or a safetensors file that holds them.

        Raises:
            InvalidCheckpointError: other tensors than are served; a tensor elsewhere than on the
                CPU, or not contiguous; or the copy is not what is served.
            IdentityConflictError, StoreError: as `flush`, of any shard that was put.
        """
        followed = {shard.file: shard for shard in self._followed.shards}
        if file not in followed:
            expected = f"a shard of {self._followed.identity}, which this follows"
            refuse_file("unknown_shard", file, "another name", expected)
        if file not in self._served:
            refuse_file("served_copy", file, "no copy", "one, read with the others of this rank")
        copy = self._served[file]
        if not copy.is_led_to(followed[file].content_sha256):
            self._catch_up(copy)
        copy.follow(followed[file].content_sha256, self._pool)
        delta, stats = self._encode(copy, tensors)
        shard = Shard(
            file=file,
            size_bytes=stats.size_bytes,
            sha256=stats.sha256,
            content_size_bytes=stats.content_size_bytes,
            content_sha256=stats.content_sha256,
        )
        copy.note_next(delta, shard.content_sha256)
        put = self._begin(file, lambda: self._put(shard, ComposedFile(file, delta)))
        self._under_way.append((file, put))
        if len(self._under_way) > UNDER_WAY_LIMIT:
            self.flush()
        return shard

    def flush(self) -> None:
        """Wait until everything that was put lies in the store.

        Of several errors one is raised, a conflict before others, and the others are logged; each
        names its shard. Raises again until those are put again.

        Raises:
            IdentityConflictError: a shard was handed over in this attempt with other content.
            StoreError: the store refuses, or does not answer for a quarter of a minute.
        """
        ended, self._under_way = self._under_way, []
        wait([put for _, put in ended])
        for file, put in ended:
            if (error := put.exception()) is not None:
                self._failed[file] = error
            else:
                self._failed.pop(file, None)
        if self._failed:
            errors = list(self._failed.values())
            errors.sort(key=lambda error: not isinstance(error, IdentityConflictError))
            raise_first(BaseExceptionGroup(self._name, errors))

    def commit(self) -> str:
        """Record the version as whole, once every rank has flushed its shards; returns its
        identity.

        Its cycle may be triggered now. Only one attempt at a version is ever committed.

        Raises:
            InvalidCheckpointError: a shard was put by no rank.
            IdentityConflictError: another attempt was committed, or the version was published with
                other content.
            StoreError: as `flush`.
        """
        self.flush()
        return self._ask("the commit", self._commit).identity

    def _encode(
        self, copy: ServedShard, tensors: Mapping[str, object] | Path
    ) -> tuple[bytes, DeltaStats]:
        out = _GrowingMemory()
        encode = partial(encode_shard, copy, copy.header, pool=self._pool, self_check=True)
        if not isinstance(tensors, Path):
            stats = encode(TensorShard(copy.head, copy.header, tensors), copy.header, out)
            return bytes(out.data), stats
        with open_shard(tensors) as target:
            try:
                stats = encode(target, target.header, out)
            except LayoutMismatchError as error:
                refuse_file("layout", copy.header.file, str(error), "the tensors that are served")
        return bytes(out.data), stats

    def _begin(self, what: str, step: Callable[[], Awaitable[T]]) -> Future[T]:
        asked = asked_again(f"{what} of {self._name}", step)
        return asyncio.run_coroutine_threadsafe(asked, self._loop)

    def _ask(self, what: str, step: Callable[[], Awaitable[T]]) -> T:
        return self._begin(what, step).result()

    def _end(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._runner.close()

    @property
    def _followed(self) -> SnapshotManifest:
        assert self._previous is not None, "enter the publisher first"
        return self._previous

    async def _open(self) -> SnapshotManifest:
        """Open or read the attempt; returns the manifest of what the version follows."""
        if self._attempt is None:
            previous = self._previous_name or await last_served(self._store, self._version)
            if previous is None:
                reason = f"no earlier version of the run is recorded as served in {self._store.url}"
                advice = "publish its first version by a cycle with a checkpoint"
                raise InvalidIdentityError(self._name, f"{reason}; {advice}")
            manifest = await self._manifest_of(previous)
            self._attempt = await open_attempt(self._store, self._name, previous, self._of)
            return manifest
        found = await read_attempt(self._store, self._name, self._attempt)
        if found.rank_count != self._of:
            expected = f"{found.rank_count}, as rank 0 has it in attempt {self._attempt}"
            raise ValueError(f"of: expected {expected}, not {self._of}")
        return await self._manifest_of(found.previous)

    async def _manifest_of(self, identity: str) -> SnapshotManifest:
        manifest = await read_snapshot_manifest(self._store, identity)
        if manifest is None:
            raise InvalidIdentityError(identity, f"{self._store.url} has no snapshot of it")
        if manifest.kind is SnapshotKind.LORA:
            raise InvalidIdentityError(identity, "an adapter is published whole, by a cycle")
        return manifest

    def _catch_up(self, copy: ServedShard) -> None:
        """Lead the copy of a rank that was started again to what is served, by what lies in the
        store: deltas on what it is, or else the full shard and the deltas on that.

        Raises:
            StoreError: the store does not have what was published.
        """
        file = copy.header.file
        for at in self._ask(f"{file} as served", lambda: self._way_of(copy)):
            path, shard = f"{at.identity}/{file}", at.shard(file)
            assert shard is not None
            read = partial(self._store.read_bytes, path, limit_bytes=shard.size_bytes)
            data = self._ask(path, read)
            if hashlib.sha256(data).hexdigest() != shard.sha256:
                raise StoreError(path, "is not what was published")
            if at.previous is None:
                copy.replace(data, shard.content_sha256)
            else:
                copy.note_next(data, shard.content_sha256)
                copy.follow(shard.content_sha256, self._pool)

    async def _way_of(self, copy: ServedShard) -> list[SnapshotManifest]:
        """List the snapshots that lead the copy to what is served, oldest first."""
        way, at = list[SnapshotManifest](), self._followed
        while (shard := at.shard(copy.header.file)) and shard.content_sha256 != copy.sha256:
            way.append(at)
            if at.previous is None:
                break
            if len(way) > self._followed.chain_length:
                raise StoreError(at.identity, "its chain in the store does not end")
            at = await self._manifest_of(at.previous)
        return way[::-1]

    async def _put(self, shard: Shard, delta: ComposedFile) -> None:
        identity, path = self.identity, f"{self.identity}/{shard.file}"
        await record_shard(self._store, self._name, self.attempt, identity, shard)
        if await self._store.size(path) != shard.size_bytes:
            await self._store.put_file(delta, path)
        if self._service is not None:
            await self._service.hint(
                identity=identity,
                file=shard.file,
                uri=f"{self._store.url}/{path}",
                size_bytes=shard.size_bytes,
                kind=SnapshotKind.DELTA,
                previous=self._followed.identity,
            )

    async def _commit(self) -> SnapshotManifest:
        store, followed, identity = self._store, self._followed, self.identity
        committed = await read_committed(store, self._name)
        if committed is None:
            shards = await self._handed_over()
            for side_file in in_order(followed.side_files):
                await put_again(store, identity, followed.identity, side_file)
            manifest = self._manifest(shards)
            await self._refuse_conflict(manifest)
            # Of several the first is the one. All it names lies there: nothing has to follow.
            committed = await commit(store, self._name, manifest)
        if committed.identity != identity:
            reason = f"committed as {committed.identity}, by another attempt or another rank 0"
            raise IdentityConflictError(identity, f"{reason}; one of the two trainers has to stop")
        await write_manifest(store, committed)
        return committed

    async def _handed_over(self) -> list[Shard]:
        """Read what the ranks have put: every shard, and all of its bytes."""
        files = tuple(shard.file for shard in self._followed.shards)
        recorded = await read_shards(self._store, self._name, self.attempt, files)
        findings = []
        for file, shard in zip(files, recorded, strict=True):
            size = await self._store.size(f"{self.identity}/{file}") if shard else None
            if shard is None or size != shard.size_bytes:
                found = "put by no rank" if shard is None else "not wholly put"
                expected = f"put in attempt {self.attempt} before rank 0 commits"
                findings.append(Finding("missing_shard", file, None, found, expected))
        if findings:
            raise InvalidCheckpointError(tuple(findings))
        return [shard for shard in recorded if shard is not None]

    def _manifest(self, shards: list[Shard]) -> SnapshotManifest:
        followed = self._followed
        plan = SnapshotPlan(
            identity=self.identity,
            run_id=self._version.run_id,
            policy_version=self._version.policy_version,
            kind=SnapshotKind.DELTA,
            previous=followed.identity,
            anchor=followed.anchor,
            chain_length=followed.chain_length + 1,
            attempt=self.attempt,
            reason=f"the trainer's ranks wrote it on {followed.identity}",
        )
        content = CheckpointContent.of_stored(shards, followed.side_files)
        return SnapshotManifest.of(plan, content, shards, created_at=utc_now())

    async def _refuse_conflict(self, manifest: SnapshotManifest) -> None:
        for published in await read_published(self._store, self._name):
            if not published.is_of(manifest.content_sha256):
                reason = f"published as {published.identity} with other content"
                raise IdentityConflictError(self._name, reason)


class _GrowingMemory:
    """A delta under way, in memory (`hotload.delta.byte_io.Writable`)."""

    def __init__(self) -> None:
        self.data = bytearray()

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.data[offset : offset + len(view)]

    def write_at(self, offset: int, data: Bytes) -> None:
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def truncate(self, size_bytes: int) -> None:
        del self.data[size_bytes:]
