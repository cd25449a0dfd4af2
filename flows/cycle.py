"""The cycle: one policy version from checkpoint to scored groups. The page to read first.

checkpoint → validate → plan → encode → upload → hint → signal → wait → roll out → score → report

Run it here with `python -m flows cycle.yaml`; deployments/README.md shows how a trainer triggers
it and how it is put on a schedule.
"""

from contextlib import AsyncExitStack
from pathlib import Path

from prefect import State, flow
from prefect.settings import get_current_settings

from blocks.checkpoint_store import CheckpointStore
from flows.publish import load_services, publish_policy
from flows.sampling import load_rollouts, roll_out_and_score
from hotload.clock import monotonic
from hotload.concurrently import both
from hotload.report.cycle_report import CycleReport
from hotload.sampling.reward.processes import keep_reward_processes
from hotload.spec import CycleSpec
from tasks.baseline import baseline_of
from tasks.conclude import completed, conclude_cycle, ended_before, find_earlier
from tasks.publication import OngoingPublication
from tasks.show import emit_failure, show_cycle, tell_once

tell_once()


@flow(
    name="checkpoint-to-rollout",
    flow_run_name="{spec.name}",
    persist_result=True,
    # Prefect's own default, but said: else every run asks the server for another one.
    result_storage=get_current_settings().results.local_storage_path,
    result_serializer="json",
    on_failure=[emit_failure],
    on_crashed=[emit_failure],
)
async def checkpoint_to_rollout(spec: CycleSpec) -> CycleReport | State[CycleReport]:
    """Carry one checkpoint to scored rollouts.

    Safe to kill anywhere and to start again: the replicas and the store say what is done. A cycle
    that has ended is answered with its report while the service serves its snapshot, or a later one
    of the run; a service that has lost it is served again, and nothing is sampled twice.

    One cycle publishes at a time. On-policy it samples before the next may publish; where the spec
    allows `max_head_offpolicy_versions`, the next may publish while this one samples.

    Args:
        spec: what to publish, where, and how to sample from it.
    """
    began = monotonic()
    services = await load_services(spec)
    store = (await CheckpointStore.load(spec.store)).open()
    clients = await load_rollouts(spec)
    workspace = services[spec.service].access.workspace(Path(spec.work_dir))
    baseline = await baseline_of(spec, workspace, store)
    earlier = await find_earlier(store, services.values(), spec)
    if earlier.answers(spec.again):
        return ended_before(earlier)
    ongoing = OngoingPublication.of(spec, services.values(), clients.values())
    # Filled with the publisher's leases by what publishes. The report is written while they are
    # held: until then, a cycle that is killed needs the replicas as it left them.
    async with AsyncExitStack() as right_to_publish, keep_reward_processes():
        publication, rollouts = await both(
            publish_policy(
                spec, services, baseline, earlier, ongoing, right_to_publish, clients.values()
            ),
            roll_out_and_score(spec, ongoing, earlier, clients, services, store),
        )
        report = await conclude_cycle(store, spec, publication, rollouts, baseline.trouble, began)
    await show_cycle(store, report)
    return completed(report, earlier)
