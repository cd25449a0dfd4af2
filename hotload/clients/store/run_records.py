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
from hotload.concurrently import overlap
from hotload.errors import StoreError, StoreUnavailableError
from hotload.identity import NamedVersion, cycle_name, read_identity
from hotload.publish.snapshot import SnapshotManifest
from hotload.report.cycle_report import CycleReport
from hotload.report.run_history import (
    ROWS_LIMIT,
    RunHistory,
    RunVersion,
    last_metrics,
    reports_of,
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
    rows = {row.order for row in history.versions}
    ended = [one for one in reports_of(await store.names(REPORTS)) if one.run_id == history.run_id]
    missing = [one for one in ended[-ROWS_LIMIT:] if one[1:] not in rows][-limit:]
    gate = asyncio.Semaphore(READ_CONCURRENCY)
    unreadable: list[str] = []

    async def read(version: NamedVersion) -> RunVersion | None:
        name = cycle_name(version.run_id, version.policy_version, version.line)
        async with gate:
            try:
                return await _read_row(store, name)
            except StoreUnavailableError:
                raise
            except StoreError:
                unreadable.append(name)
                return None

    added = await overlap(map(read, missing))
    return history.adding(row for row in added if row), sorted(unreadable)


async def last_ended_version(store: Store, run_id: str, line: int) -> int | None:
    """Find the newest version of a line whose cycle has ended; None before the first."""
    ended = reports_of(await store.names(REPORTS))
    of_line = (one.policy_version for one in ended if (one.run_id, one.line) == (run_id, line))
    return max(of_line, default=None)


async def _read_row(store: Store, name: str) -> RunVersion:
    path = f"{REPORTS}/{name}.json"
    data = await store.read_bytes(path, limit_bytes=REPORT_LIMIT_BYTES)
    report = CycleReport.parse_stored(data, path)
    if {report.name, cycle_name(report.run_id, report.policy_version, report.line)} != {name}:
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
    last = history.versions[-1].order if history.versions else (0, -1)
    names = (name.removesuffix(".json") for name in await store.names(SNAPSHOTS))
    later = [
        (named, name)
        for name in names
        if (named := read_identity(name)) and named.run_id == history.run_id and named[1:] > last
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
