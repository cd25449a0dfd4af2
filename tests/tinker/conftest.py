"""SkyRL's server in a process of its own, and a base model that it and the emulator have."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest may read this file before tests/servers.py sets Prefect's environment
    from tests.flows.fleet import Fleet
    from tests.servers import LoopbackServer

pytest_plugins = ["tests.servers"]


def pytest_configure() -> None:
    os.environ |= {"TINKER_API_KEY": "tml-of-nobody", "TINKER_TELEMETRY": "0"}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1.4 million random weights, in which both compute in float32."""
    from examples.tiny_trainer import CONFIG, TinyTrainer

    directory = tmp_path_factory.mktemp("models") / "base"
    TinyTrainer().save(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32"}))
    return directory


@pytest.fixture(scope="session")
def skyrl(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackServer]:
    """The server; started again, it has the states of before and no model in memory."""
    from tests.servers import ROOT, LoopbackServer

    directory = tmp_path_factory.mktemp("skyrl")
    names = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment = [f"{name}={value}" for name, value in names.items()]
    module = [sys.executable, "-m", "tests.tinker.serve", str(base), str(directory)]
    server = LoopbackServer(
        "skyrl", directory, lambda port: ["env", *environment, *module, str(port)]
    )
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def fleet(prefect_api: str, tmp_path: Path, base: Path) -> AsyncIterator[Fleet]:
    """Two replicas that serve the base model, and adapters over it."""
    from tests.flows.fleet import running_fleet, save_blocks

    with running_fleet(f"fleet-{uuid.uuid4().hex[:12]}", tmp_path, [base]) as running:
        await save_blocks(running)
        yield running
