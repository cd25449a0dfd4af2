"""Conclude: the cycle's report, into the store and before a person's eyes.

_hotload/metrics/<run>-<version>.jsonl    its numbers under the names of protocol §19
_hotload/reports/<run>-<version>.html     the same to look at
_hotload/runs/<run>.html                  the run up to now
_hotload/reports/<run>-<version>.json     last of all: the cycle has ended
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from pydantic import ValidationError

from hotload.clients.handoff.directory import acknowledged_drift, version_before
from hotload.clients.metrics.send import send_metrics
from hotload.clients.store import Store
from hotload.clients.store.records import (
    METRICS,
    page_path,
    read_report,
    read_rollout_manifest,
    write_report,
)
from hotload.clients.store.run_records import (
    add_missing,
    read_history,
    read_unfinished,
    write_history,
)
from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.dataset.rollout_plan import rollout_directory
from hotload.errors import StoreError, StoreUnavailableError
from hotload.publish.publication import Publication
from hotload.report.cycle_report import CycleReport
from hotload.report.metrics import cycle_metrics, json_lines
from hotload.report.page import render_report
from hotload.report.run_history import RunVersion
from hotload.report.run_page import render_run
from hotload.report.sample_statistics import SampleStatistics
from hotload.rollout.counts import RolloutSummary
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.validate import require_content

DRIFT_SECONDS = 60.0
ADDED_ROWS_LIMIT = 64
"""Versions a cycle adds to its run's page where they are missing there; the next one adds more."""


@task(cache_policy=NO_CACHE, task_run_name="report-{spec.name}", **RETRIED)
async def find_report(store: Store, spec: CycleSpec) -> CycleReport | None:
    """Find the report of this very cycle, if it has ended before.

    The checkpoint is compared with it while there is one; a trainer may have removed it since.

    Raises:
        IdentityConflictError: it ended with other content under the same run and version.
    """
    report = await read_report(store, spec.name)
    if report is not None:
        directory = Path(spec.checkpoint)
        await require_content(spec.name, directory, report.content_sha256, "ended with")
    return report


@task(cache_policy=NO_CACHE, task_run_name="conclude-{spec.name}", **RETRIED)
async def conclude_cycle(
    store: Store,
    spec: CycleSpec,
    publication: Publication,
    rollouts: RolloutSummary,
    began: float,
) -> CycleReport:
    """Leave metrics and a page to look at, record that the cycle has ended; returns its report.

    Args:
        began: when the cycle did, by the monotonic clock.

    Raises:
        StoreError: the store refuses.
    """
    report = CycleReport.of(spec, publication, rollouts, monotonic() - began)
    statistics, rollouts_ended_at = await _read_rollouts(store, report)
    trained = await _read_trained(store, spec)
    ended_at = datetime.now(UTC)
    metrics = cycle_metrics(report, statistics, trained)
    handed_back_at = rollouts_ended_at or ended_at
    lines = json_lines(report, metrics, rollouts_ended_at=handed_back_at)
    await store.put_bytes(lines, f"{METRICS}/{report.name}.jsonl")
    page = await asyncio.to_thread(
        render_report,
        report,
        statistics,
        ended_at=ended_at,
        rollouts_ended_at=rollouts_ended_at,
        trained=trained,
    )
    await store.put_bytes(page.encode(), page_path(report.name))
    await _write_run(store, report, {**metrics, "at": handed_back_at})
    for problem in await send_metrics(spec, report, metrics):
        get_run_logger().warning(problem)
    await write_report(store, report)
    return report


async def _read_rollouts(
    store: Store, report: CycleReport
) -> tuple[SampleStatistics | None, datetime | None]:
    """Read the manifest: the statistics of the samples, and when they were handed back.

    They only inform: without a manifest, or with parts whose samples an earlier version of hotload
    did not count, the report does without.
    """
    identity, version = report.rollouts.identity, report.policy_version
    directory = rollout_directory(identity, report.run_id, version)
    logger = get_run_logger()
    try:
        manifest = await read_rollout_manifest(store, directory)
        if manifest is None:
            raise StoreError(directory, "has no manifest")
    except StoreUnavailableError:
        raise
    except StoreError as error:
        logger.warning("the report is without statistics of the samples: %s", error)
        return None, None
    statistics = SampleStatistics.of(manifest)
    if statistics is None:
        logger.warning(
            "the report is without statistics of the samples: an earlier version of hotload wrote "
            "some of them and did not count them"
        )
    return statistics, manifest.created_at


async def _read_trained(store: Store, spec: CycleSpec) -> TrainedAgainst | None:
    """Read what the trainer said of this version's samples or, if it has not yet come to them,
    of those of the one before.

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
        reason = str(error) or f"not read in {DRIFT_SECONDS:g} s"
        get_run_logger().warning("the report is without the trainer's drift: %s", reason)
        return None
    return TrainedAgainst(version, drift) if drift is not None else None


async def _write_run(store: Store, report: CycleReport, metrics: Mapping[str, object]) -> None:
    """Add this cycle to its run's page, which only informs: it does without what is damaged."""
    try:
        history = (await read_history(store, report.run_id)).adding(
            [RunVersion.of(report, metrics)]
        )
        history, unreadable = await add_missing(store, history, limit=ADDED_ROWS_LIMIT)
        unfinished = await read_unfinished(store, history)
        page = await asyncio.to_thread(render_run, history, unfinished)
        await write_history(store, history, page)
    except StoreUnavailableError:
        raise
    except (StoreError, ValidationError) as error:
        get_run_logger().warning("the run's page was not written: %s", error)
        return
    if unreadable:
        get_run_logger().warning("the run's page is without %s", ", ".join(unreadable))


def already_done(report: CycleReport) -> State[CycleReport]:
    """Make the state of a flow run that found its cycle ended before."""
    return Completed(name="AlreadyDone", message="this cycle has ended before", data=report)


def completed(report: CycleReport) -> CycleReport | State[CycleReport]:
    """Make what the flow returns: its report, or a state of its own name where it fell back."""
    if report.fallback_reason is None:
        return report
    return Completed(name="CompletedByFallback", message=report.fallback_reason, data=report)
