"""What flow tests share: a series of tiny checkpoints, and a fleet to carry them to.

Ask for `fleet` and a test has an emulator of its own and, on the session's real Prefect server,
three blocks under a name of their own: `await checkpoint_to_rollout(fleet.spec(1))` works at once.
For emulators with other settings: `running_fleet` of tests/flows/fleet.py, then `save_blocks`.
"""

from __future__ import annotations

import gc
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest may read this file before tests/servers.py sets Prefect's environment
    from tests.flows.fleet import Fleet


@pytest.fixture(autouse=True)
def garbage_of_its_own() -> Iterator[None]:
    """Prefect leaves connections to the garbage collector, which would warn in another test."""
    yield
    gc.collect()


@pytest.fixture
async def fleet(prefect_api: str, tmp_path: Path, checkpoints: list[Path]) -> AsyncIterator[Fleet]:
    """Two replicas that load at once and serve real weights, and their blocks on the server."""
    from tests.flows.fleet import running_fleet, save_blocks

    with running_fleet(f"fleet-{uuid.uuid4().hex[:12]}", tmp_path, checkpoints) as running:
        await save_blocks(running)
        yield running
