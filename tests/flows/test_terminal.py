"""What a person sees of a local run: our lines of progress, and one failure once."""

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from blocks.account import InferenceAccount
from blocks.hot_load_service import HotLoadService
from tests.flows.fleet import NAMES, SERVICE, Fleet
from tests.flows.killed_cycle import ROOT

pytestmark = pytest.mark.slow


async def ended(fleet: Fleet, *options: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """`python -m flows` with the cycle of version 1, once it has ended."""
    file = fleet.root / "cycle.yaml"
    file.write_text(yaml.safe_dump({"cycle": fleet.declared(1, **changes)}))
    command = [sys.executable, "-m", "flows", str(file), *options]
    return await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, env=os.environ, capture_output=True, text=True
    )


async def test_a_local_run_shows_our_lines(fleet: Fleet) -> None:
    run = await ended(fleet)
    assert run.returncode == 0, run.stderr
    assert "2 of 2 replicas serve it" in run.stderr
    for prefects in ("Finished in state", "Beginning flow run", "Beginning subflow run", "View at"):
        assert prefects not in run.stderr
    assert len(run.stderr.splitlines()) < 25


async def test_a_failure_is_told_once(fleet: Fleet) -> None:
    """Of an error that is none of the input, which several tasks and flows end with."""
    account = InferenceAccount(base_url=fleet.url, api_key="another", **NAMES)
    await HotLoadService(account=account).save(fleet.name, overwrite=True)
    run = await ended(fleet)
    assert run.returncode == 1
    assert run.stderr.count("use a key of this account") == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: ")


SAYS = """
import logging, prefect
from flows.command_line import show_own_lines
show_own_lines()
for name, level in (("EventsWorker", 30), ("EventsWorker", 40), ("prefect", 20), ("prefect", 30)):
    words = f"{name} {level}"
    record = logging.LogRecord(name, level, prefect.__file__, 1, words, None, None)
    logging.getLogger(name).handle(record)
"""


def test_prefects_own_warnings_are_shown_but_those_of_its_queues() -> None:
    command = [sys.executable, "-c", SAYS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.rpartition("- ")[2] for line in run.stderr.splitlines()] == [
        "EventsWorker 40",
        "prefect 30",
    ]


async def test_publishing_alone_asks_for_no_sample(fleet: Fleet) -> None:
    run = await ended(fleet, problems=None)
    assert (run.returncode, fleet.served()) == (2, {None})
    assert "`problems` of the cycle: found none" in run.stderr
    run = await ended(fleet, "--publish-only", problems=None)
    assert run.returncode == 0, run.stderr
    (identity,) = fleet.served()
    assert run.stdout.startswith(f"{SERVICE}  full {identity}, ")
    assert not fleet.log()["requests"]  # for samples, the preflight's among them
