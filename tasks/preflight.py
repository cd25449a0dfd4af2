"""Preflight: is this the service the user means, how many replicas are to be expected, and are
samples answered."""

import asyncio

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.checkpoint.rules import check_adapted_model, refuse_errors
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.errors import InvalidIdentityError, ServiceRefusedError, ServiceUnavailableError
from hotload.identity import SnapshotKind
from hotload.options import ReadinessPolicy, Sampling
from hotload.publish.preflight import is_answer_due
from hotload.publish.readiness import Verdict, assess
from tasks import RETRIED

UNROUTED_REQUESTS = 12


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


@task(cache_policy=NO_CACHE, task_run_name="rollouts-{name}{service.label}", **RETRIED)
async def preflight_rollouts(
    name: str,
    service: HotLoadClient,
    client: InferenceClient,
    readiness: ReadinessPolicy,
    sampling: Sampling,
    *,
    is_adapter: bool,
) -> None:
    """Ask for one token before anything is published, and return unless no sample could come to an
    answer afterwards either. Servers that are not the vendor's are asked for what a trainer needs.

    404 is also what a swap of weights says, so it counts once it was the answer to 12 requests,
    each while replicas were ready: a minute of the default poll interval. Where it may be in order,
    and where there is no answer, a warning says so.

    Raises:
        ServiceRefusedError: the key, its account or its rights are refused, all was 404, or the
            server's answers cannot be trained on.
    """
    is_same_place = _asked(client.access) == _asked(service.access)
    for number in range(UNROUTED_REQUESTS):
        if number:
            await asyncio.sleep(readiness.poll_interval_seconds)
        try:
            await client.ask_first(sampling)
        except (ServiceUnavailableError, ServiceRefusedError) as error:
            trouble = error
        else:
            return
        if trouble.status_code == 404 and client.is_vendors:
            status = await service.observe()
            if is_answer_due(status, is_adapter=is_adapter, is_asked_as_status_was=is_same_place):
                continue
        elif isinstance(trouble, ServiceRefusedError) and trouble.status_code != 412:
            raise trouble
        get_run_logger().warning("samples may not be answered: %s", trouble)
        return
    replicas = "; ".join(status.by_replica)
    reason = f"{trouble.detail}, to {UNROUTED_REQUESTS} requests, and yet {replicas}"
    raise ServiceRefusedError(trouble.operation, 404, reason, trouble.advice)


def _asked(access: Access) -> tuple[str, str, str]:
    return access.origin("rollouts"), access.model(), access.deployment()


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
