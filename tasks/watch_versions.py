"""Watch versions: notice while sampling that the replicas serve newer weights (protocol §16)."""

import asyncio

from prefect import get_run_logger

from blocks.hot_load_service import HotLoadService
from blocks.sampler import Sampler
from hotload.admission import version_of
from hotload.errors import ServiceError
from tasks.gate import Gate


async def watch_versions(
    service: HotLoadService, run_id: str, sampler: Sampler, gate: Gate, poll_seconds: float
) -> None:
    """Tell gate and sampler of every version that all replicas are seen to serve; never ends.

    What is sampled from then on is stamped with it. A version on its way changes nothing.
    """
    while True:
        await asyncio.sleep(poll_seconds)
        try:
            status = await service.observe()
        except ServiceError as error:
            get_run_logger().warning("the served version could not be read: %s", error)
            continue
        for identity in status.served_everywhere:
            version = version_of(identity, run_id)
            if version is not None and gate.publish(version):
                sampler.identity = identity
                get_run_logger().info("every replica serves %s now", identity)
