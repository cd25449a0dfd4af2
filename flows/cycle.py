"""The cycle: one policy version from checkpoint to scored groups. The page to read first.

checkpoint → validate → plan → encode → upload → hint → signal → wait → roll out → score → report

Run it locally with `python -m flows.cycle cycle.yaml`; trigger and schedule it as README.md shows.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from time import monotonic

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from flows.publish import full_snapshot, publish_snapshot
from flows.rollouts import roll_out_and_score
from hotload.errors import HotLoadError, NeedsFullSnapshotError
from hotload.report import CycleReport
from hotload.spec import CycleSpec
from tasks.baseline import keep_baseline
from tasks.conclude import conclude_cycle, find_report, named
from tasks.cycle_file import load_cycle_file
from tasks.lease import publisher_lease
from tasks.overlap import both
from tasks.plan import plan_snapshot
from tasks.preflight import preflight_service
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
    service = await HotLoadService.load(spec.service)
    store = await CheckpointStore.load(spec.store)
    content = await validate_checkpoint(spec, service)
    await validate_rollouts(spec)
    if report := await find_report(store, spec, content):
        return named("AlreadyDone", "this cycle has ended before", report)

    async with publisher_lease(store, spec.name) as lease:
        expected = await preflight_service(spec, service, store)
        await wait_for_replicas(service, spec.readiness)
        plan = await plan_snapshot(spec, service, store, content)
        fallback = None
        try:
            published = await publish_snapshot(spec, content, plan, lease.token, expected)
        except NeedsFullSnapshotError as reason:
            fallback = str(reason)
            published = await full_snapshot(spec, content, fallback, lease.token, expected)

        rollouts, _ = await both(
            roll_out_and_score(spec, published.identity, published.replica_count),
            keep_baseline(spec, service, store, published.identity),
        )
        due = published.policy_version == spec.policy_version
        report = CycleReport(
            name=spec.name,
            policy_version=spec.policy_version,
            content_sha256=content.sha256,
            outcome="fell back" if fallback else "published" if due else "not due",
            snapshot=published,
            fallback_reason=fallback,
            rollouts=rollouts,
            seconds=monotonic() - started,
        )
        await conclude_cycle(store, report)
    if fallback:
        return named("CompletedByFallback", fallback, report)
    return report


async def run_cycle_file(path: Path) -> CycleReport:
    """The report of the cycle that a file declares; see `tasks/cycle_file.py` for its form."""
    return await checkpoint_to_rollout(await load_cycle_file(path))


def main() -> int:
    """Run one cycle from a cycle file; 0 done, 1 failed, 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.cycle",
        description="Carry one checkpoint to scored rollouts, as a cycle file declares.",
        epilog="A killed cycle goes on where it was when started again with the same file.",
    )
    parser.add_argument("cycle_file", type=Path, help="YAML with `cycle:` and `blocks:`")
    path = parser.parse_args().cycle_file
    try:
        report = asyncio.run(run_cycle_file(path))
    except (OSError, ValueError, HotLoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, HotLoadError) else 2
    except KeyboardInterrupt:
        print("stopped; start it again to go on", file=sys.stderr)
        return 130
    print("\n".join(f"{row['what']:>24}  {row['value']}" for row in report.rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
