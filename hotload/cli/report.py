"""`report`: the page of a run, from what its cycles left in the store."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from hotload.cli.doors import clients_needed, open_store
from hotload.cli.outcome import CommandResult
from hotload.cli.progress import ProgressBar
from hotload.cli.refusals import UsageError
from hotload.directory.files import write_atomic
from hotload.identity import RUN_ID
from hotload.quantities import plural

if TYPE_CHECKING:
    from hotload.publish.snapshot import SnapshotManifest
    from hotload.report.run_history import RunHistory

RUNS_SHOWN = 20


def report(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Write the page of a run."""
    if not RUN_ID.fullmatch(options.run):
        raise UsageError(f"found {options.run!r}, expected the name of a run")
    with clients_needed():
        from hotload.report.run_page import render_run

        history, unfinished, unreadable = asyncio.run(_read(options.url, options.run))
    out: Path = options.out or Path(f"{options.run}.html")
    write_atomic(out, render_run(history, unfinished).encode())
    last = history.versions[-1]
    summary = f"{plural(len(history.versions), 'version')} of {options.run}, served {last.identity}"
    return CommandResult(
        {
            "file": str(out),
            "run": options.run,
            "version_count": len(history.versions),
            "served": last.identity,
            "unreadable": unreadable,
        },
        lines=(f"{out}: {summary}",),
        notes=tuple(f"the page is without {name}: its report is damaged" for name in unreadable),
    )


async def _read(url: str, run: str) -> tuple[RunHistory, tuple[SnapshotManifest, ...], list[str]]:
    """Read the run from its cycles' reports, not from the rows that they keep."""
    from hotload.clients.store.records import REPORTS
    from hotload.clients.store.run_records import add_missing, read_unfinished
    from hotload.report.run_history import RunHistory, reports_of

    store = open_store(url)
    history, unreadable = await add_missing(store, RunHistory(run_id=run))
    if not history.versions:
        runs = sorted({one.run_id for one in reports_of(await store.names(REPORTS))})
        shown = ", ".join(runs[:RUNS_SHOWN]) + (", …" if len(runs) > RUNS_SHOWN else "")
        expected = f"one of {len(runs)}: {shown}" if runs else "a store where a cycle has ended"
        raise UsageError(f"{store.url}: found no ended cycle of run {run!r}, expected {expected}")
    return history, await read_unfinished(store, history), unreadable
