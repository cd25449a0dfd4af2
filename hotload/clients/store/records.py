"""Reading and writing the store's own records: manifests, signal marks, cycle reports.

The store is the only memory there is of what was published (design, rule 1). Paths are below the
bucket.
"""

import asyncio
import json
import re
from datetime import UTC, datetime

from pydantic import ValidationError

from hotload.clients.store.store import Store
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutManifest
from hotload.errors import StoreError
from hotload.publish.chain import PublishAttempt
from hotload.publish.snapshot import MANIFEST_LIMIT_BYTES, SnapshotManifest
from hotload.report.cycle_report import CycleReport

SNAPSHOTS = "_hotload/snapshots"
SIGNALS = "_hotload/signals"
REPORTS = "_hotload/reports"
METRICS = "_hotload/metrics"
READ_CONCURRENCY = 16


async def read_snapshot_manifest(store: Store, identity: str) -> SnapshotManifest | None:
    """Read the manifest of `identity`; None if this store has no complete snapshot of it."""
    path = f"{SNAPSHOTS}/{identity}.json"
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    return SnapshotManifest.parse(data, identity=identity)


async def write_manifest(store: Store, manifest: SnapshotManifest) -> None:
    """Record that everything the manifest names is in the store. Called last, never before."""
    await store.put_bytes(manifest.render(), f"{SNAPSHOTS}/{manifest.identity}.json")


async def mark_signalled(store: Store, identity: str) -> None:
    """Record that a signal for `identity` may be sent from now on; a restart then doubts it."""
    mark = {"identity": identity, "at": datetime.now(UTC).isoformat()}
    await store.put_bytes(json.dumps(mark).encode(), f"{SIGNALS}/{identity}.json")


async def read_attempts(store: Store, name: str) -> list[PublishAttempt]:
    """Read what the cycle `name` has published so far, oldest first."""
    of_this_cycle = re.compile(re.escape(name) + r"-[0-9a-f]{8}\.json")
    listed = [file for file in await store.names(SNAPSHOTS) if of_this_cycle.fullmatch(file)]
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def read(file: str) -> PublishAttempt | None:
        identity = file.removesuffix(".json")
        async with gate:
            manifest = await read_snapshot_manifest(store, identity)
            mark = await store.size(f"{SIGNALS}/{file}")
        return PublishAttempt(manifest, mark is not None) if manifest else None

    found = await asyncio.gather(*(read(file) for file in listed))
    return sorted((one for one in found if one), key=lambda one: one.manifest.attempt)


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
