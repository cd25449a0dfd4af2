"""Retain: remove from a store what is no longer needed. A dry run unless asked to delete.

    python -m flows.retain                       # what would go, with bytes; blocks `default`
    python -m flows.retain --keep 20 --delete    # and remove it

docs/retention.md says what stays and why.
"""

import argparse
import sys
from collections.abc import Sequence

from prefect import State, flow
from pydantic import ValidationError

from blocks import require_server
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from flows.command_line import run_command
from hotload.cli.retention_table import retention_lines
from hotload.clients.store import every_lease
from hotload.publish.retention import Retention
from hotload.spec import RetentionSpec
from tasks.retain import plan_retention, remove_unneeded, retained, show_retention


@flow(name="retain", flow_run_name="retain-{spec.store}")
async def retain_what_is_needed(spec: RetentionSpec) -> State[Retention]:
    """Keep in a store what is served, pinned, new, or needed by what is kept; remove the rest.

    Removing needs the publisher's leases of all services, and what goes is decided again while they
    are held, so no cycle publishes meanwhile. Safe to kill anywhere: started again, it finishes.

    Args:
        spec: which store, which services load from it, and how much stays.

    Raises:
        LeaseLostError: a cycle publishes; nothing was removed.
        ServiceUnavailableError, ServiceRefusedError: what a service serves is unknown; nothing was
            removed.
    """
    store = (await CheckpointStore.load(spec.store)).open()
    services = [(await HotLoadService.load(name)).open() for name in spec.services]
    retention = await plan_retention(spec, services, store)
    if spec.delete and retention.removes:
        async with every_lease(store, [one.access.service for one in services]) as leases:
            # Again, now that nobody publishes: what was looked at before may be needed by now.
            retention = await plan_retention(spec, services, store)
            await remove_unneeded(store, retention, leases)
    await show_retention(spec, retention)
    return retained(spec, retention)


def declared_retention(arguments: Sequence[str] | None) -> RetentionSpec:
    """Parse the command line; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.retain",
        description="Remove from a store what is no longer needed; by default only list it.",
        epilog="exit code: 0 done, 1 something is in doubt or failed and was kept, 2 wrong input",
    )
    parser.add_argument(
        "--service",
        action="append",
        dest="services",
        metavar="NAME",
        help="block of a service that loads from the store; name each of them (default)",
    )
    parser.add_argument("--store", metavar="NAME", help="block of the store (default)")
    parser.add_argument(
        "--keep",
        dest="keep_versions",
        metavar="N",
        help="newest versions of each run that stay, with what they need (20)",
    )
    parser.add_argument(
        "--keep-reports",
        metavar="N",
        help="newest ended cycles of each run whose reports and rollouts stay (all)",
    )
    parser.add_argument(
        "--grace-hours",
        metavar="HOURS",
        help="age at which an unfinished upload counts as given up (24)",
    )
    parser.add_argument(
        "--price",
        dest="price_per_gb_month",
        metavar="PRICE",
        help="of a gigabyte a month, in any currency: shows money",
    )
    parser.add_argument("--delete", action="store_true", help="remove it")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value}
    try:
        return RetentionSpec.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)
        parser.error("; ".join(f"{one['loc'][0]} {one['input']!r}: {one['msg']}" for one in found))


async def retain_declared(spec: RetentionSpec) -> Retention:
    """Retain as the command line says, once a Prefect server answers."""
    await require_server()
    retention = await retain_what_is_needed(spec)
    assert isinstance(retention, Retention)  # a flow's returned state hands on its data
    return retention


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what goes and what stays; exit codes as `run_command`, 1 also where something is in
    doubt."""
    spec = declared_retention(arguments)

    def show_retained(retention: Retention) -> int:
        for line in retention_lines(retention, spec.price_per_gb_month, is_done=spec.delete):
            print(line)
        return 1 if retention.obstacles else 0

    return run_command(retain_declared(spec), show_retained)


if __name__ == "__main__":
    sys.exit(main())
