"""Watch: a cycle for every checkpoint that a trainer puts below a directory or URL.

python -m flows.watch cycle.yaml                      # until Ctrl-C; the cycles run here
python -m flows.watch cycle.yaml --deployment checkpoint-to-rollout/served
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from prefect import flow, get_run_logger

from blocks import server_door
from blocks.checkpoint_store import CheckpointStore
from flows.command_line import run_command
from flows.cycle import checkpoint_to_rollout
from flows.cycle_file import checked, load_cycle_file
from hotload.clients.arrivals import (
    CycleOutcome,
    RunCycle,
    first_good,
    publish_due,
    run_by_deployment,
    watch,
)
from hotload.spec import CycleSpec, WatchSpec
from tasks.validate import place_of


@flow(name="watch", flow_run_name="watch-{spec.cycle.run_id}")
async def publish_new_versions(spec: WatchSpec) -> list[str]:
    """Look once, and run or trigger a cycle for every version that is due.

    Safe to run at any time and any number of times. A cycle that fails is logged, and the later
    versions follow.

    Returns:
        a line for each version: what became of it, or what it waits for.

    Raises:
        InvalidCheckpointError: the directory cannot be read.
        StoreError: the store refuses.
    """
    store = (await CheckpointStore.load(spec.cycle.store)).open()
    parent = await place_of(spec.cycle, spec.directory)
    # Looked at again by the schedule: where cycles run here, it is that which tries them again.
    run_cycle = partial(run_here, attempt=1)
    if spec.deployment is not None:
        run_cycle = partial(first_good, run_cycle=_triggering(spec.deployment))
    lines = [line async for line in publish_due(spec, store, parent, run_cycle)]
    for line in lines:
        get_run_logger().info(line)
    return lines


def _triggering(deployment: str) -> RunCycle:
    api_url, authorization = server_door()
    return partial(
        run_by_deployment, deployment=deployment, api_url=api_url, authorization=authorization
    )


async def run_here(cycle: CycleSpec, attempt: int) -> CycleOutcome:
    """Run a cycle in this process, any `attempt` alike; how it ended is no exception."""
    state = await checkpoint_to_rollout(cycle, return_state=True)
    is_good = state.is_completed()
    return CycleOutcome(str(state.name) if is_good else f"{state.name}: {state.message}", is_good)


async def watch_declared(cycle_file: Path, changes: dict[str, object], every: float) -> None:
    """Watch for the run of a cycle file, whose checkpoint and version are those of any cycle."""
    cycle = await load_cycle_file(cycle_file)
    spec = checked(WatchSpec, {"cycle": cycle, **changes}, "watch")
    print(f"watching {spec.directory} for run {cycle.run_id}", flush=True)
    store = (await CheckpointStore.load(spec.cycle.store)).open()
    run_cycle = run_here if spec.deployment is None else _triggering(spec.deployment)
    parent = await place_of(spec.cycle, spec.directory)
    await watch(spec, store, parent, run_cycle, partial(print, flush=True), every)


def seconds(text: str) -> float:
    """Parse seconds that are not none."""
    if not 0.01 <= (value := float(text)) <= 86_400:
        raise argparse.ArgumentTypeError("expected 0.01 to 86400 seconds")
    return value


def main() -> int:
    """Watch until Ctrl-C; exit codes as `run_command`."""
    fields = WatchSpec.model_fields
    parser = argparse.ArgumentParser(
        prog="python -m flows.watch",
        description="Run a cycle for every checkpoint that appears beside the one of a cycle file.",
        epilog="Started again, it goes on after the last version whose cycle has ended.",
    )
    parser.add_argument("cycle_file", type=Path, help="the run's cycle file, of any version")
    parser.add_argument("--parent", metavar="PLACE", help=fields["parent"].description)
    parser.add_argument(
        "--name", metavar="REGEX", help="of a version's directory (its last digits)"
    )
    parser.add_argument("--marker", metavar="FILE", help=fields["marker"].description)
    parser.add_argument("--still-seconds", metavar="S", help="without a write, if no marker (5)")
    parser.add_argument("--after-version", metavar="N", help=fields["after_version"].description)
    parser.add_argument(
        "--newest-only", action="store_true", help=fields["newest_only"].description
    )
    parser.add_argument(
        "--deployment", metavar="FLOW/NAME", help="runs the cycles, instead of here"
    )
    parser.add_argument("--every", type=seconds, default=5.0, metavar="S", help="between looks (5)")
    given = vars(parser.parse_args())
    cycle_file, every = given.pop("cycle_file"), given.pop("every")
    changes = {name: value for name, value in given.items() if value}
    return run_command(watch_declared(cycle_file, changes, every), lambda _: 0)


if __name__ == "__main__":
    sys.exit(main())
