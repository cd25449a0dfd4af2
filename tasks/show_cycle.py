"""Show a cycle in Prefect: its figures as an artifact, its end as an event, and what slows it down.

All of it only informs: whatever fails here is logged.
"""

import asyncio
import re
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.events import emit_event

from hotload.clients.store import Store
from hotload.clients.store.records import REPORTS, read_report
from hotload.errors import StoreError
from hotload.identity import cycle_name
from hotload.report.cycle_report import CycleReport
from hotload.report.markdown import render_markdown
from tasks.conclude import page_path
from tasks.progress import best_effort
from tasks.publication import run_resource

VERSIONS_SHOWN = 20
# Settings of Prefect's server: below this, it writes events in many small transactions.
BATCH_SIZE = 100
BATCH_SETTINGS = [
    (service, setting)
    for service in ("task_run_recorder", "event_persister")
    for setting in ("batch_size", "read_batch_size")
]


@task(cache_policy=NO_CACHE, task_run_name="show-{report.name}")
async def show_cycle(store: Store, report: CycleReport) -> None:
    """Show an ended cycle: the next version of the run's artifact, and `hotload.cycle.ended`."""
    emit_event(
        "hotload.cycle.ended",
        resource=run_resource(report.run_id),
        payload={
            "policy_version": report.policy_version,
            "outcome": report.outcome,
            "identity": report.snapshot.identity,
            "group_count": report.rollouts.group_count,
            "mean_reward": report.rollouts.mean_reward,
            "parts_uri": report.rollouts.parts_uri,
            "seconds": report.seconds,
        },
    )
    earlier = await _read_earlier(store, report)
    with best_effort():
        await acreate_markdown_artifact(
            render_markdown(report, earlier, f"{store.url}/{page_path(report.name)}"),
            key=re.sub(r"[^a-z0-9]+", "-", f"hotload-{report.run_id}".lower()).strip("-"),
            description=f"Training run {report.run_id}: its versions, and the last cycle's figures",
        )
    with best_effort():
        await _warn_of_a_slow_server()


async def _read_earlier(store: Store, report: CycleReport) -> list[CycleReport]:
    """The reports of the versions before, oldest first; none where one cannot be read."""
    of_this_run = re.compile(re.escape(report.run_id) + r"-(\d{6,9})\.json")
    try:
        listed = (of_this_run.fullmatch(name) for name in await store.names(REPORTS))
        versions = sorted(int(name[1]) for name in listed if name)
        before = [version for version in versions if version < report.policy_version]
        names = [cycle_name(report.run_id, version) for version in before[-VERSIONS_SHOWN:]]
        found = await asyncio.gather(*(read_report(store, name) for name in names))
    except StoreError as error:
        get_run_logger().warning("the versions before are not shown: %s", error)
        return []
    return [one for one in found if one is not None]


async def _warn_of_a_slow_server() -> None:
    """Log the server's settings that make every cycle seconds longer, if it has them."""
    async with get_client() as client:
        answer = await client.request("GET", "/admin/settings")
    services: dict[str, Any] = answer.json()["server"]["services"]
    small = {
        f"PREFECT_SERVER_SERVICES_{service}_{setting}".upper(): services[service][setting]
        for service, setting in BATCH_SETTINGS
        if services[service][setting] < BATCH_SIZE
    }
    if small:
        get_run_logger().warning(
            "the Prefect server writes events one by one, which costs a cycle seconds: set there, "
            "as deployments/README.md says under SQLite, %s",
            ", ".join(f"{name}=500 (now {value})" for name, value in small.items()),
        )
