"""Watch versions: notice while sampling that the replicas serve newer weights (protocol §16)."""

import asyncio
import logging

from hotload.clients.inference.sampler import Sampler
from hotload.clients.service.client import HotLoadClient
from hotload.clock import monotonic
from hotload.errors import ReadinessTimeoutError, ServiceError, ServiceUnavailableError
from hotload.identity import line_of, read_identity
from hotload.options import ReadinessPolicy
from hotload.publish.readiness import ServiceStatus
from hotload.sampling.row_gate import Gate

# A module's logger, or the one of an engine's run, whose lines a person reads there.
RunLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]


async def first_look(
    service: HotLoadClient,
    run_id: str,
    sampler: Sampler,
    gate: Gate,
    readiness: ReadinessPolicy,
    logger: RunLogger,
) -> None:
    """Tell gate and sampler what is served before anything is sampled: a cycle that goes on after a
    while may find newer weights.

    Where no replica serves what samples are stamped with, a change is awaited.

    Raises:
        ReadinessTimeoutError: the replicas serve something else, or nothing was learnt from the
            service, for `weight_sync_timeout` seconds.
        ServiceRefusedError, ProtocolError: as `HotLoadClient.observe`.
    """
    until = monotonic() + readiness.weight_sync_timeout
    while True:
        try:
            status = await service.observe()
        except ServiceUnavailableError as error:
            found = str(error)
        else:
            _tell(status, run_id, sampler, gate, logger)
            alone = (ServiceStatus((replica,)) for replica in status.replicas)
            if any(one.is_served_everywhere(sampler.identity) for one in alone):
                return
            found = status.describe()
        if monotonic() >= until:
            raise ReadinessTimeoutError(sampler.identity, found)
        logger.warning("sampling waits for %s: %s", sampler.identity, found)
        await asyncio.sleep(readiness.poll_interval_seconds)


async def watch_versions(
    service: HotLoadClient,
    run_id: str,
    sampler: Sampler,
    gate: Gate,
    poll_seconds: float,
    logger: RunLogger,
) -> None:
    """Tell gate and sampler, after `first_look`, of every version that all replicas are seen to
    serve; never ends.

    What is sampled from then on is stamped with it. A version on its way changes nothing.
    """
    while True:
        await asyncio.sleep(poll_seconds)
        try:
            status = await service.observe()
        except ServiceError as error:
            logger.warning("the served version could not be read: %s", error)
        else:
            _tell(status, run_id, sampler, gate, logger)


def _tell(
    status: ServiceStatus, run_id: str, sampler: Sampler, gate: Gate, logger: RunLogger
) -> None:
    line = line_of(sampler.identity)
    for identity in status.served_everywhere:
        served = read_identity(identity)
        if served is None or served.run_id != run_id or served.line < line:
            continue
        is_newer = gate.publish(served.policy_version)
        if served.line > line and not is_newer:
            # The run was taken back to before what is sampled here.
            gate.supersede()
            is_newer = True
        if is_newer:
            sampler.identity = identity
            logger.info("every replica serves %s now", identity)
