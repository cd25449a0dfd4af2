"""Conclude: the cycle's report, into the store and before a person's eyes.

_hotload/metrics/<run>-<version>.jsonl    its numbers under the names of protocol §19
_hotload/reports/<run>-<version>.html     the same to look at
_hotload/runs/<run>.html                  the run up to now
_hotload/reports/<run>-<version>.json     last of all: the cycle has ended
"""

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import cast

from polars.exceptions import PolarsError
from prefect import get_run_logger, task
from prefect.artifacts import acreate_link_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from pydantic import ValidationError

from blocks.checkpoint_store import CheckpointStore
from hotload.clients.handoff.directory import acknowledged_drift, read_manifest, version_before
from hotload.clients.metrics.send import send_metrics
from hotload.clients.store.records import METRICS, REPORTS, read_report, write_report
from hotload.clients.store.run_records import (
    add_missing,
    read_history,
    read_unfinished,
    write_history,
)
from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.dataset.rollout_plan import rollout_directory
from hotload.errors import StoreError, StoreUnavailableError
from hotload.report.cycle_report import CycleReport
from hotload.report.metrics import cycle_metrics, json_lines
from hotload.report.page import render_report
from hotload.report.run_history import RunVersion
from hotload.report.sample_statistics import Figures
from hotload.spec import CycleSpec
from tasks.retrying import RETRIED
from tasks.validate import require_content

DRIFT_SECONDS = 60.0
ADDED_ROWS_LIMIT = 64
"""Versions a cycle adds to its run's page where they are missing there; the next one adds more."""


@task(cache_policy=NO_CACHE, task_run_name="report-{spec.name}", **RETRIED)
async def find_report(store: CheckpointStore, spec: CycleSpec) -> CycleReport | None:
    """The report of this very cycle, if it has ended before.

    The checkpoint is compared with it while there is one; a trainer may have removed it since.

    Raises:
        IdentityConflictError: it ended with other content under the same run and version.
    """
    report = await read_report(store, spec.name)
    if report is not None:
        await require_content(spec, report.content_sha256, "ended with")
    return report


@task(cache_policy=NO_CACHE, task_run_name="conclude-{report.name}", **RETRIED)
async def conclude_cycle(store: CheckpointStore, spec: CycleSpec, report: CycleReport) -> None:
    """Leave metrics and a page to look at, record that the cycle has ended, show it as artifacts.

    Raises:
        StoreError: the store refuses.
    """
    figures, rollouts_ended_at = await _read_rollouts(store, report)
    trained = await _read_trained(store, spec)
    ended_at = datetime.now(UTC)
    metrics = cycle_metrics(report, figures, trained)
    handed_back_at = rollouts_ended_at or ended_at
    lines = json_lines(report, metrics, rollouts_ended_at=handed_back_at)
    await store.put_bytes(lines, f"{METRICS}/{report.name}.jsonl")
    page = await asyncio.to_thread(
        render_report,
        report,
        figures,
        ended_at=ended_at,
        rollouts_ended_at=rollouts_ended_at,
        trained=trained,
    )
    page_path = f"{REPORTS}/{report.name}.html"
    await store.put_bytes(page.encode(), page_path)
    await _write_run(store, report, {**metrics, "at": handed_back_at})
    await send_metrics(spec, report, metrics)
    await write_report(store, report)
    await _show(report, f"{store.url}/{page_path}")


async def _read_rollouts(
    store: CheckpointStore, report: CycleReport
) -> tuple[Figures, datetime | None]:
    """What the rows come to, and when they were handed back.

    They only inform: where the data is damaged or was moved, the report does without.
    """
    figures = Figures(report.run_id)
    identity, version = report.rollouts.identity, report.policy_version
    directory = path = rollout_directory(identity, report.run_id, version)
    try:
        manifest = await read_manifest(store, directory)
        if manifest is None:
            raise StoreError(directory, "has no manifest")
        for part in manifest.parts:
            path = f"{directory}/{part.file}"
            data = await store.read_bytes(path, limit_bytes=part.size_bytes)
            await asyncio.to_thread(figures.add, data)
    except StoreUnavailableError:
        raise
    except (StoreError, PolarsError) as error:
        get_run_logger().warning("the page shows only some of the samples: %s: %s", path, error)
        return figures, None
    return figures, manifest.created_at


async def _read_trained(store: CheckpointStore, spec: CycleSpec) -> TrainedAgainst | None:
    """What the trainer told of this version's samples or, if it has not yet come to them, of those
    of the one before.

    It only informs: where it cannot be read, or not soon, the report does without.
    """
    version = spec.policy_version
    try:
        async with asyncio.timeout(DRIFT_SECONDS):
            drift = await acknowledged_drift(store, spec.run_id, version)
            if drift is None:
                before = await version_before(store, spec.run_id, version)
                if before is not None:
                    version, drift = before, await acknowledged_drift(store, spec.run_id, before)
    except (StoreError, TimeoutError) as error:
        told = str(error) or f"not read in {DRIFT_SECONDS:g} s"
        get_run_logger().warning("the report is without the trainer's drift: %s", told)
        return None
    return TrainedAgainst(version, drift) if drift is not None else None


async def _write_run(
    store: CheckpointStore, report: CycleReport, metrics: Mapping[str, object]
) -> None:
    """Add this cycle to its run's page, which only informs: it does without what is damaged."""
    try:
        history = (await read_history(store, report.run_id)).adding(
            [RunVersion.of(report, metrics)]
        )
        history, unreadable = await add_missing(store, history, limit=ADDED_ROWS_LIMIT)
        unfinished = await read_unfinished(store, history)
        await write_history(store, history, unfinished)
    except StoreUnavailableError:
        raise
    except (StoreError, ValidationError) as error:
        get_run_logger().warning("the run's page was not written: %s", error)
        return
    if unreadable:
        get_run_logger().warning("the run's page is without %s", ", ".join(unreadable))


async def _show(report: CycleReport, page: str) -> None:
    key = re.sub(r"[^a-z0-9]+", "-", f"cycle-{report.name}".lower())
    snapshot, rollouts = report.snapshot, report.rollouts
    await acreate_table_artifact(
        report.rows(), key=key, description=f"**{snapshot.kind.value}** – {snapshot.reason}"
    )
    await acreate_link_artifact(
        page,
        key=f"{key}-page",
        link_text=page,
        description=f"Version {report.policy_version} as a page to look at, in any browser",
    )
    await acreate_link_artifact(
        rollouts.parts_uri,
        key=f"{key}-data",
        link_text=rollouts.parts_uri,
        description=f"{rollouts.group_count} scored groups of `{snapshot.identity}`, as Parquet",
    )


def named(name: str, message: str, report: CycleReport) -> CycleReport:
    """What a flow returns to end under a name of its own; its caller gets the report."""
    # Prefect takes a returned state as the flow run's own and hands its data to the caller.
    return cast(CycleReport, Completed(name=name, message=message, data=report))
