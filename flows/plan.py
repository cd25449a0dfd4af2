"""Plan: what a cycle would publish now, and what each way would cost. A dry run.

    python -m flows.plan cycle.yaml

docs/cycle.md says what the table holds and how the choice is made.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from flows.command_line import run_command
from flows.cycle_file import load_cycle_file
from flows.publish import asked_by, find_content, load_services
from flows.sampling import load_rollouts
from hotload.cli.cost_table import preview_lines
from hotload.identity import SnapshotKind
from hotload.publish.cost import PublicationPreview
from hotload.spec import CycleSpec
from tasks.baseline import baseline_of
from tasks.conclude import find_earlier
from tasks.plan import preview_plan
from tasks.preflight import preflight_rollouts, preflight_service
from tasks.validate import check_both, validate_rollouts


@flow(name="preview", flow_run_name="preview-{spec.name}")
async def preview_publication(spec: CycleSpec) -> dict[str, PublicationPreview]:
    """Look at replicas, store and checkpoint as a cycle would, and say what it would publish.

    Takes no lease, signals nothing, and writes neither to the store nor to the work directory, but
    for the answers of nodes, which pass through the store, and for digests of a baseline that turns
    out to be damaged, which are forgotten.

    Args:
        spec: of the cycle.

    Returns:
        a preview for each service, by its name.

    Raises:
        IdentityConflictError, InvalidIdentityError, InvalidCheckpointError, InvalidProblemsError,
        RewardError, RolloutFunctionError, ServiceRefusedError: what would end the cycle, too.
    """
    services = await load_services(spec)
    store = (await CheckpointStore.load(spec.store)).open()
    workspace = services[spec.service].access.workspace(Path(spec.work_dir))
    baseline = await baseline_of(spec, workspace, store)
    earlier = await find_earlier(store, services.values(), spec)
    if earlier.answers(spec.again):
        ended = PublicationPreview(None, (), earlier.served)
        return {service.access.service: ended for service in services.values()}
    content = await check_both(
        find_content(spec, services, baseline, earlier), validate_rollouts(spec, store)
    )
    is_adapter, clients = content.kind is SnapshotKind.LORA, (await load_rollouts(spec)).values()
    declared, previews = spec.readiness.replica_count, {}
    for service in services.values():
        name = service.access.service
        if earlier.found(name) and not spec.again:
            previews[name] = PublicationPreview(None, (), earlier.statuses[name].describe())
            continue
        expected = await preflight_service(
            spec.name, service, store, declared, content.adapted_model
        )
        for client in asked_by(clients, service, services):
            await preflight_rollouts(
                spec.name, service, client, spec.readiness, spec.sampling, is_adapter=is_adapter
            )
        before = earlier.served_before(name)
        previews[name] = await preview_plan(
            spec, service, baseline, content, expected, served_before=before
        )
    return previews


async def preview_declared(cycle_file: Path) -> dict[str, PublicationPreview]:
    """Preview the cycle of a cycle file."""
    return await preview_publication(await load_cycle_file(cycle_file))


def show_previews(previews: Mapping[str, PublicationPreview]) -> int:
    """Print the table of every service's preview, under its name where there are several."""
    for name, preview in previews.items():
        if len(previews) > 1:
            print(f"{name}:")
        for line in preview_lines(preview):
            print(line)
    return 0


def main() -> int:
    """Print what a cycle would publish; exit codes as `run_command`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.plan",
        description="Say what a cycle would publish now, full or delta, why, and at what cost.",
        epilog="A dry run: the checkpoint is validated, nothing is uploaded, leased or signalled.",
    )
    parser.add_argument("cycle_file", type=Path, help="YAML with `cycle:` and `blocks:`")
    return run_command(preview_declared(parser.parse_args().cycle_file), show_previews)


if __name__ == "__main__":
    sys.exit(main())
