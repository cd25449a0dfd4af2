"""A worker's bad days: a run is cancelled through the API, or the worker dies with its cycle."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.flows.fleet import Fleet, running_fleet, save_blocks
from tests.flows.test_ways_in import deployed, ended, post, python
from tests.servers import LoopbackServer
from tests.waiting import PATIENCE_SECONDS, until

__all__ = ["deployed"]  # a fixture

AUTOMATION = "hotload-end-a-zombie"
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def worker(deployed: str, tmp_path: Path) -> Iterator[LoopbackServer]:
    """A worker of the process pool, which a test may kill."""

    def command(port: int) -> list[str]:
        return [
            *("env", f"PREFECT_WORKER_WEBSERVER_PORT={port}", "PREFECT_WORKER_QUERY_SECONDS=0.5"),
            *(sys.executable, "-m", "prefect", "worker", "start", "--with-healthcheck"),
            *("--pool", "hotload-process", "--name", uuid.uuid4().hex, "--limit", "1"),
        ]

    running = LoopbackServer("worker", tmp_path, command)
    running.start()
    running.wait()
    yield running
    running.stop()


@pytest.fixture
async def fleet(prefect_api: str, tmp_path: Path, checkpoints: list[Path]) -> AsyncIterator[Fleet]:
    """A fleet that loads only when its clock is moved, and its blocks."""
    name = f"fleet-{uuid.uuid4().hex[:12]}"
    with running_fleet(
        name, tmp_path, checkpoints, clock="ticks", seconds_per_state=60.0
    ) as running:
        await save_blocks(running)
        yield running


@pytest.fixture
async def http(prefect_api: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=prefect_api, timeout=PATIENCE_SECONDS) as client:
        yield client


async def triggered(http: httpx.AsyncClient, deployed: str, fleet: Fleet) -> str:
    """The id of a new run of the fleet's cycle."""
    body = {"parameters": {"spec": fleet.declared(1, run_id=fleet.name)}}
    return str((await post(http, f"{deployed}/create_flow_run", body)).json()["id"])


def create_impatient_automation(file: Path) -> None:
    """Create the one of deployments/ that ends zombies, with the least patience there is."""
    document = yaml.safe_load(Path("deployments/automations.yaml").read_text())
    (zombie,) = (one for one in document["automations"] if one["name"] == AUTOMATION)
    zombie["trigger"]["within"] = 10
    file.write_text(yaml.safe_dump({"automations": [zombie]}))
    made = python("prefect", "automation", "create", "--from-file", str(file))
    assert made.returncode == 0, made.stdout + made.stderr


async def waits_for_its_replicas(fleet: Fleet) -> None:
    """Return once the cycle has signalled."""

    async def look() -> Any:
        return fleet.log()["signals"]

    await until(look)


async def test_a_run_that_is_cancelled_makes_room_and_the_next_goes_on(
    fleet: Fleet, worker: LoopbackServer, deployed: str, http: httpx.AsyncClient
) -> None:
    run_id = await triggered(http, deployed, fleet)
    await waits_for_its_replicas(fleet)
    cancel = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    await post(http, f"/flow_runs/{run_id}/set_state", cancel)
    done = await ended(http, run_id)
    assert done["state"]["type"] == "CANCELLED"
    again = await triggered(http, deployed, fleet)
    await asyncio.to_thread(fleet.tick, 600)
    done = await ended(http, again)
    assert done["state"]["name"] == "Completed"
    assert len(fleet.log()["signals"]) == 1


async def test_a_run_whose_worker_died_with_it_is_ended_by_the_automation(
    fleet: Fleet,
    worker: LoopbackServer,
    deployed: str,
    http: httpx.AsyncClient,
    tmp_path: Path,
) -> None:
    await asyncio.to_thread(create_impatient_automation, tmp_path / "automations.yaml")
    run_id = await triggered(http, deployed, fleet)
    await waits_for_its_replicas(fleet)
    assert worker.pid is not None
    for process in psutil.Process(worker.pid).children(recursive=True):
        process.kill()
    worker.stop()
    done = await ended(http, run_id)
    assert done["state"]["type"] == "CRASHED"
    assert "start it again" in done["state"]["message"]

    worker.start()
    worker.wait()
    again = await triggered(http, deployed, fleet)
    await asyncio.to_thread(fleet.tick, 600)
    done = await ended(http, again)
    assert done["state"]["name"] == "Completed"
    assert len(fleet.log()["signals"]) == 1
