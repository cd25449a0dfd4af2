"""What tests of the tasks share: checkpoints, a machine that publishes them, a bench for rollouts,
and a clock.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.loop_clock import LoopClock

if TYPE_CHECKING:  # pytest may read this file before tests/servers.py sets Prefect's environment
    from tests.servers import StoreServer
    from tests.tasks.bench import Bench
    from tests.tasks.publishing import Publisher


@pytest.fixture
async def loop_clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    """The clock of the loop that the test runs in."""
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop.time)
    monkeypatch.setattr(loop, "time", clock.time)
    return clock


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Problems, a store, and rollouts by a scripted server."""
    from tests.tasks.bench import Bench

    return Bench(tmp_path)


@pytest.fixture
def publisher(tmp_path: Path, checkpoints: list[Path], emulators: object) -> Iterator[Publisher]:
    """A machine, two replicas and a store that is a directory."""
    with _publisher(tmp_path, checkpoints, (tmp_path / "bucket").as_uri(), {}) as made:
        yield made


@pytest.fixture
def s3_publisher(
    s3_server: StoreServer, tmp_path: Path, checkpoints: list[Path]
) -> Iterator[Publisher]:
    """The same with a bucket behind a real S3 server."""
    url = f"{s3_server.url}/{uuid.uuid4().hex}"
    with _publisher(tmp_path, checkpoints, url, dict(s3_server.options)) as made:
        yield made


@contextmanager
def _publisher(
    root: Path, checkpoints: list[Path], url: str, options: dict[str, Any]
) -> Iterator[Publisher]:
    from prefect.logging import disable_run_logger

    from hotload.clients.store import Store
    from tests.flows.fleet import running_fleet
    from tests.tasks.publishing import Publisher

    (root / "work").mkdir()
    settings = {"bucket": url, "bucket_options": options}
    with (
        running_fleet("unsaved", root, list(checkpoints), **settings) as fleet,
        # Tasks run as plain functions have no run to log to. Uvicorn's start enables all loggers.
        disable_run_logger(),
    ):
        yield Publisher(fleet, Store(url=url, options=options), root / "work")
