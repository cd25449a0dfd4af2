"""Conclude: the cycle's report, into the store and before a person's eyes."""

import re
from typing import cast

from prefect import task
from prefect.artifacts import acreate_link_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from blocks.checkpoint_store import CheckpointStore
from hotload.errors import IdentityConflictError
from hotload.report import CycleReport
from hotload.snapshot import CheckpointContent
from hotload.spec import CycleSpec
from tasks.records import read_report, write_report
from tasks.retrying import RETRIED


async def find_report(
    store: CheckpointStore, spec: CycleSpec, content: CheckpointContent
) -> CycleReport | None:
    """The report of this very cycle, if it has ended before.

    Raises:
        IdentityConflictError: it ended with other content under the same run and version.
    """
    report = await read_report(store, spec.name)
    if report and report.content_sha256 != content.sha256:
        digests = f"{report.content_sha256[:12]}…, now {content.sha256[:12]}…"
        reason = f"the cycle has ended with other content (sha256 {digests})"
        raise IdentityConflictError(spec.name, reason)
    return report


@task(cache_policy=NO_CACHE, task_run_name="conclude-{report.name}", **RETRIED)
async def conclude_cycle(store: CheckpointStore, report: CycleReport) -> None:
    """Show the report as artifacts, then record in the store that the cycle has ended."""
    key = re.sub(r"[^a-z0-9]+", "-", f"cycle-{report.name}".lower())
    snapshot, rollouts = report.snapshot, report.rollouts
    await acreate_table_artifact(
        report.rows(), key=key, description=f"**{snapshot.kind.value}** – {snapshot.reason}"
    )
    await acreate_link_artifact(
        rollouts.parts_uri,
        key=f"{key}-data",
        link_text=rollouts.parts_uri,
        description=f"{rollouts.group_count} scored groups of `{snapshot.identity}`, as Parquet",
    )
    await write_report(store, report)


def named(name: str, message: str, report: CycleReport) -> CycleReport:
    """What a flow returns to end under a name of its own; its caller gets the report."""
    # Prefect takes a returned state as the flow run's own and hands its data to the caller.
    return cast(CycleReport, Completed(name=name, message=message, data=report))
