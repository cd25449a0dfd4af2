"""Reading and writing the store's own records: manifests, signal marks, cycle reports.

The store is the only memory there is of what was published (design, rule 1). Paths are below the
bucket.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable

from pydantic import ValidationError

from hotload.clients.store.store import Store
from hotload.clock import utc_now
from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutManifest
from hotload.errors import StoreError
from hotload.identity import cycle_of, read_cycle_name
from hotload.publish.chain import PublishAttempt
from hotload.publish.lines import Lines
from hotload.publish.publication import Publication
from hotload.publish.snapshot import MANIFEST_LIMIT_BYTES, SnapshotManifest
from hotload.report.cycle_report import CycleReport

SNAPSHOTS = "_hotload/snapshots"
SIGNALS = "_hotload/signals"
PUBLICATIONS = "_hotload/publications"
LINES = "_hotload/lines"
RANKS = "_hotload/ranks"
SET_ASIDE = "_hotload/set-aside"
REPORTS = "_hotload/reports"
METRICS = "_hotload/metrics"
READ_CONCURRENCY = 16

ManifestReader = Callable[[Store, str], Awaitable[SnapshotManifest | None]]


async def read_manifest_bytes(store: Store, identity: str) -> bytes | None:
    """Read what lies where the manifest of `identity` does, unparsed; None if nothing does."""
    path = f"{SNAPSHOTS}/{identity}.json"
    if await store.size(path) is None:
        return None
    return await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)


async def read_snapshot_manifest(store: Store, identity: str) -> SnapshotManifest | None:
    """Read the manifest of `identity`; None if this store has no complete snapshot of it."""
    data = await read_manifest_bytes(store, identity)
    return SnapshotManifest.parse(data, identity=identity) if data is not None else None


async def set_aside_manifest(store: Store, identity: str) -> str:
    """Move the manifest of `identity`, which cannot be read, out of the way; returns where it is.

    Its objects stay. Killed in between, there are two of it, and the next caller moves it again.
    """
    path, aside = f"{SNAPSHOTS}/{identity}.json", f"{SET_ASIDE}/{identity}.json"
    await store.put_bytes(await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES), aside)
    await store.delete_file(path)
    return f"{store.url}/{aside}"


async def write_manifest(store: Store, manifest: SnapshotManifest) -> None:
    """Record that everything the manifest names is in the store. Called last, never before."""
    await store.put_bytes(manifest.render(), f"{SNAPSHOTS}/{manifest.identity}.json")


async def mark_signalled(store: Store, service: str, identity: str) -> None:
    """Record that a signal for `identity` may be sent to `service` from now on; a restart then
    doubts it."""
    mark = {"identity": identity, "at": utc_now().isoformat()}
    await store.put_bytes(json.dumps(mark).encode(), f"{SIGNALS}/{service}/{identity}.json")


async def read_signalled(store: Store, service: str) -> frozenset[str]:
    """List the identities that carry the mark of a signal to `service`, sent or about to be."""
    names = [*await store.names(SIGNALS), *await store.names(f"{SIGNALS}/{service}")]
    return frozenset(one.removesuffix(".json") for one in names if one.endswith(".json"))


async def read_published(
    store: Store, name: str, read_manifest: ManifestReader = read_snapshot_manifest
) -> list[SnapshotManifest]:
    """Read the manifests of what the cycle `name` has published so far, oldest first."""
    of_this_cycle = re.compile(re.escape(name) + r"-[0-9a-f]{8}\.json")
    listed = [file for file in await store.names(SNAPSHOTS) if of_this_cycle.fullmatch(file)]
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def read(file: str) -> SnapshotManifest | None:
        async with gate:
            return await read_manifest(store, file.removesuffix(".json"))

    found = await overlap(read(file) for file in listed)
    return sorted((one for one in found if one), key=lambda one: one.attempt)


async def read_attempts(
    store: Store,
    name: str,
    service: str,
    read_manifest: ManifestReader = read_snapshot_manifest,
) -> list[PublishAttempt]:
    """Read what the cycle `name` has published so far, oldest first, and which of it may have been
    signalled to `service`."""

    async def attempt(manifest: SnapshotManifest) -> PublishAttempt:
        # A mark of an earlier version of hotload names no service: it counts for every one.
        file = f"{manifest.identity}.json"
        places = (f"{SIGNALS}/{service}/{file}", f"{SIGNALS}/{file}")
        marks = [await store.size(place) for place in places]
        return PublishAttempt(manifest, marks != [None, None])

    published = await read_published(store, name, read_manifest)
    return await overlap(attempt(manifest) for manifest in published)


async def read_lost_attempts(store: Store, name: str) -> frozenset[str]:
    """List what the cycle `name` has published under a record that had to be set aside."""
    stems = (file.removesuffix(".json") for file in await store.names(SET_ASIDE))
    return frozenset(one for one in stems if cycle_of(one) == name)


async def read_lines(store: Store, run_id: str) -> Lines:
    """Read which lines the run has after line 0, and where each began."""
    names = [name.removesuffix(".json") for name in await store.names(LINES)]
    begun = (one for one in map(read_cycle_name, names) if one and one.run_id == run_id)
    return Lines.of((one.line, one.policy_version) for one in begun)


async def record_line(store: Store, name: str) -> None:
    """Record that a line begins with the cycle `name`. Written before anything of it can be seen,
    and never removed: what it supersedes stays superseded."""
    mark = {"cycle": name, "at": utc_now().isoformat()}
    await store.put_bytes(json.dumps(mark).encode(), f"{LINES}/{name}.json")


async def read_publication(store: Store, name: str) -> Publication | None:
    """Read what the cycle `name` has published; None where it left no record.

    Raises:
        StoreError: the record cannot be read.
    """
    path = f"{PUBLICATIONS}/{name}.json"
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    return Publication.parse(data, path=path)


async def write_publication(store: Store, name: str, publication: Publication) -> None:
    """Record that the replicas serve what the cycle `name` published."""
    await store.put_bytes(
        publication.model_dump_json(indent=1).encode(), f"{PUBLICATIONS}/{name}.json"
    )


async def read_report(store: Store, name: str) -> CycleReport | None:
    """Read the report of a cycle that has ended, or None.

    Raises:
        StoreError: there is one, and it cannot be read.
    """
    path = f"{REPORTS}/{name}.json"
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    try:
        return CycleReport.model_validate_json(data)
    except ValidationError:
        raise StoreError(
            path, "is not a cycle report; move it away to run the cycle again"
        ) from None


async def write_report(store: Store, report: CycleReport) -> None:
    """Record that the cycle has ended. The very last thing a cycle writes."""
    await store.put_bytes(
        report.model_dump_json(indent=1).encode(), f"{REPORTS}/{report.name}.json"
    )


def page_path(name: str) -> str:
    """Name the object in which the page of the cycle `name` lies."""
    return f"{REPORTS}/{name}.html"


async def read_rollout_manifest(store: Store, directory: str) -> RolloutManifest | None:
    """Read the manifest of the rollouts in `directory`, once there is one.

    Raises:
        StoreError: not a manifest of this schema, or the store refuses.
    """
    path = f"{directory}/{MANIFEST_FILE}"
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    return RolloutManifest.parse(data, path=path)
