"""Shards placed on two nodes, each a process with a work directory of its own: `make nodes`.

The first is a `python -m flows.serve --node`, the second a worker of a work pool.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import psutil
import pytest

from flows.cycle import checkpoint_to_rollout
from hotload.identity import SnapshotKind
from hotload.publish.publication import Published
from tests.flows.fleet import Fleet
from tests.waiting import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
NODES = ("trainer-0", "trainer-1")

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


class Node:
    """A process that waits for work, and its disk."""

    def __init__(self, disk: Path, *command: str, **environment: str) -> None:
        self.disk = disk
        environment = os.environ | environment
        self.process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment)

    def kept(self, identity: str, share: str) -> set[str]:
        """The shards of a baseline that it has for a share."""
        found = (self.disk / share).rglob(f"baseline/{identity}/*.safetensors")
        return {path.name for path in found}

    @contextmanager
    def dying(self) -> Iterator[list[int]]:
        """Kill whatever process it works in, as soon as it begins; yields those that were."""
        before = {one.pid for one in psutil.Process(self.process.pid).children(recursive=True)}
        killed: list[int] = []
        ended = Event()

        def kill() -> None:
            while not ended.wait(0.01):
                for one in psutil.Process(self.process.pid).children(recursive=True):
                    if one.pid not in before and one.pid not in killed:
                        with suppress(psutil.NoSuchProcess):
                            one.kill()
                        killed.append(one.pid)

        killer = Thread(target=kill)
        killer.start()
        yield killed
        ended.set()
        killer.join()


@pytest.fixture(scope="module")
def running(
    prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Node]]:
    """Two nodes, once the server knows that they wait."""
    disks = tmp_path_factory.mktemp("disks")
    first, second = NODES
    for command in (
        f"work-pool create {second} --type process",
        f"--no-prompt deploy flows/carry.py:work_on_share --name {second} --pool {second}"
        f" --param work_dir={disks / second}",
    ):
        subprocess.run([sys.executable, "-m", "prefect", *command.split()], cwd=ROOT, check=True)
    serve = ("flows.serve", "--node", first, "--work-dir", str(disks / first))
    worker = ("prefect", "worker", "start", "--pool", second)
    nodes = {
        first: Node(disks / first, *serve),
        second: Node(disks / second, *worker, PREFECT_WORKER_QUERY_SECONDS="0.5"),
    }
    addresses = [f"{prefect_api}/deployments/name/node/{name}" for name in NODES]

    def are_there() -> bool:
        assert [one.process.poll() for one in nodes.values()] == [None, None]
        answers = [httpx.get(one, timeout=PATIENCE_SECONDS) for one in addresses]
        return all(one.is_success and one.json()["status"] == "READY" for one in answers)

    wait_until(are_there)
    yield nodes
    for one in nodes.values():
        one.process.terminate()
    for one in nodes.values():
        one.process.wait(timeout=60)


@pytest.fixture
def nodes(running: dict[str, Node]) -> dict[str, Node]:
    """The same with empty disks."""
    for one in running.values():
        shutil.rmtree(one.disk, ignore_errors=True)
    return running


async def publish(fleet: Fleet, version: int, *nodes: str, **changes: Any) -> Published:
    placement = dict.fromkeys(nodes or NODES, ())
    report = await checkpoint_to_rollout(fleet.spec(version, placement=placement, **changes))
    assert report.snapshot.identity in fleet.served()
    return report.snapshot


async def test_two_nodes_publish_each_its_share_and_keep_its_baseline(
    fleet: Fleet, nodes: dict[str, Node]
) -> None:
    first, second = [await publish(fleet, version) for version in (1, 2)]
    assert (first.kind, second.kind) == (SnapshotKind.FULL, SnapshotKind.DELTA)
    shards = {path.name for path in (fleet.bucket / second.identity).glob("*.safetensors")}
    shares = [node.kept(second.identity, name) for name, node in nodes.items()]
    assert all(shares)
    assert shares[0] | shares[1] == shards
    assert not shares[0] & shares[1]
    assert not any(node.kept(first.identity, name) for name, node in nodes.items())
    assert not (fleet.root / "work").exists()  # the coordinator has no byte of it

    shutil.rmtree(nodes["trainer-0"].disk)  # a new disk: the store has what was on it
    third = await publish(fleet, 3)
    assert third.kind is SnapshotKind.DELTA
    assert nodes["trainer-0"].kept(third.identity, "trainer-0") == shares[0]
    assert not list(fleet.bucket.glob("_hotload/nodes/*"))
    assert fleet.log()["client_bugs"] == []


async def test_what_a_node_that_dies_had_is_the_work_of_another(
    fleet: Fleet, nodes: dict[str, Node]
) -> None:
    await publish(fleet, 1)
    with nodes["trainer-0"].dying() as killed:
        second = await publish(fleet, 2)
    assert killed
    assert second.kind is SnapshotKind.DELTA
    assert nodes["trainer-1"].kept(second.identity, "trainer-0")
    # Where none is left, the cycle's own process does it, from the store as well.
    third = await publish(fleet, 3, "gone-0", "gone-1")
    assert third.kind is SnapshotKind.DELTA
    assert {path.name for path in (fleet.root / "work").iterdir()} == {"gone-0", "gone-1"}
    assert fleet.log()["client_bugs"] == []
