"""Preflight: is this the service the user means, and how many replicas are to be expected."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.errors import ServiceRefusedError
from hotload.spec import CycleSpec
from tasks.retrying import RETRIED


@task(cache_policy=NO_CACHE, task_run_name="preflight-{spec.name}", **RETRIED)
async def preflight_service(spec: CycleSpec, service: HotLoadClient, store: Store) -> int | None:
    """How many replicas must serve a snapshot; None if nobody knows (protocol §5, §8).

    Raises:
        ServiceRefusedError: the service cannot be hot-loaded from this store; says why.
    """
    description = await service.describe()
    logger = get_run_logger()
    for line in service.preflight(description, store.url):
        if not line.ok and line.stops:
            raise ServiceRefusedError(
                "preflight", None, f"{line.name}: {line.found}. {line.advice}"
            )
        if not line.ok:
            logger.warning("%s: %s. %s", line.name, line.found, line.advice)
    expected = spec.readiness.replica_count or description.desired_replica_count
    if expected is None:
        logger.warning("how many replicas to expect is unknown: the list is believed complete")
    return expected
