"""Wait: for a first replica, and until every replica serves the snapshot (protocol §5)."""

import asyncio

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clock import monotonic
from hotload.errors import (
    LoadFailedError,
    ProtocolError,
    ReadinessTimeoutError,
    ServiceError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.identity import cycle_name
from hotload.options import ReadinessPolicy
from hotload.publish.readiness import Convergence, Verdict, assess, what_is_missing
from hotload.publish.snapshot import SnapshotManifest
from tasks.show import emit_waiting

SAID_AFTER_SECONDS = 60.0
BEGINS_WITHIN_SECONDS = 30.0
"""A load that no replica has shown by then, all of them idle, was lost before it began."""


class LongWait:
    """Says once, by an event, that a wait has lasted a minute."""

    def __init__(self) -> None:
        self._ends_at: float | None = monotonic() + SAID_AFTER_SECONDS

    def note(self, name: str, detail: str) -> None:
        """Note what the cycle `name` still waits for."""
        if self._ends_at is not None and monotonic() >= self._ends_at:
            self._ends_at = None
            emit_waiting(name, detail)


@task(cache_policy=NO_CACHE, task_run_name="replicas-{name}{service.label}")
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
    long_wait = LongWait()
    expected = expected_replica_count
    while True:
        try:
            status = await service.observe()
            expected = await _expected_now(service, readiness, expected, len(status.replicas))
            detail = what_is_missing(status, name, max(1, expected or 0))
            if detail is None:
                return
        except ServiceUnavailableError as error:
            detail = str(error)
        long_wait.note(name, f"{service.said}{detail}")
        if monotonic() >= deadline:
            waited = f"waited {readiness.scale_up_timeout_seconds:g} s"
            raise ServiceUnavailableError("observe", None, f"{detail}; {waited}")
        get_run_logger().info("waiting: %s", detail)
        await asyncio.sleep(readiness.poll_interval_seconds)


@task(cache_policy=NO_CACHE, task_run_name="settle-{name}{service.label}")
async def wait_until_settled(name: str, service: HotLoadClient, readiness: ReadinessPolicy) -> None:
    """Return once no replica loads anything, or after `weight_sync_timeout`: one that never ends
    must not keep the full snapshot from the others.

    A service may refuse a signal while a replica still loads the snapshot that failed elsewhere.
    """
    deadline = monotonic() + readiness.weight_sync_timeout
    while monotonic() < deadline:
        try:
            status = await service.observe()
            if status.replicas and not status.loading:
                return
            loading = ", ".join(status.loading)
            detail = f"a replica is still loading {loading}" if loading else "no replica is listed"
        except ServiceUnavailableError as error:
            detail = str(error)
        get_run_logger().info("waiting before the full snapshot of %s: %s", name, detail)
        await asyncio.sleep(readiness.poll_interval_seconds)


async def _expected_now(
    service: HotLoadClient,
    readiness: ReadinessPolicy,
    expected: int | None,
    listed: int,
) -> int | None:
    """Ask the service's description again where fewer replicas are listed than were expected: one
    that was scaled away is not waited for. What the cycle itself declares stays."""
    if expected is None or listed >= expected or readiness.replica_count is not None:
        return expected
    try:
        description = await service.describe()
    except ServiceError:
        return expected
    return (description.desired_replica_count if description else None) or expected


@task(cache_policy=NO_CACHE, task_run_name="wait-{manifest.identity}{service.label}")
async def wait_until_ready(
    service: HotLoadClient,
    manifest: SnapshotManifest,
    readiness: ReadinessPolicy,
    expected_replica_count: int | None,
) -> Convergence:
    """Wait until every expected replica serves the snapshot, and record how many did when.

    A GET that fails is a warning: gateways do fail now and then (protocol §5). Replicas that have
    left the load for something else, after a restart, are an answer: nobody brings them back.

    Raises:
        LoadFailedError: a replica reports an error for this identity, or none knows it any more.
        SnapshotRejectedError: its content was refused, so that no other snapshot of it is loaded.
        ReadinessTimeoutError: the deadline passed; the text says what was still missing.
        ProtocolError: the answer is not of the documented form.
    """
    logger = get_run_logger()
    began = monotonic()
    deadline = began + readiness.weight_sync_timeout
    detail, last, seen_last = "", "", "no status was read"
    expected = expected_replica_count
    was_seen, lost_since, long_wait = False, None, LongWait()
    trace = [(0.0, 0)]
    while True:
        try:
            status = await service.observe()
            expected = await _expected_now(service, readiness, expected, len(status.replicas))
            seen = assess(
                status,
                manifest.identity,
                manifest.kind,
                min_ready_fraction=readiness.min_ready_fraction,
                expected_replica_count=expected,
            )
            detail, seen_last = seen.detail, "; ".join(status.by_replica) or "no replica is listed"
            if seen.ready_count != trace[-1][1]:
                trace.append((monotonic() - began, seen.ready_count))
            if seen.verdict is Verdict.READY:
                logger.info(detail)
                return Convergence(seen.ready_count, tuple(trace), status.by_replica)
            if seen.verdict is Verdict.FAILED:
                # No field of a vendor is known to carry the cause: the replica is shown as it is.
                logger.warning(status.failed(manifest.identity)[0].raw)
                if (refusal := status.refused.get(manifest.identity)) is not None:
                    raise SnapshotRejectedError("wait", None, refusal)
                raise LoadFailedError(manifest.identity, f"{detail}: {seen_last}")
            if seen.verdict is not Verdict.LOST:
                was_seen, lost_since = was_seen or status.mentions(manifest.identity), None
            elif lost_since is None:
                lost_since = monotonic()
            elif was_seen or monotonic() - lost_since >= BEGINS_WITHIN_SECONDS:
                raise LoadFailedError(manifest.identity, detail)
        except (ProtocolError, SnapshotRejectedError):
            raise
        except ServiceError as error:
            detail = f"the status could not be read: {error}"
            logger.warning(detail)
        if monotonic() >= deadline:
            raise ReadinessTimeoutError(manifest.identity, f"{detail}: {seen_last}")
        name = cycle_name(manifest.run_id, manifest.policy_version, manifest.line)
        long_wait.note(name, f"{service.said}{detail}")
        if detail != last:
            logger.info("waiting: %s", detail)
            last = detail
        await asyncio.sleep(readiness.poll_interval_seconds)
