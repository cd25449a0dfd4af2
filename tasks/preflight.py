"""Preflight: is this the service the user means, and how many replicas are to be expected."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.checkpoint.rules import check_adapted_model, refuse_errors
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.errors import InvalidIdentityError, ServiceRefusedError
from hotload.identity import SnapshotKind
from hotload.publish.readiness import Verdict, assess
from tasks import RETRIED


@task(cache_policy=NO_CACHE, task_run_name="preflight-{name}{service.label}", **RETRIED)
async def preflight_service(
    name: str,
    service: HotLoadClient,
    store: Store,
    replica_count: int | None,
    adapted_model: str | None = None,
) -> int | None:
    """Check that the service reads from this store, and return how many replicas to expect.

    `replica_count` is what the cycle declares, else the service's own description counts; None
    where neither says (protocol §5, §8).

    Args:
        adapted_model: what an adapter was trained on; None for full weights.

    Raises:
        ServiceRefusedError: the service cannot be hot-loaded from this store; says why.
        InvalidCheckpointError: the adapter is for another model than the service serves.
    """
    description = await service.describe()
    logger = get_run_logger()
    for line in service.preflight(description, store.url):
        if not line.ok and line.stops:
            advice = f"For {service.access.source}: {line.advice}"
            raise ServiceRefusedError("preflight", None, f"{line.name}: {line.found}", advice)
        if not line.ok:
            logger.warning("%s: %s. %s", line.name, line.found, line.advice)
    if adapted_model and description is not None and description.base_model:
        for warning in refuse_errors(check_adapted_model(adapted_model, description.base_model)):
            logger.warning("%s", warning)
    described = None if description is None else description.desired_replica_count
    expected = replica_count or described
    if expected is None:
        logger.warning("how many replicas to expect is unknown: the list is believed complete")
    return expected


@task(cache_policy=NO_CACHE, task_run_name="served-{identity}{service.label}", **RETRIED)
async def require_served(
    service: HotLoadClient, identity: str, expected_replica_count: int | None
) -> None:
    """Return if every expected replica serves `identity`.

    Raises:
        InvalidIdentityError: not so; says what is served.
    """
    status = await service.observe()
    seen = assess(
        status, identity, SnapshotKind.FULL, expected_replica_count=expected_replica_count
    )
    if seen.verdict is not Verdict.READY:
        reason = f"not every replica serves it, but {status.describe()}: name what all serve"
        raise InvalidIdentityError(identity, reason)
