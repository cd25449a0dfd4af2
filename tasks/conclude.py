"""Conclude: the cycle's report, into the store and before a person's eyes.

_hotload/metrics/<run>-<version>.jsonl    its numbers under the names of protocol §19
_hotload/reports/<run>-<version>.html     the same to look at
_hotload/runs/<run>.html                  the run up to now
_hotload/reports/<run>-<version>.json     last of all: the cycle has ended
"""

import asyncio
from collections.abc import Collection, Mapping
from datetime import datetime

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from pydantic import ValidationError

from hotload.clients.handoff.directory import acknowledged_drift, version_before
from hotload.clients.metrics.send import send_metrics
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.clients.store.records import (
    METRICS,
    page_path,
    read_lines,
    read_publication,
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
from hotload.clock import monotonic, utc_now
from hotload.concurrently import overlap
from hotload.dataset.logprob_drift import TrainedAgainst
from hotload.errors import (
    InvalidProblemsError,
    ServiceError,
    StoreError,
    StoreUnavailableError,
)
from hotload.publish.publication import Publication
from hotload.publish.readiness import ServiceStatus, Standing
from hotload.report.cycle_page import render_report
from hotload.report.cycle_report import CycleReport
from hotload.report.earlier_run import EarlierRun
from hotload.report.metrics import cycle_metrics, json_lines
from hotload.report.run_history import RunVersion
from hotload.report.run_page import render_run
from hotload.report.sample_statistics import SampleStatistics
from hotload.rollout.counts import RolloutSummary
from hotload.sampling.problems import plan_rollouts
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.validate import require_content

OTHER_SAMPLES = (
    "Problems, sampling or reward are declared otherwise now, and its samples are those of before: "
    "`again: rollouts` takes others beside them"
)
DRIFT_SECONDS = 60.0
ADDED_ROWS_LIMIT = 64
"""Versions a cycle adds to its run's page where they are missing there; the next one adds more."""


@task(cache_policy=NO_CACHE, task_run_name="earlier-{spec.name}", **RETRIED)
async def find_earlier(
    store: Store,
    services: Collection[HotLoadClient],
    spec: CycleSpec,
    *,
    may_go_back: bool = False,
) -> EarlierRun:
    """Find what an earlier run of this very cycle left, and whether the replicas still serve it.

    The checkpoint is compared with it while there is one; a trainer may have removed it since. Of
    several services, one that does not answer has nothing that stands.

    Args:
        may_go_back: as `plan_next`; nothing is compared.

    Raises:
        IdentityConflictError: it had other content under the same run and version.
    """
    statuses = dict(
        zip(
            (one.access.service for one in services),
            await overlap(_look_at(one) for one in services),
            strict=True,
        )
    )
    report = await read_report(store, spec.name)
    publication = await read_publication(store, spec.name)
    line = max(spec.line, (await read_lines(store, spec.run_id)).current)
    differs = False
    if not may_go_back and report is not None:
        await require_content(spec, line, report.content_sha256, "ended with")
        differs = await _declares_otherwise(store, spec, report.rollouts)
    elif not may_go_back and publication is not None:
        await require_content(spec, line, publication.content.sha256, "published")
    return EarlierRun.of(statuses, report, publication, run_id=spec.run_id, differs=differs)


async def _look_at(service: HotLoadClient) -> ServiceStatus:
    try:
        return await service.observe()
    except ServiceError as error:
        if not service.is_one_of_several:
            raise
        get_run_logger().warning("%s%s", service.said, error)
        return ServiceStatus(())


async def _declares_otherwise(store: Store, spec: CycleSpec, ended: RolloutSummary) -> bool:
    """Whether the spec asks for other samples than it did; a problem file that is gone asks for
    nothing."""
    if not ended.declaration_sha256:
        return False
    try:
        plan = await plan_rollouts(spec, ended.identity, store)
    except InvalidProblemsError:
        return False
    return plan.digest != ended.declaration_sha256


@task(cache_policy=NO_CACHE, task_run_name="conclude-{spec.name}", **RETRIED)
async def conclude_cycle(
    store: Store,
    spec: CycleSpec,
    publication: Publication,
    rollouts: RolloutSummary,
    baseline_trouble: str | None,
    began: float,
) -> CycleReport:
    """Leave metrics and a page to look at, record that the cycle has ended; returns its report.

    Args:
        baseline_trouble: why the next snapshot has no base for a delta, if it has none.
        began: when the cycle did, by the monotonic clock.

    Raises:
        StoreError: the store refuses.
    """
    seconds = monotonic() - began
    report = CycleReport.of(spec, publication, rollouts, seconds, baseline_trouble)
    statistics, rollouts_ended_at = await _read_rollouts(store, report)
    trained = await _read_trained(store, spec)
    ended_at = utc_now()
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
    directory = report.rollouts.parts_uri.removeprefix(f"{store.url}/")
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
    version = spec.version
    try:
        async with asyncio.timeout(DRIFT_SECONDS):
            drift = await acknowledged_drift(store, version)
            if drift is None and (before := await version_before(store, version)):
                version, drift = before, await acknowledged_drift(store, before)
    except (StoreError, TimeoutError) as error:
        reason = str(error) or f"not read in {DRIFT_SECONDS:g} s"
        get_run_logger().warning("the report is without the trainer's drift: %s", reason)
        return None
    return TrainedAgainst(version.policy_version, drift) if drift is not None else None


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


def ended_before(earlier: EarlierRun) -> State[CycleReport]:
    """Make the state of a flow run that found its cycle ended, and its snapshot served or passed by
    a later version of the run."""
    message = f"this cycle has ended before; the service serves {earlier.served}"
    if earlier.differs:
        message += f". {OTHER_SAMPLES}"
    is_served = earlier.standing is Standing.SERVED
    name = "AlreadyServed" if is_served else "Superseded"
    return Completed(name=name, message=message, data=earlier.report)


def completed(report: CycleReport, earlier: EarlierRun) -> CycleReport | State[CycleReport]:
    """Make what the flow returns: its report, or a state of its own name where it fell back, had
    ended before, or leaves no baseline."""
    if earlier.report is not None:
        remarks = [
            f"this cycle had ended before, and the service served {earlier.served}",
            report.fallback_reason,
            report.failed_services,
            report.next_is_full,
            OTHER_SAMPLES if earlier.differs and not earlier.stands else None,
        ]
        name = "SampledAgain" if earlier.stands else "ServedAgain"
        return Completed(name=name, message=". ".join(filter(None, remarks)), data=report)
    if failed := report.failed_services:
        return Completed(name="CompletedInPart", message=failed, data=report)
    if reason := report.fallback_reason or report.fallbacks_elsewhere:
        return Completed(name="CompletedByFallback", message=reason, data=report)
    if report.baseline_trouble is not None:
        message = report.next_is_full
        return Completed(name="CompletedWithoutBaseline", message=message, data=report)
    return report
