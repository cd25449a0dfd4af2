"""Warm up: the first requests after a swap can be slow or fail; small ones go first (protocol
§14)."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.inference.client import InferenceClient
from hotload.options import ReadinessPolicy


@task(cache_policy=NO_CACHE, task_run_name="warm-up")
async def warm_up(client: InferenceClient, readiness: ReadinessPolicy) -> bool:
    """Send a small request, and tell whether it was answered in time. Best effort: nothing depends
    on it.
    """
    if not readiness.warmup_after_hotload:
        return True
    is_warm = await client.warm_up(retries=readiness.warmup_max_retries)
    if not is_warm:
        get_run_logger().warning("no answer to %d warm-up requests", readiness.warmup_max_retries)
    return is_warm
