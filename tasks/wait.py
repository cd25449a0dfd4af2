"""Wait: for a first replica, and until every replica serves the snapshot (protocol §5)."""

import asyncio
from time import monotonic

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from blocks.hot_load_service import HotLoadService
from hotload.errors import (
    LoadFailedError,
    ReadinessTimeoutError,
    ServiceUnavailableError,
)
from hotload.readiness import ServiceStatus, Verdict, assess
from hotload.snapshot import SnapshotManifest
from hotload.spec import ReadinessPolicy


@task(cache_policy=NO_CACHE, task_run_name="first-replica")
async def wait_for_replicas(service: HotLoadService, readiness: ReadinessPolicy) -> ServiceStatus:
    """The service's status, once it lists a replica.

    Signalling a service that never had one crashes it (protocol §4).

    Raises:
        ServiceUnavailableError: it does not answer, or lists none, until the deadline.
    """
    deadline = monotonic() + readiness.scale_up_timeout_seconds
    while True:
        try:
            status = await service.observe()
            if status.replicas:
                return status
            detail = "the replica list is empty: scaled to zero or restarting"
        except ServiceUnavailableError as error:
            detail = str(error)
        if monotonic() >= deadline:
            waited = f"waited {readiness.scale_up_timeout_seconds:g} s"
            raise ServiceUnavailableError("observe", None, f"{detail}; {waited}")
        get_run_logger().info("no replica yet: %s", detail)
        await asyncio.sleep(readiness.poll_interval_seconds)


@task(cache_policy=NO_CACHE, task_run_name="wait-{manifest.identity}")
async def wait_until_ready(
    service: HotLoadService,
    manifest: SnapshotManifest,
    readiness: ReadinessPolicy,
    expected_replica_count: int | None,
) -> int:
    """How many replicas serve the snapshot, once every expected one does.

    A GET that fails is a warning: gateways do fail now and then (protocol §5).

    Raises:
        LoadFailedError: a replica reports an error for this identity.
        ReadinessTimeoutError: the deadline passed; the text says what was still missing.
    """
    logger = get_run_logger()
    deadline = monotonic() + readiness.weight_sync_timeout
    detail, last = "", ""
    while True:
        try:
            status = await service.observe()
            seen = assess(
                status,
                manifest.identity,
                manifest.kind,
                min_ready_fraction=readiness.min_ready_fraction,
                expected_replica_count=expected_replica_count,
            )
            detail = seen.detail
            if seen.verdict is Verdict.READY:
                logger.info(detail)
                return seen.ready_count
            if seen.verdict is Verdict.FAILED:
                # No known field carries the cause, so the replica is shown as it is.
                logger.warning(status.failed(manifest.identity)[0].raw)
                raise LoadFailedError(manifest.identity, detail)
        except ServiceUnavailableError as error:
            detail = f"the status could not be read: {error}"
            logger.warning(detail)
        if monotonic() >= deadline:
            raise ReadinessTimeoutError(manifest.identity, detail)
        if detail != last:
            logger.info("waiting: %s", detail)
            last = detail
        await asyncio.sleep(readiness.poll_interval_seconds)
