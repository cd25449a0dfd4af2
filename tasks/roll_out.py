"""Roll out: sample a chunk of problems as one task."""

from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.dataset.rollout_plan import RolloutPart
from hotload.sampling.rollout import Rollout
from tasks import RETRIED


# A retry writes what was sampled; only the sampler's own budget repeats a request.
@task(cache_policy=NO_CACHE, task_run_name="roll-out-{number}", **RETRIED)
async def roll_out_chunk(rollout: Rollout, number: int) -> Sequence[RolloutPart]:
    """Put one part of the rollout into the store; return the counts of what is in its files.

    Raises:
        ServiceRefusedError: key, names or billing are wrong: no sample can succeed.
        StoreError: the store refuses.
        RewardError: the reward's service refuses the key; as with the next, what was scored is in
            the store.
        RolloutsFailedError: not one sample of all parts got an answer and a reward, or a service
            failed row after row; what was scored is in the store, the rest is not recorded.
    """
    parts = await rollout.carry(number)
    get_run_logger().info(
        "%d samples, %d failed, %d bytes",
        sum(part.sample_count for part in parts),
        sum(sum(part.failed_samples.values()) for part in parts),
        sum(part.size_bytes for part in parts),
    )
    return parts
