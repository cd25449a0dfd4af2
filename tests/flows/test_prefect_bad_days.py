"""Prefect on its bad days: its server goes away in mid-cycle, comes back or not, is busy.

Each test is driven by what happens: the replicas load only when the emulator's clock is moved.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.blocks.proxy import proxying
from tests.flows.fleet import API_KEY, NAMES, Fleet, running_fleet
from tests.flows.killed_cycle import CycleProcess
from tests.servers import LoopbackServer
from tests.signals import signals_are_heard
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = [pytest.mark.timeout(600), pytest.mark.server, pytest.mark.slow]
_started: list[CycleProcess] = []
RETRYING_SECONDS = 240.0
"""Prefect's client asks again for about a minute, and this machine may be busy."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackServer]:
    """A Prefect server with a database of its own, which tests kill and start again."""
    home = tmp_path_factory.mktemp("prefect")

    def command(port: int) -> list[str]:
        return [
            *("env", f"PREFECT_HOME={home}", sys.executable, "-m", "prefect", "server", "start"),
            *("--no-ui", "--host", "127.0.0.1", "--port", str(port)),
        ]

    running = LoopbackServer("prefect", home, command)
    running.start()
    running.wait()
    yield running
    running.stop()


@pytest.fixture
def fleet(tmp_path: Path, checkpoints: list[Path]) -> Iterator[Fleet]:
    """A fleet that loads only when its clock is moved."""
    name = f"days-{uuid.uuid4().hex[:8]}"
    with running_fleet(
        name, tmp_path, checkpoints, clock="ticks", seconds_per_state=60.0
    ) as running:
        yield running
    while _started:
        _started.pop().stop()


def cycle_of(fleet: Fleet, api: str, **environment: str) -> CycleProcess:
    """The fleet's cycle in a process of its own, with blocks of its own."""
    account = {"base_url": fleet.url, "api_key": API_KEY, **NAMES}
    blocks = {"account": account, "store": {"url": fleet.bucket.as_uri()}}
    spec = fleet.spec(1, run_id=fleet.name)
    cycle = CycleProcess(fleet, spec, blocks, PREFECT_API_URL=f"{api}/api", **environment)
    _started.append(cycle)
    return cycle


def started(fleet: Fleet, server: LoopbackServer, **environment: str) -> CycleProcess:
    """A cycle at the moment it waits for its replicas."""
    cycle = cycle_of(fleet, server.address, **environment)
    assert cycle.reaches(lambda _: bool(fleet.log()["signals"])), cycle.log
    return cycle


def last_state(fleet: Fleet, server: LoopbackServer) -> str:
    """The state of the fleet's cycle, as the server knows it."""
    named = {"flow_runs": {"name": {"any_": [f"{fleet.name}-000001"]}}}
    address = f"{server.address}/api/flow_runs/filter"
    (run,) = httpx.post(address, json=named, timeout=PATIENCE_SECONDS).raise_for_status().json()
    return str(run["state"]["name"])


def test_a_server_that_is_killed_and_comes_back_costs_nothing(
    fleet: Fleet, server: LoopbackServer
) -> None:
    cycle = started(fleet, server)
    server.stop()
    fleet.tick(600)
    reports = fleet.bucket / "_hotload/reports"
    assert cycle.reaches(lambda _: any(reports.glob("*.json"))), cycle.log
    server.start()
    server.wait()
    assert cycle.ends_within(RETRYING_SECONDS), cycle.log
    cycle.finish()
    assert last_state(fleet, server) == "Completed"


@signals_are_heard()
def test_a_server_that_stands_still_keeps_nobody_who_wants_to_leave(
    fleet: Fleet, server: LoopbackServer
) -> None:
    cycle = started(fleet, server)
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        os.kill(cycle.pid, signal.SIGINT)
        wait_until(lambda: fleet.leases()[-1]["released"])  # it has heard the first
        os.kill(cycle.pid, signal.SIGINT)
        assert cycle.ends_within(RETRYING_SECONDS), cycle.log
    finally:
        os.killpg(server.pid, signal.SIGCONT)
    assert cycle.exit_code == 130
    assert cycle.log[-2:] == [
        "stopped; start it again to go on",
        "Prefect server: it has not taken the last lines of the log",
    ]


@pytest.mark.heavy
def test_a_server_that_never_returns_is_one_line_and_nothing_is_lost(
    fleet: Fleet, server: LoopbackServer
) -> None:
    cycle = started(fleet, server, PREFECT_CLIENT_MAX_RETRIES="0")
    server.stop()
    fleet.tick(600)
    assert cycle.ends_within(RETRYING_SECONDS), cycle.log
    server.start()
    server.wait()
    assert cycle.exit_code == 1
    assert cycle.log[-1].startswith("error: Prefect server: it went away")
    assert "start the command again" in cycle.log[-1]
    assert not cycle.has_said("Traceback")
    assert not cycle.has_said("  File ")

    again = cycle_of(fleet, server.address)
    again.finish()
    assert again.has_said("AlreadyServed")
    assert len(fleet.log()["signals"]) == 1


@pytest.mark.heavy
async def test_a_database_that_is_locked_now_and_then_costs_seconds(
    fleet: Fleet, server: LoopbackServer
) -> None:
    async with proxying(server.address) as proxy:
        proxy.busy_every = 5
        cycle = await asyncio.to_thread(cycle_of, fleet, proxy.address)
        await asyncio.to_thread(cycle.reaches, lambda _: bool(fleet.log()["signals"]))
        await asyncio.to_thread(fleet.tick, 600)
        assert await asyncio.to_thread(cycle.ends_within, RETRYING_SECONDS), cycle.log
    cycle.finish()
    assert proxy.refused >= 3
    assert last_state(fleet, server) == "Completed"
