"""Watch versions: notice while sampling that the replicas serve newer weights (protocol §16)."""

import asyncio
from collections.abc import Callable

from hotload.clients.inference.sampler import Sampler
from hotload.clients.service.client import HotLoadClient
from hotload.clock import monotonic
from hotload.concurrently import RunLogger
from hotload.errors import ReadinessTimeoutError, ServiceError, ServiceUnavailableError
from hotload.publish.readiness import ServiceStatus
from hotload.sampling.row_gate import Gate
from hotload.sampling.stamp import Stamp
from hotload.spec import CycleSpec


def put_stamp(stamp: Stamp, sampler: Sampler, gate: Gate) -> None:
    """Stamp with it what is sampled from now on, and hold the gate to it."""
    sampler.identity = stamp.identity
    gate.publish(stamp.policy_version)
    if stamp.is_superseded:
        gate.supersede()


class VersionWatch:
    """Looks at a service for newer versions, and hands every new stamp on.

    A version on its way changes nothing.
    """

    def __init__(
        self,
        service: HotLoadClient,
        spec: CycleSpec,
        stamp: Stamp,
        hand_on: Callable[[Stamp], None],
        logger: RunLogger,
    ) -> None:
        self._service, self._run_id, self._readiness = service, spec.run_id, spec.readiness
        self._stamp, self._hand_on, self._logger = stamp, hand_on, logger

    async def first_look(self) -> None:
        """Look before anything is sampled: a cycle that goes on after a while may find newer
        weights.

        Where no replica serves what samples are stamped with, a change is awaited.

        Raises:
            ReadinessTimeoutError: the replicas serve something else, or nothing was learnt from the
                service, for `weight_sync_timeout` seconds.
            ServiceRefusedError, ProtocolError: as `HotLoadClient.observe`.
        """
        until = monotonic() + self._readiness.weight_sync_timeout
        while True:
            try:
                status = await self._service.observe()
            except ServiceUnavailableError as error:
                found = str(error)
            else:
                self._note(status)
                alone = (ServiceStatus((replica,)) for replica in status.replicas)
                if any(one.is_served_everywhere(self._stamp.identity) for one in alone):
                    return
                found = status.describe()
            if monotonic() >= until:
                raise ReadinessTimeoutError(self._stamp.identity, found)
            self._logger.warning("sampling waits for %s: %s", self._stamp.identity, found)
            await asyncio.sleep(self._readiness.poll_interval_seconds)

    async def go_on(self) -> None:
        """Look again and again; never ends."""
        while True:
            await asyncio.sleep(self._readiness.poll_interval_seconds)
            try:
                status = await self._service.observe()
            except ServiceError as error:
                self._logger.warning("the served version could not be read: %s", error)
            else:
                self._note(status)

    def _note(self, status: ServiceStatus) -> None:
        stamp = self._stamp.after(status, self._run_id)
        if stamp != self._stamp:
            self._stamp = stamp
            self._hand_on(stamp)
            self._logger.info("every replica serves %s now", stamp.identity)
