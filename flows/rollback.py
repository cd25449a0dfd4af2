"""Rollback: serve a stored snapshot again. `python -m flows.rollback cycle.yaml VERSION`.

The cheapest way that the replicas allow: a delta back to it from what they serve, or, where they
serve nothing of ours, the stored full snapshot. The trainer's next version follows as after any
other.
"""

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from flows.command_line import run_command
from flows.cycle_file import load_cycle_file
from flows.publish import hold_services, load_services, publish_to_all
from flows.sampling import load_rollouts
from hotload.directory.files import remove_tree
from hotload.identity import cycle_name
from hotload.publish.publication import ServedSnapshot
from hotload.spec import CycleSpec
from tasks.baseline import baseline_of, keep_baseline, restore_snapshot
from tasks.conclude import find_earlier
from tasks.publication import OngoingPublication, find_snapshot, record_publication
from tasks.validate import validate_checkpoint


@flow(name="roll-back", flow_run_name="{spec.run_id}-to-{name}")
async def roll_back(spec: CycleSpec, name: str) -> ServedSnapshot:
    """Publish a stored snapshot again, whatever the services serve now.

    Args:
        spec: any cycle of the run: which services, which store, which work directory.
        name: a version of the run, as its newest line has it, or an identity.

    Raises:
        InvalidIdentityError: the store has no such snapshot.
        BaselineLostError: the store does not have all of its bytes.
        LeaseLostError: a cycle publishes to one of the services.
        FullSnapshotFailedError, SnapshotRejectedError, ServicesFailedError: as `publish_to_all`.
    """
    services = await load_services(spec)
    store = (await CheckpointStore.load(spec.store)).open()
    clients = await load_rollouts(spec)
    target = await find_snapshot(store, spec.run_id, name)
    cycle = cycle_name(target.run_id, target.policy_version, target.line)
    # In a workspace of its own: the baseline of what is served is needed beside it.
    access = services[spec.service].access
    restored = access.workspace(Path(spec.work_dir) / "restored")
    async with AsyncExitStack() as right_to_publish:
        leases = await hold_services(right_to_publish, services, store, cycle)
        try:
            checkpoint = await restore_snapshot(await baseline_of(spec, restored, store), target)
            back = spec.going_back(
                str(checkpoint), target.run_id, target.policy_version, target.line
            )
            workspace = access.workspace(Path(spec.work_dir))
            baseline = await baseline_of(back, workspace, store)
            earlier = await find_earlier(store, services.values(), back, may_go_back=True)
            publication = await publish_to_all(
                back,
                services,
                baseline,
                await validate_checkpoint(back, services.values(), baseline.digests),
                leases,
                earlier,
                OngoingPublication.of(back, services.values(), clients.values()),
                may_go_back=True,
            )
            if earlier.publication:  # the trainer's own words, which its cycle is held to
                content = earlier.publication.content
                publication = publication.model_copy(update={"content": content})
            await keep_baseline(baseline, *publication.identities)
            await record_publication(store, cycle, publication)
        finally:
            await asyncio.to_thread(remove_tree, restored.root)
    return publication.snapshot


async def roll_back_declared(cycle_file: Path, name: str) -> ServedSnapshot:
    """Roll back to `name` with the blocks and settings of a cycle file."""
    return await roll_back(await load_cycle_file(cycle_file), name)


def show_served(snapshot: ServedSnapshot) -> int:
    """Print what is served now."""
    print(f"{snapshot.identity} is served by {snapshot.replica_count} replicas: {snapshot.reason}")
    return 0


def main() -> int:
    """Roll a service back; exit codes as `run_command`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.rollback",
        description="Serve a stored snapshot again, by the cheapest way the replicas allow.",
        epilog="Nothing is sampled. Stop the trainer's cycles first, or they publish on top of it.",
    )
    parser.add_argument("cycle_file", type=Path, help="the run's cycle file, of any version")
    parser.add_argument(
        "name",
        metavar="VERSION",
        help="a version of the run, as its newest line has it, or an identity",
    )
    asked = parser.parse_args()
    return run_command(roll_back_declared(asked.cycle_file, asked.name), show_served)


if __name__ == "__main__":
    sys.exit(main())
