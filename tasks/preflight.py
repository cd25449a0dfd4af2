"""Preflight: is this the service the user means, and how many replicas are to be expected."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.errors import ServiceRefusedError
from tasks import RETRIED


@task(cache_policy=NO_CACHE, task_run_name="preflight-{name}", **RETRIED)
async def preflight_service(
    name: str, service: HotLoadClient, store: Store, replica_count: int | None
) -> int | None:
    """Check that the service reads from this store, and return how many replicas to expect.

    `replica_count` is what the cycle declares, else the service's own description counts; None
    where neither says (protocol §5, §8).

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
    expected = replica_count or description.desired_replica_count
    if expected is None:
        logger.warning("how many replicas to expect is unknown: the list is believed complete")
    return expected
