"""`report`: the page of a run, from what its cycles left in the store."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hotload.cli.outcome import Outcome
from hotload.cli.progress import Bar
from hotload.cli.refusals import UsageError
from hotload.cli.wording import count
from hotload.directory.files import write_atomic
from hotload.identity import RUN_ID

if TYPE_CHECKING:
    from hotload.publish.snapshot import SnapshotManifest
    from hotload.report.run_history import RunHistory

RUNS_SHOWN = 20


def report(options: Namespace, _: Bar | None) -> Outcome:
    """Write the page of a run."""
    if not RUN_ID.fullmatch(options.run):
        raise UsageError(f"found {options.run!r}, expected the name of a run")
    try:
        history, unfinished, unreadable = asyncio.run(_read(options.url, options.run))
        from hotload.report.run_page import render_run
    except ImportError as error:
        needed = f"the package {error.name!r} is not installed"
        raise UsageError(f"{needed}, expected `pip install hotload[clients]`") from None
    out: Path = options.out or Path(f"{options.run}.html")
    write_atomic(out, render_run(history, unfinished).encode())
    last = history.versions[-1]
    told = f"{count(len(history.versions), 'version')} of {options.run}, served {last.identity}"
    return Outcome(
        {
            "file": str(out),
            "run": options.run,
            "version_count": len(history.versions),
            "served": last.identity,
            "unreadable": unreadable,
        },
        lines=(f"{out}: {told}",),
        notes=tuple(f"the page is without {name}: its report is damaged" for name in unreadable),
    )


async def _read(url: str, run: str) -> tuple[RunHistory, tuple[SnapshotManifest, ...], list[str]]:
    """Read the run from its cycles' reports, not from the rows that they keep."""
    from hotload.clients.store.records import REPORTS
    from hotload.clients.store.run_records import add_missing, read_unfinished
    from hotload.report.run_history import RunHistory, runs_of

    store = _open_store(url)
    history, unreadable = await add_missing(store, RunHistory(run_id=run))
    if not history.versions:
        runs = runs_of(await store.names(REPORTS))
        shown = ", ".join(runs[:RUNS_SHOWN]) + (", …" if len(runs) > RUNS_SHOWN else "")
        expected = f"one of {len(runs)}: {shown}" if runs else "a store where a cycle has ended"
        raise UsageError(f"{url}: found no ended cycle of run {run!r}, expected {expected}")
    return history, await read_unfinished(store, history), unreadable


def _open_store(url: str) -> Any:
    """Open the store with the environment's credentials; a path may be relative."""
    from blocks.checkpoint_store import CheckpointStore

    try:
        return CheckpointStore(url=url if "://" in url else str(Path(url).absolute()))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"the URL of the store: {reason}") from None  # which may hold a secret
