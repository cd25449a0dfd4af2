"""What a person is told where no Prefect server answers: one line, and what to start."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripted_server import ScriptedServer, http

ROOT = Path(__file__).parents[2]
CYCLE = (
    "cycle: {checkpoint: /c, run_id: r, policy_version: 1, work_dir: /w, problems: {dataset: /d}}"
)
COMMANDS = {  # as docs and --help say: 2 where 1 means that something is missing
    "flows FILE": 1,
    "flows.serve": 1,
    "flows.rollback FILE 1": 1,
    "flows.plan FILE": 1,
    "flows.retain": 1,
    "flows.watch FILE": 1,
    "blocks check store default": 2,
    "examples.trigger FILE": 1,
}
PASSWORD = "hush"

pytestmark = pytest.mark.slow


def ended(command: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "cycle.yaml"
    file.write_text(CYCLE)
    words = [str(file) if word == "FILE" else word for word in command.split()]
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_no_server_is_one_line(command: str, tmp_path: Path) -> None:
    url = f"http://me:{PASSWORD}@127.0.0.1:9/api"
    run = ended(command, tmp_path, PREFECT_API_URL=url)
    assert (run.returncode, run.stdout) == (COMMANDS[command], "")
    assert run.stderr.startswith(
        "error: Prefect server: http://127.0.0.1:9/api does not answer (ConnectError: "
    )
    assert run.stderr.endswith(
        "); start one with `env $(cat deployments/sqlite.env) prefect server start`, or set "
        "PREFECT_API_URL to one that runs\n"
    )
    assert len(run.stderr.splitlines()) == 1
    assert PASSWORD not in run.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:4200/api", "http://127.0.0.1:port/api"])
def test_an_address_that_is_none_is_one_line(tmp_path: Path, url: str) -> None:
    run = ended("blocks check store default", tmp_path, PREFECT_API_URL=url)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"error: Prefect server: {url} does not answer (")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["flows FILE", "blocks check store default"])
def test_no_address_is_one_line(command: str, tmp_path: Path) -> None:
    run = ended(command, tmp_path, PREFECT_API_URL="", PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false")
    assert (run.returncode, run.stdout) == (COMMANDS[command], "")
    assert run.stderr.startswith("error: Prefect server: PREFECT_API_URL is not set; start one")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.server
async def test_a_server_that_wants_a_key_is_one_line(tmp_path: Path) -> None:
    async with ScriptedServer(http(b'{"detail": "Unauthorized"}', 401)).running() as server:
        url = f"{server.address}/api"
        run = await asyncio.to_thread(ended, "flows FILE", tmp_path, PREFECT_API_URL=url)
    assert run.returncode == 1
    assert run.stderr == (
        f"error: Prefect server: {url} answers HTTP 401; set PREFECT_API_AUTH_STRING or"
        " PREFECT_API_KEY as this server asks for it\n"
    )


@pytest.mark.server
def test_a_deployment_that_is_not_there_is_one_line(tmp_path: Path, prefect_api: str) -> None:
    run = ended("examples.trigger FILE --deployment nobody/made-this", tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: no deployment nobody/made-this: `python -m flows.serve`")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.server
def test_a_block_that_is_not_there_is_one_line(tmp_path: Path, prefect_api: str) -> None:
    run = ended("flows FILE", tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: Unable to find block document named default")
    assert "hot-load-service" in run.stderr
    assert len(run.stderr.splitlines()) == 1
