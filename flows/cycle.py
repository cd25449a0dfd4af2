"""The cycle: one policy version from checkpoint to scored groups. The page to read first.

checkpoint → validate → plan → encode → upload → hint → signal → wait → roll out → score → report

One cycle publishes at a time. On-policy it samples before the next may publish; where the spec
allows `max_head_offpolicy_versions`, the next may publish while this one samples.

Run it locally with `python -m flows.cycle cycle.yaml`; trigger and schedule it as README.md shows.
"""

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic

from prefect import flow
from prefect.blocks.core import Block
from prefect.exceptions import TerminationSignal

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from flows.cycle_file import parse_cycle_file, save_inline_blocks
from flows.publish import full_snapshot, publish_snapshot
from flows.rollouts import roll_out_and_score
from hotload.clients.store import publisher_lease
from hotload.errors import HotLoadError, NeedsFullSnapshotError
from hotload.publish.publication import Publication
from hotload.publish.workspace import Workspace
from hotload.report.cycle_report import CycleReport
from hotload.sampling.concurrently import both
from hotload.spec import CycleSpec
from tasks.baseline import Baseline, keep_baseline
from tasks.conclude import conclude_cycle, find_report, named
from tasks.plan import plan_snapshot
from tasks.preflight import preflight_service
from tasks.publication import find_publication, record_publication
from tasks.validate import validate_checkpoint, validate_rollouts
from tasks.wait import wait_for_replicas


@flow(
    name="checkpoint-to-rollout",
    flow_run_name="{spec.name}",
    persist_result=True,
    result_serializer="json",
)
async def checkpoint_to_rollout(spec: CycleSpec) -> CycleReport:
    """Carry one checkpoint to scored rollouts.

    Safe to kill anywhere and to start again: the replicas and the store say what is done. A cycle
    that has ended is answered with its report.

    Args:
        spec: what to publish, where, and how to sample from it.
    """
    started = monotonic()
    service = (await HotLoadService.load(spec.service)).open()
    store = (await CheckpointStore.load(spec.store)).open()
    workspace = Workspace(Path(spec.work_dir), service.account_id, service.deployment_id)
    baseline = Baseline(workspace, store, Path(spec.checkpoint))
    if report := await find_report(store, spec):
        return named("AlreadyDone", "this cycle has ended before", report)
    may_overlap = spec.sampling.max_head_offpolicy_versions > 0
    publication = None
    if may_overlap:
        publication = await find_publication(store, spec.name, baseline.checkpoint)

    async with AsyncExitStack() as held:
        if publication is None:
            content = await validate_checkpoint(spec, service, baseline.digests)
            await validate_rollouts(spec)
            lease = await held.enter_async_context(publisher_lease(store, spec.name))
            declared = spec.readiness.replica_count
            expected = await preflight_service(spec.name, service, store, declared)
            await wait_for_replicas(spec.name, service, spec.readiness, expected)
            plan = await plan_snapshot(spec, service, baseline, content)
            fallback = None
            try:
                published = await publish_snapshot(spec, content, plan, lease, expected)
            except NeedsFullSnapshotError as reason:
                fallback = str(reason)
                published = await full_snapshot(spec, content, fallback, lease, expected)
            publication = Publication(content=content, snapshot=published, fallback=fallback)
            if may_overlap:
                await keep_baseline(baseline, published.identity)
                await record_publication(store, spec.name, publication)
                await held.aclose()  # the lease is given back: the next cycle may publish

        snapshot = publication.snapshot
        sampling = roll_out_and_score(spec, snapshot.identity, snapshot.replica_count)
        if may_overlap:
            rollouts = await sampling
        else:
            rollouts, _ = await both(sampling, keep_baseline(baseline, snapshot.identity))
        report = CycleReport.of(spec, publication, rollouts, monotonic() - started)
        await conclude_cycle(store, spec, report)
    if report.fallback_reason:
        return named("CompletedByFallback", report.fallback_reason, report)
    return report


async def run_declared(spec: CycleSpec, blocks: dict[str, Block]) -> CycleReport:
    """The report of a cycle from a cycle file, its inline blocks saved beforehand."""
    return await checkpoint_to_rollout(await save_inline_blocks(spec, blocks))


def main() -> int:
    """Run one cycle from a cycle file.

    0 done, 1 failed, 2 wrong input and nothing was begun, 130 and 143 stopped by Ctrl-C or SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flows.cycle",
        description="Carry one checkpoint to scored rollouts, as a cycle file declares.",
        epilog="A killed cycle goes on where it was when started again with the same file.",
    )
    parser.add_argument("cycle_file", type=Path, help="YAML with `cycle:` and `blocks:`")
    try:
        spec, blocks = parse_cycle_file(parser.parse_args().cycle_file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        report = asyncio.run(run_declared(spec, blocks))
    except (OSError, HotLoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, TerminationSignal) as signal:
        print("stopped; start it again to go on", file=sys.stderr)
        return 143 if isinstance(signal, TerminationSignal) else 130
    print("\n".join(f"{row['what']:>24}  {row['value']}" for row in report.rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
