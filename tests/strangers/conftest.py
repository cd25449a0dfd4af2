"""Emulator, agents and doors in processes of our own interpreter, others' clients in this one."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import fireworks
import httpx
import httpx2
import openai
import pytest
from fireworks.training.sdk import deployment, weight_syncer
from fireworks.training.sdk.client import FiretitanSamplingClient
from fireworks.training.sdk.deployment import DeploymentManager, DeploymentSampler
from fireworks.training.sdk.weight_syncer import WeightSyncer

from tests.servers import ROOT, SHEPHERD
from tests.strangers.counting import count_calls, count_requests, summary, surface
from tests.strangers.door import KEY, AgentsDoor, Door, SnapshotTrainer

CHECKPOINTS = 5
TRAIN = """
import sys
from pathlib import Path
from examples.tiny_trainer import TinyTrainer

trainer = TinyTrainer()
for version in range(int(sys.argv[2])):
    trainer.save(Path(sys.argv[1]) / f"{version:06d}")
    trainer.step()
"""
LONGEST_WAIT_SECONDS = 0.05


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ours", required=True, help="the interpreter that has this project")


def pytest_configure() -> None:
    """Count the calls, and shorten the SDK's waits between polls: they are 5 s to 15 s."""
    for kind in (DeploymentManager, DeploymentSampler, WeightSyncer, FiretitanSamplingClient):
        count_calls(kind, *surface(kind))
    for client in (fireworks.Fireworks, openai.OpenAI):
        count_calls(client, "request")
    for library in (httpx, httpx2):
        count_requests(library.Client)
        count_requests(library.AsyncClient)
    brisk = SimpleNamespace(
        time=time.time, sleep=lambda seconds: time.sleep(min(seconds, LONGEST_WAIT_SECONDS))
    )
    deployment.time = weight_syncer.time = brisk
    DeploymentSampler._RETRY_BASE_BACKOFF_S = LONGEST_WAIT_SECONDS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in summary():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def ours(request: pytest.FixtureRequest) -> str:
    return str(ROOT / request.config.getoption("--ours"))


@pytest.fixture(scope="session")
def checkpoints(ours: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base model and the steps after it."""
    directory = tmp_path_factory.mktemp("checkpoints")
    command = [ours, "-c", TRAIN, str(directory), str(CHECKPOINTS)]
    subprocess.run(command, cwd=ROOT, check=True)
    return sorted(directory.iterdir())


@pytest.fixture
def run_ours(ours: str) -> Iterator[Callable[..., list[str]]]:
    """Starts modules of ours, which end with the test; returns the addresses they say."""
    with ExitStack() as stack:

        def start(*command: str) -> list[str]:
            # Its group ends when the pipe to us closes, however we end.
            child = subprocess.Popen(
                ["sh", "-c", SHEPHERD, "sh", ours, "-m", *command],
                cwd=ROOT,
                env={**os.environ, "HOTLOAD_DOOR_KEY": KEY},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.callback(child.wait)
            stack.callback(child.stdin.close)
            stack.callback(child.stdout.close)
            first = child.stdout.readline()
            assert ": http" in first, first
            return first.split()[1:]

        yield start


@pytest.fixture
def open_door(
    run_ours: Callable[..., list[str]], checkpoints: list[Path], tmp_path: Path
) -> Callable[..., Door]:
    """Starts emulators, `open_door("ASYNC", "--replicas", "2")`."""

    def start(transition: str, *options: str) -> Door:
        bucket = tmp_path / "bucket"
        bucket.mkdir(exist_ok=True)
        command = ["emulator", "--bucket", str(bucket), "--api-key", KEY]
        command += ["--base-model", str(checkpoints[0]), "--transition", transition]
        (url,) = run_ours(*command, "--clock", "ticks", *options)
        return Door(url, bucket, transition)

    return start


@pytest.fixture(params=["ASYNC", "SYNC"])
def door(request: pytest.FixtureRequest, open_door: Callable[..., Door]) -> Door:
    """Two replicas that load at once, in each swap mode."""
    return open_door(request.param, "--replicas", "2")


@pytest.fixture(params=["ASYNC", "SYNC"])
def agents_door(
    request: pytest.FixtureRequest,
    run_ours: Callable[..., list[str]],
    checkpoints: list[Path],
    tmp_path: Path,
) -> AgentsDoor:
    """A door over two agents with engines, in each swap mode."""
    command = ["tests.agent.fleet", str(tmp_path), str(checkpoints[0])]
    url, *engines = run_ours(*command, "--transition", request.param)
    return AgentsDoor(url, tmp_path / "bucket", request.param, engines)


@pytest.fixture
def trainer(ours: str, checkpoints: list[Path], tmp_path: Path) -> SnapshotTrainer:
    return SnapshotTrainer(ours, checkpoints, tmp_path / "bucket")
