"""The cycle: one policy version from checkpoint to scored groups. The page to read first.

checkpoint → validate → plan → encode → upload → hint → signal → wait → roll out → score → report

Run it here with `python -m flows cycle.yaml`; deployments/README.md shows how a trainer triggers
it and how it is put on a schedule.
"""

from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic

from prefect import State, flow
from prefect.settings import get_current_settings

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from flows.publish import publish_policy
from flows.sampling import roll_out_and_score
from hotload.publish.workspace import Workspace
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tasks.baseline import Baseline
from tasks.conclude import already_done, completed, conclude_cycle, find_report
from tasks.show import show_cycle


@flow(
    name="checkpoint-to-rollout",
    flow_run_name="{spec.name}",
    persist_result=True,
    # Prefect's own default, but said: else every run asks the server for another one.
    result_storage=get_current_settings().results.local_storage_path,
    result_serializer="json",
)
async def checkpoint_to_rollout(spec: CycleSpec) -> CycleReport | State[CycleReport]:
    """Carry one checkpoint to scored rollouts.

    Safe to kill anywhere and to start again: the replicas and the store say what is done. A cycle
    that has ended is answered with its report.

    One cycle publishes at a time. On-policy it samples before the next may publish; where the spec
    allows `max_head_offpolicy_versions`, the next may publish while this one samples.

    Args:
        spec: what to publish, where, and how to sample from it.
    """
    began = monotonic()
    service = (await HotLoadService.load(spec.service)).open()
    store = (await CheckpointStore.load(spec.store)).open()
    client = (await RolloutClient.load(spec.rollouts)).open()
    workspace = Workspace(Path(spec.work_dir), service.account_id, service.deployment_id)
    baseline = Baseline(workspace, store, Path(spec.checkpoint))
    if report := await find_report(store, spec):
        return already_done(report)
    async with AsyncExitStack() as right_to_publish:
        publication = await publish_policy(spec, service, baseline, right_to_publish)
        rollouts = await roll_out_and_score(spec, publication, client, service, baseline)
        report = await conclude_cycle(store, spec, publication, rollouts, began)
    await show_cycle(store, report)
    return completed(report)
