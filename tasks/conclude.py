"""Conclude: the cycle's report, into the store and before a person's eyes."""

import asyncio
import re
from pathlib import Path
from typing import cast

from prefect import task
from prefect.artifacts import acreate_link_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from blocks.checkpoint_store import CheckpointStore
from hotload.errors import IdentityConflictError
from hotload.local import read_checkpoint
from hotload.report import CycleReport
from hotload.spec import CycleSpec
from tasks.records import read_report, write_report
from tasks.retrying import RETRIED
from tasks.validate import read_content


@task(cache_policy=NO_CACHE, task_run_name="report-{spec.name}", **RETRIED)
async def find_report(store: CheckpointStore, spec: CycleSpec) -> CycleReport | None:
    """The report of this very cycle, if it has ended before.

    The checkpoint is compared with it while there is one; a trainer may have removed it since.

    Raises:
        IdentityConflictError: it ended with other content under the same run and version.
    """
    report = await read_report(store, spec.name)
    if report is None or not await asyncio.to_thread(Path(spec.checkpoint).exists):
        return report
    checkpoint = await asyncio.to_thread(read_checkpoint, Path(spec.checkpoint))
    found = (await read_content(spec, checkpoint)).sha256
    if report.content_sha256 != found:
        digests = f"{report.content_sha256[:12]}…, now {found[:12]}…"
        reason = f"the cycle has ended with other content (sha256 {digests})"
        raise IdentityConflictError(spec.name, reason)
    return report


@task(cache_policy=NO_CACHE, task_run_name="conclude-{report.name}", **RETRIED)
async def conclude_cycle(store: CheckpointStore, report: CycleReport) -> None:
    """Record in the store that the cycle has ended, then show the report as artifacts."""
    await write_report(store, report)
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


def named(name: str, message: str, report: CycleReport) -> CycleReport:
    """What a flow returns to end under a name of its own; its caller gets the report."""
    # Prefect takes a returned state as the flow run's own and hands its data to the caller.
    return cast(CycleReport, Completed(name=name, message=message, data=report))
