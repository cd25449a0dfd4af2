"""Wait: for a first replica, and until every replica serves the snapshot (protocol §5)."""

import asyncio
from time import monotonic

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.errors import (
    LoadFailedError,
    ProtocolError,
    ReadinessTimeoutError,
    ServiceError,
    ServiceUnavailableError,
)
from hotload.options import ReadinessPolicy
from hotload.publish.readiness import Convergence, ServiceStatus, Verdict, assess
from hotload.publish.snapshot import SnapshotManifest


@task(cache_policy=NO_CACHE, task_run_name="replicas-{name}")
async def wait_for_replicas(
    name: str,
    service: HotLoadClient,
    readiness: ReadinessPolicy,
    expected_replica_count: int | None,
) -> None:
    """Return once every expected replica is listed and none is on its way to another snapshot.

    Signalling a service that never had a replica crashes it (protocol §4); a delta planned while a
    replica is missing, or loads what another cycle signalled, could not be merged there.

    Raises:
        ServiceUnavailableError: not so until the deadline; the text says what was missing.
    """
    deadline = monotonic() + readiness.scale_up_timeout_seconds
    while True:
        try:
            status = await service.observe()
            detail = _what_is_missing(status, name, max(1, expected_replica_count or 0))
            if detail is None:
                return
        except ServiceUnavailableError as error:
            detail = str(error)
        if monotonic() >= deadline:
            waited = f"waited {readiness.scale_up_timeout_seconds:g} s"
            raise ServiceUnavailableError("observe", None, f"{detail}; {waited}")
        get_run_logger().info("waiting: %s", detail)
        await asyncio.sleep(readiness.poll_interval_seconds)


def _what_is_missing(status: ServiceStatus, name: str, expected_count: int) -> str | None:
    if not status.replicas:
        return "the replica list is empty: scaled to zero or restarting"
    if len(status.replicas) < expected_count:
        return f"{len(status.replicas)} of {expected_count} replicas are listed"
    for replica in status.replicas:
        target = replica.loading_identity
        # What this very cycle signalled before it was killed is for the plan to judge.
        if target is not None and not target.startswith(f"{name}-"):
            return f"a replica is loading {target}"
    return None


@task(cache_policy=NO_CACHE, task_run_name="wait-{manifest.identity}")
async def wait_until_ready(
    service: HotLoadClient,
    manifest: SnapshotManifest,
    readiness: ReadinessPolicy,
    expected_replica_count: int | None,
) -> Convergence:
    """Wait until every expected replica serves the snapshot, and record how many did when.

    A GET that fails is a warning: gateways do fail now and then (protocol §5).

    Raises:
        LoadFailedError: a replica reports an error for this identity.
        ReadinessTimeoutError: the deadline passed; the text says what was still missing.
        ProtocolError: the answer is not of the documented form.
    """
    logger = get_run_logger()
    began = monotonic()
    deadline = began + readiness.weight_sync_timeout
    detail, last = "", ""
    trace = [(0.0, 0)]
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
            if seen.ready_count != trace[-1][1]:
                trace.append((monotonic() - began, seen.ready_count))
            if seen.verdict is Verdict.READY:
                logger.info(detail)
                return Convergence(seen.ready_count, tuple(trace))
            if seen.verdict is Verdict.FAILED:
                # No known field carries the cause, so the replica is shown as it is.
                logger.warning(status.failed(manifest.identity)[0].raw)
                raise LoadFailedError(manifest.identity, detail)
        except ProtocolError:
            raise
        except ServiceError as error:
            detail = f"the status could not be read: {error}"
            logger.warning(detail)
        if monotonic() >= deadline:
            raise ReadinessTimeoutError(manifest.identity, detail)
        if detail != last:
            logger.info("waiting: %s", detail)
            last = detail
        await asyncio.sleep(readiness.poll_interval_seconds)
