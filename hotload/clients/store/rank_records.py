"""Records of versions that the ranks of a trainer write: attempts, shards handed over, the commit.

_hotload/ranks/<run>-<version>/0000.json              an attempt: what it follows; written by rank 0
_hotload/ranks/<run>-<version>/0000/<shard>.json      what a rank puts under the attempt's identity
_hotload/ranks/<run>-<version>/committed.json         the manifest of the one that was committed

Each is created only if absent, so that of several writers one succeeds and all read whose it is.
"""

from __future__ import annotations

import secrets

from pydantic import Field

from hotload.clients.store.lease_log import LeaseLog
from hotload.clients.store.records import (
    PUBLICATIONS,
    RANKS,
    REPORTS,
    read_publication,
    read_report,
)
from hotload.clients.store.store import Store
from hotload.concurrently import overlap
from hotload.errors import IdentityConflictError, StoreError, StoreUnavailableError
from hotload.identity import NamedVersion, cycle_of, ranks_identity, read_cycle_name
from hotload.publish.snapshot import MANIFEST_LIMIT_BYTES, Shard, SnapshotManifest
from hotload.records import Record

ATTEMPT_DIGITS = 4
RECORD_LIMIT_BYTES = 1 << 16


class RanksAttempt(Record):
    """One attempt at a version: the identity it follows, and how many ranks write it."""

    previous: str
    rank_count: int = Field(ge=1)
    nonce: str = Field(min_length=1, max_length=64)


async def open_attempt(store: Store, name: str, previous: str, rank_count: int) -> int:
    """Begin an attempt at the cycle `name`, under an identity that nothing lies under; returns its
    number, which nobody else gets.

    Raises:
        StoreError: the store refuses.
    """
    mine = RanksAttempt(previous=previous, rank_count=rank_count, nonce=secrets.token_hex(16))
    log = _log(store, name)
    number = max(await log.numbers(), default=-1) + 1
    while True:
        if not await store.names(ranks_identity(name, previous=previous, attempt=number)):
            await log.create(number, mine.model_dump_json().encode())
            if await read_attempt(store, name, number) == mine:
                return number
        number += 1


async def read_attempt(store: Store, name: str, number: int) -> RanksAttempt:
    """Read an attempt at the cycle `name`.

    Raises:
        StoreError: there is none of that number, or it cannot be read.
    """
    path = _log(store, name).path(number)
    data = await store.read_bytes(path, limit_bytes=RECORD_LIMIT_BYTES)
    return RanksAttempt.parse_stored(data, path)


async def record_shard(store: Store, name: str, attempt: int, identity: str, shard: Shard) -> None:
    """Record what is about to be put for a shard; the same again is fine.

    Recorded before it is put, so that nobody replaces what another rank has put.

    Raises:
        IdentityConflictError: another rank, or this one before it restarted, has other content.
        StoreError: the store refuses.
    """
    path = _shard_path(name, attempt, shard.file)
    await store.create_bytes(shard.model_dump_json().encode(), path)
    data = await store.read_bytes(path, limit_bytes=RECORD_LIMIT_BYTES)
    stands = Shard.parse_stored(data, path)
    if stands != shard:
        digests = f"(sha256 {stands.content_sha256[:12]}…, now {shard.content_sha256[:12]}…)"
        reason = f"{shard.file} was handed over in attempt {attempt} with other content {digests}"
        advice = "a version has one set of weights: let rank 0 open another attempt"
        raise IdentityConflictError(identity, f"{reason}; {advice}")


async def read_shards(
    store: Store, name: str, attempt: int, files: tuple[str, ...]
) -> list[Shard | None]:
    """Read what was recorded for each of the files; None for one that no rank handed over."""
    return await overlap(_read_shard(store, name, attempt, file) for file in files)


async def commit(store: Store, name: str, manifest: SnapshotManifest) -> SnapshotManifest:
    """Record the manifest as that of the version unless there is one; returns what stands.

    Raises:
        StoreError: the store refuses.
    """
    await store.create_bytes(manifest.render(), _commit_path(name))
    stands = await read_committed(store, name)
    if stands is None:
        raise StoreUnavailableError(_commit_path(name), "was written, and is not there")
    return stands


async def read_committed(store: Store, name: str) -> SnapshotManifest | None:
    """Read the manifest that was committed for the cycle `name`; None if none was.

    Raises:
        StoreError: it cannot be read, or is that of another cycle.
    """
    path = _commit_path(name)
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    manifest = SnapshotManifest.parse_stored(data, path)
    if cycle_of(manifest.identity) != name:
        raise StoreError(path, f"names {manifest.identity!r}, which is not of this cycle")
    return manifest


async def count_attempts(store: Store, name: str) -> int:
    """Count the attempts at the cycle `name` that were begun."""
    return len(await _log(store, name).numbers())


async def last_served(store: Store, version: NamedVersion) -> str | None:
    """Name what the newest version of the run before this one left served, as its record says;
    None without any."""
    names = {*await store.names(PUBLICATIONS), *await store.names(REPORTS)}
    stems = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    found = {named: stem for stem in stems if (named := read_cycle_name(stem))}
    earlier = [one for one in found if one.run_id == version.run_id and one < version]
    if not earlier:
        return None
    name = found[max(earlier)]
    ended = await read_report(store, name) or await read_publication(store, name)
    return ended.snapshot.identity if ended else None


async def _read_shard(store: Store, name: str, attempt: int, file: str) -> Shard | None:
    path = _shard_path(name, attempt, file)
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=RECORD_LIMIT_BYTES)
    return Shard.parse_stored(data, path)


def _log(store: Store, name: str) -> LeaseLog:
    directory = f"{RANKS}/{name}"
    return LeaseLog(
        store, directory, first=0, digits=ATTEMPT_DIGITS, limit_bytes=RECORD_LIMIT_BYTES
    )


def _shard_path(name: str, attempt: int, file: str) -> str:
    return f"{RANKS}/{name}/{attempt:0{ATTEMPT_DIGITS}d}/{file}.json"


def _commit_path(name: str) -> str:
    return f"{RANKS}/{name}/committed.json"
