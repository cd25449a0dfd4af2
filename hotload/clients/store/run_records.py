"""Reading and writing the history of a run, and its page.

_hotload/runs/<run>.json     a row for every version: a cycle reads this one object, not a thousand
_hotload/runs/<run>.html     the same to look at

The page does not lie beside the cycles' pages: one of a run named `a-000001` would have the name of
the page of version 1 of run `a`. Two cycles that end at the same moment may lose a row of each
other; the next one makes it again from the report.
"""

import asyncio

from pydantic import ValidationError

from hotload.clients.store.records import (
    METRICS,
    READ_CONCURRENCY,
    REPORTS,
    SNAPSHOTS,
    read_snapshot_manifest,
)
from hotload.clients.store.store import Store
from hotload.errors import StoreError, StoreUnavailableError
from hotload.identity import cycle_name, version_of
from hotload.publish.snapshot import SnapshotManifest
from hotload.report.cycle_report import CycleReport
from hotload.report.run_history import (
    ROWS_LIMIT,
    RunHistory,
    RunVersion,
    last_metrics,
    report_version,
)

RUNS = "_hotload/runs"
HISTORY_LIMIT_BYTES = 32 << 20
REPORT_LIMIT_BYTES = 4 << 20
METRICS_LIMIT_BYTES = 32 << 20
UNFINISHED_LIMIT = 8


async def read_history(store: Store, run_id: str) -> RunHistory:
    """Read the rows that earlier cycles kept; a file that is missing or damaged has none."""
    path = f"{RUNS}/{run_id}.json"
    try:
        data = await store.read_bytes(path, limit_bytes=HISTORY_LIMIT_BYTES)
        history = RunHistory.parse_stored(data, path)
    except StoreUnavailableError:
        raise
    except StoreError:
        return RunHistory(run_id=run_id)
    return history if history.run_id == run_id else RunHistory(run_id=run_id)


async def add_missing(
    store: Store, history: RunHistory, *, limit: int = ROWS_LIMIT
) -> tuple[RunHistory, list[str]]:
    """Add the rows of ended cycles that the history lacks, of the newest `limit` alone; also name
    the reports that cannot be read.

    Raises:
        StoreError: the store refuses.
    """
    run_id, rows = history.run_id, {row.policy_version for row in history.versions}
    names = await store.names(REPORTS)
    versions = {version for name in names if (version := report_version(name, run_id)) is not None}
    missing = [one for one in sorted(versions)[-ROWS_LIMIT:] if one not in rows][-limit:]
    gate = asyncio.Semaphore(READ_CONCURRENCY)
    unreadable: list[str] = []

    async def read(version: int) -> RunVersion | None:
        name = cycle_name(run_id, version)
        async with gate:
            try:
                return await _read_row(store, name)
            except StoreUnavailableError:
                raise
            except StoreError:
                unreadable.append(name)
                return None

    added = await asyncio.gather(*map(read, missing))
    return history.adding(row for row in added if row), sorted(unreadable)


async def _read_row(store: Store, name: str) -> RunVersion:
    path = f"{REPORTS}/{name}.json"
    data = await store.read_bytes(path, limit_bytes=REPORT_LIMIT_BYTES)
    report = CycleReport.parse_stored(data, path)
    if report.name != name or cycle_name(report.run_id, report.policy_version) != name:
        raise StoreError(path, f"is the report of {report.name!r}")
    try:
        lines = f"{METRICS}/{name}.jsonl"
        metrics = last_metrics(await store.read_bytes(lines, limit_bytes=METRICS_LIMIT_BYTES))
    except StoreUnavailableError:
        raise
    except StoreError:
        metrics = {}  # the row is without spread and drift
    try:
        return RunVersion.of(report, metrics)
    except ValidationError:
        raise StoreError(path, "holds numbers that no cycle writes") from None


async def read_unfinished(store: Store, history: RunHistory) -> tuple[SnapshotManifest, ...]:
    """Read the newest snapshots of versions after the last of the history, whose cycles go on."""
    last = history.versions[-1].policy_version if history.versions else -1
    names = (name.removesuffix(".json") for name in await store.names(SNAPSHOTS))
    later = [
        (version, name)
        for name in names
        if (version := version_of(name, history.run_id)) is not None and version > last
    ]
    manifests = []
    for _, identity in sorted(later)[-UNFINISHED_LIMIT:]:
        try:
            manifests.append(await read_snapshot_manifest(store, identity))
        except StoreUnavailableError:
            raise
        except StoreError:
            continue  # a page that informs does without
    return tuple(manifest for manifest in manifests if manifest)


async def write_history(store: Store, history: RunHistory, page: str) -> None:
    """Write the rows of the run, and its page, an HTML file's text."""
    await store.put_bytes(history.render(), f"{RUNS}/{history.run_id}.json")
    await store.put_bytes(page.encode(), f"{RUNS}/{history.run_id}.html")
