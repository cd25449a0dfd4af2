"""Reading what a store holds of snapshots and old cycles, and removing what may go.

A snapshot goes manifest first, then its objects, its signal marks last: no reader finds a manifest
whose objects are gone, and a removal that was killed shows, a mark without a manifest, so that the
next one finishes it. What may go is decided in `hotload.publish.retention`.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

from hotload.clients.store.publisher_leases import held_leases
from hotload.clients.store.records import (
    METRICS,
    PUBLICATIONS,
    RANKS,
    READ_CONCURRENCY,
    REPORTS,
    SET_ASIDE,
    SIGNALS,
    SNAPSHOTS,
)
from hotload.clients.store.store import Store
from hotload.clients.store.stored_object import StoredObject
from hotload.clock import utc_now
from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import MANIFEST_FILE, PARTS
from hotload.errors import LeaseLostError, StoreError, StoreUnavailableError
from hotload.identity import (
    NamedVersion,
    is_identity,
    read_cycle_name,
    read_identity,
    version_of,
)
from hotload.publish.lease import RETENTION
from hotload.publish.retention import (
    PINS,
    ManifestState,
    OldCycle,
    StoredSnapshot,
    cycles_beyond,
)
from hotload.publish.snapshot import (
    MANIFEST_LIMIT_BYTES,
    SnapshotManifest,
    is_of_newer_version,
)


async def read_stored_snapshots(store: Store) -> list[StoredSnapshot]:
    """Read every snapshot of the store, with a manifest or without; at most 16 at a time.

    Directories with names that are not ours, and records of another form, are ignored.

    Raises:
        StoreError: the store refuses.
    """
    # A publisher writes objects, manifest, mark; read the other way round, what it writes meanwhile
    # shows as young objects at worst, and never as a mark without its manifest.
    marks = _stems(await _mark_paths(store))
    identities = _stems(await store.names(SNAPSHOTS))
    aside = _stems(await store.names(SET_ASIDE)) - identities
    places = {name for name in await store.names("") if version_of(name) is not None}
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def read(identity: str) -> StoredSnapshot | None:
        async with gate:
            if identity in identities:
                return await _read_snapshot(store, identity, identities)
            if identity in aside and await store.objects(identity):
                detail = f"it lies in {SET_ASIDE}"
                return await _in_doubt(store, identity, ManifestState.UNREADABLE, (), detail)
            return await _read_unfinished(store, identity, identity in marks)

    found = await overlap(map(read, sorted(identities | marks | places)))
    return [one for one in found if one is not None]


async def read_pins(store: Store) -> frozenset[str]:
    """List the identities that are pinned."""
    return _stems(await store.names(PINS))


async def pin(store: Store, identity: str) -> None:
    """Keep a snapshot, and so all it needs, from being removed until it is unpinned.

    Raises:
        StoreError: the store has no such snapshot, or refuses.
        LeaseLostError: snapshots are being removed at this moment, perhaps this one.
    """
    manifest = f"{SNAPSHOTS}/{identity}.json"
    if await store.size(manifest) is None:
        raise StoreError(manifest, "there is no such snapshot, so it cannot be pinned")
    at = utc_now().isoformat()
    await store.put_bytes(json.dumps({"identity": identity, "at": at}).encode(), _pin(identity))
    # A removal takes the lease and then reads the pins; we write a pin and then look at the lease.
    # So one of the two sees the other.
    if any(lease.holder == RETENTION for lease in await held_leases(store)):
        reason = "snapshots are being removed now, perhaps before this pin was seen; pin it again"
        raise LeaseLostError(RETENTION, reason)
    if await store.size(manifest) is None:
        raise StoreError(manifest, "it was removed before the pin was seen")


async def unpin(store: Store, identity: str) -> None:
    """Let a snapshot go again.

    Raises:
        StoreError: it is not pinned, or the store refuses.
    """
    if await store.size(_pin(identity)) is None:
        raise StoreError(_pin(identity), "there is no such pin")
    await store.delete_file(_pin(identity))


async def read_old_cycles(store: Store, keep: int) -> tuple[OldCycle, ...]:
    """Read what the ended cycles before the last `keep` of each run have left beside snapshots.

    A cycle has ended when it has a report. It goes by paths in this order: its rollouts' manifest,
    its rollouts, what ranks recorded, metrics, record and page, its report.

    Raises:
        StoreError: the store refuses.
    """
    old = cycles_beyond(_stems(await store.names(REPORTS)), keep)
    if not old:
        return ()
    objects: dict[str, list[StoredObject]] = {name: [] for name in old}
    for one in await _rollout_objects(store, old):
        name = _cycle_of_rollouts(one.path)
        if name in objects:
            objects[name].append(one)
    beside = {
        one.path: one
        for directory in (METRICS, PUBLICATIONS, REPORTS)
        for one in await store.objects(directory)
    }
    by_ranks: defaultdict[str, list[StoredObject]] = defaultdict(list)
    for one in await store.objects(RANKS):
        by_ranks[one.path.removeprefix(f"{RANKS}/").partition("/")[0]].append(one)
    cycles = []
    for name, rollouts in objects.items():
        rollouts.sort(key=lambda one: one.path.rpartition("/")[2] != MANIFEST_FILE)
        last = (
            f"{METRICS}/{name}.jsonl",
            f"{PUBLICATIONS}/{name}.json",
            f"{REPORTS}/{name}.html",
            f"{REPORTS}/{name}.json",
        )
        known = (beside[path] for path in last if path in beside)
        listed = [*rollouts, *by_ranks[name], *known]
        size_bytes = sum(one.size_bytes for one in listed)
        cycles.append(OldCycle(name, tuple(one.path for one in listed), size_bytes))
    return tuple(cycles)


async def remove_snapshots(
    store: Store, snapshots: Sequence[StoredSnapshot], check: Callable[[], Awaitable[None]]
) -> None:
    """Remove snapshots one after the other, each manifest first; safe to kill and to repeat.

    Args:
        check: raises where nothing may be removed any more; asked before every manifest, again
            before the objects, and before the mark.

    Raises:
        StoreError: the store refuses.
    """
    marks = await _mark_paths(store) if snapshots else []
    for snapshot in snapshots:
        identity = snapshot.identity
        await check()
        await store.delete_file(f"{SNAPSHOTS}/{identity}.json")
        objects = await store.objects(identity)
        await check()
        await _delete_all(store, (one.path for one in objects))
        # Who has taken over may publish this identity again, and mark it.
        await check()
        await _delete_all(store, (one for one in marks if one.endswith(f"/{identity}.json")))
        await store.delete_file(f"{SET_ASIDE}/{identity}.json")


async def remove_cycles(
    store: Store, cycles: Sequence[OldCycle], check: Callable[[], Awaitable[None]]
) -> None:
    """Remove what old cycles left, each report last; safe to kill and to repeat.

    Args:
        check: raises where nothing may be removed any more; asked before every cycle.

    Raises:
        StoreError: the store refuses.
    """
    for cycle in cycles:
        await check()
        *rest, report = cycle.paths
        manifests = [path for path in rest if path.endswith(f"/{MANIFEST_FILE}")]
        await _delete_all(store, manifests)
        await _delete_all(store, (path for path in rest if path not in manifests))
        await store.delete_file(report)


async def _read_snapshot(
    store: Store, identity: str, known: frozenset[str]
) -> StoredSnapshot | None:
    path = f"{SNAPSHOTS}/{identity}.json"
    try:
        data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    except StoreUnavailableError:
        raise
    except StoreError as error:
        if await store.size(path) is None:
            return None  # removed since it was listed
        return await _in_doubt(store, identity, ManifestState.UNREADABLE, (), error.reason)
    try:
        return StoredSnapshot.of(SnapshotManifest.parse(data, identity=identity))
    except StoreError as error:
        needs = _needs_of_newer(data, known - {identity})
        state = ManifestState.UNREADABLE if needs is None else ManifestState.NEWER
        return await _in_doubt(store, identity, state, needs or (), error.reason)


async def _in_doubt(
    store: Store, identity: str, state: ManifestState, needs: tuple[str, ...], detail: str
) -> StoredSnapshot:
    size_bytes = sum(one.size_bytes for one in await store.objects(identity))
    return StoredSnapshot(identity, state, size_bytes, needs=needs, detail=detail)


def _needs_of_newer(data: bytes, known: frozenset[str]) -> tuple[str, ...] | None:
    """List the snapshots that a manifest of a newer schema names; None if it is not one.

    How it states what it needs is unknown here, but it can only do so by name.
    """
    if not is_of_newer_version(data):
        return None
    return tuple(sorted(known.intersection(_texts(json.loads(data)))))


def _texts(document: object) -> Iterator[str]:
    open_ends = [document]
    while open_ends:
        part = open_ends.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            open_ends += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            open_ends += part


async def _read_unfinished(store: Store, identity: str, has_mark: bool) -> StoredSnapshot | None:
    objects = await store.objects(identity)
    if not objects and not has_mark:
        return None
    written = max((one.modified_at for one in objects), default=utc_now())
    return StoredSnapshot(
        identity,
        ManifestState.MISSING,
        sum(one.size_bytes for one in objects),
        age_seconds=max(0.0, (utc_now() - written).total_seconds()),
        was_signalled=has_mark,
    )


async def _rollout_objects(store: Store, old: Iterable[str]) -> list[StoredObject]:
    """Every object below the rollouts of versions that are as old as these, or older."""
    newest: dict[str, NamedVersion] = {}
    for one in filter(None, map(read_cycle_name, old)):
        newest[one.run_id] = max(one, newest.get(one.run_id, one))
    places = [
        name
        for name in await store.names(PARTS)
        if (found := read_identity(name)) and found.run_id in newest
        if found <= newest[found.run_id]
    ]
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def read(place: str) -> list[StoredObject]:
        async with gate:
            return await store.objects(f"{PARTS}/{place}")

    return [one for found in await overlap(map(read, places)) for one in found]


def _cycle_of_rollouts(path: str) -> str:
    """Name the cycle whose rollouts an object belongs to.

    A version that was not published has its rollouts below those of an earlier one.
    """
    identity, _, rest = path.removeprefix(f"{PARTS}/").partition("/")
    cycle, below = identity.rpartition("-")[0], rest.partition("/")[0]
    not_due = f"{cycle.rpartition('-')[0]}-{below}"
    return not_due if read_cycle_name(not_due) else cycle


async def _mark_paths(store: Store) -> list[str]:
    """List the marks of all services, that an identity may have been signalled."""
    return [one.path for one in await store.objects(SIGNALS)]


async def _delete_all(store: Store, paths: Iterable[str]) -> None:
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def delete(path: str) -> None:
        async with gate:
            await store.delete_file(path)

    await overlap(map(delete, paths))


def _stems(names: Iterable[str]) -> frozenset[str]:
    files = (name.rpartition("/")[2] for name in names)
    stems = (file.removesuffix(".json") for file in files if file.endswith(".json"))
    return frozenset(stem for stem in stems if is_identity(stem))


def _pin(identity: str) -> str:
    return f"{PINS}/{identity}.json"
