"""Shards placed on two nodes, and a rollout shared by them, each a process with a work directory of
its own: `make nodes`.

The first is a `python -m flows.serve --node`, the second a worker of a work pool.
"""

import asyncio
import json
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
import polars as pl
import psutil
import pytest

from flows.carry import work_on_share
from flows.cycle import checkpoint_to_rollout
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutManifest
from hotload.errors import InvalidProblemsError
from hotload.identity import SnapshotKind
from hotload.publish.publication import ServedSnapshot
from hotload.report.cycle_report import CycleReport
from hotload.sampling.nodes.notes import SamplingShare
from hotload.spec import CycleSpec
from tests.flows.fleet import Fleet
from tests.flows.killed_cycle import CycleProcess
from tests.waiting import PATIENCE_SECONDS, until, wait_until

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

    def working(self) -> list[psutil.Process]:
        """The processes below it, deepest last."""
        return psutil.Process(self.process.pid).children(recursive=True)

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


async def publish(fleet: Fleet, version: int, *nodes: str, **changes: Any) -> ServedSnapshot:
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


def sampling_spec(
    fleet: Fleet, *nodes: str, rollout: dict[str, Any] | None = None, **changes: Any
) -> CycleSpec:
    """A cycle of version 1 with 12 problems, sampled by these nodes, four at a time in all."""
    rows = ({"id": n, "prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(12))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (fleet.root / "problems.jsonl").write_text(lines)
    sampling = {
        "completions_per_prompt": 2,
        "max_completion_tokens": 4,
        "problems_per_task": 1,
        "concurrency": {"mode": "fixed", "initial_window": 4},
        "nodes": nodes,
        "rollout": rollout,
    }
    return fleet.spec(1, sampling=sampling, **changes)


def gated(fleet: Fleet) -> dict[str, Any]:
    """A rollout function for `sampling_spec`: each node gets to some of its parts, and no further
    before `fleet.root` has a file `gate`."""
    arguments = {"gate": str(fleet.root / "gate"), "free": 4}
    return {"name": "tests.flows.gated_rollout:rollout", "arguments": arguments}


def rollout_of(report: CycleReport) -> tuple[Path, RolloutManifest]:
    """Where the samples of a cycle lie, and what names them."""
    directory = Path(report.rollouts.parts_uri.removeprefix("file://"))
    manifest = (directory / MANIFEST_FILE).read_bytes()
    return directory, RolloutManifest.parse(manifest, path="")


def rows_of(report: CycleReport) -> pl.DataFrame:
    """What a trainer reads of a rollout: everything but when and by whom it was answered."""
    directory, manifest = rollout_of(report)
    assert manifest.is_complete
    frame = pl.concat(pl.read_parquet(directory / part.file) for part in manifest.parts)
    told = ["problem_id", "sample_number", "token_ids", "sampling_logprobs", "reward", "advantage"]
    return frame.select(told).sort("problem_id", "sample_number")


def runs_of(prefect_api: str, fleet: Fleet) -> list[dict[str, Any]]:
    """The flow runs in which nodes sampled from a fleet."""
    named = {"flow_runs": {"name": {"like_": "sample-"}}}
    answer = httpx.post(f"{prefect_api}/flow_runs/filter", json=named, timeout=PATIENCE_SECONDS)
    runs: list[dict[str, Any]] = answer.raise_for_status().json()
    return [run for run in runs if run["parameters"]["work"]["spec"]["rollouts"] == fleet.name]


async def test_two_nodes_sample_what_one_process_samples(
    fleet: Fleet, nodes: dict[str, Node], prefect_api: str
) -> None:
    alone = await checkpoint_to_rollout(sampling_spec(fleet))
    shared = await checkpoint_to_rollout(sampling_spec(fleet, *NODES, again="rollouts"))
    directories = [rollout_of(report)[0] for report in (alone, shared)]
    assert directories[0] != directories[1]
    assert rows_of(shared).equals(rows_of(alone))
    assert rows_of(shared).height == 24
    # Nothing of it was there before, and nothing is asked for twice.
    assert shared.rollouts.found_sample_count == 0
    assert len(fleet.samples_asked()) == 2 * 24
    assert not [path for path in fleet.bucket.glob("_hotload/nodes/**/*") if path.is_file()]
    runs = runs_of(prefect_api, fleet)
    assert sorted(run["name"].rpartition("-trainer-")[2] for run in runs) == ["0", "1"]
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    asked = runs[0]["parameters"]["work"]
    assert asked["services"][0]["concurrency"]["initial_window"] == 2
    assert len(asked["services"][0]["parts"]) == 6

    # A node whose problems make another plan refuses.
    work = SamplingShare.model_validate(asked | {"digest": "0" * 64})
    with pytest.raises(InvalidProblemsError, match="on this node; expected 000000000000"):
        await work_on_share(work, "")


def assert_each_once(report: CycleReport) -> None:
    """Every sample is named once, and none failed."""
    rows = rows_of(report)
    assert rows.height == len(rows.unique(["problem_id", "sample_number"])) == 24
    assert report.rollouts.failed_samples == {}


async def test_every_sample_is_there_once_although_a_node_is_killed(
    fleet: Fleet, nodes: dict[str, Node]
) -> None:
    before = {one.pid for one in nodes["trainer-0"].working()}
    killed = Event()

    def kill() -> None:
        """Kill what the first node works in when it has put a file; it cannot end before."""
        wait_until(lambda: list(fleet.bucket.glob("_hotload/rollouts/*/part-00000-*")))
        for one in nodes["trainer-0"].working():
            if one.pid not in before:
                one.kill()
                killed.set()
        (fleet.root / "gate").touch()

    killer = Thread(target=kill)
    killer.start()
    report = await checkpoint_to_rollout(sampling_spec(fleet, *NODES, rollout=gated(fleet)))
    killer.join()
    assert killed.is_set()
    assert_each_once(report)
    assert fleet.log()["client_bugs"] == []


async def has_put_a_file(fleet: Fleet) -> bool:
    """Whether the first node has put a file of its share."""
    return bool(list(fleet.bucket.glob("_hotload/rollouts/*/part-00000-*")))


async def test_a_cancelled_cycle_ends_its_runs(
    fleet: Fleet, nodes: dict[str, Node], prefect_api: str
) -> None:
    spec = sampling_spec(fleet, *NODES, rollout=gated(fleet))
    cycle = asyncio.create_task(checkpoint_to_rollout(spec))
    await until(lambda: has_put_a_file(fleet))
    cycle.cancel()
    await asyncio.wait([cycle])
    assert cycle.cancelled()

    async def are_cancelled() -> bool:
        runs = await asyncio.to_thread(runs_of, prefect_api, fleet)
        return [run["state_type"] for run in runs] == ["CANCELLED"] * 2

    await until(are_cancelled)


async def test_a_killed_cycle_goes_on_beside_the_runs_that_it_left(
    fleet: Fleet, nodes: dict[str, Node]
) -> None:
    spec = sampling_spec(fleet, *NODES, rollout=gated(fleet))
    cycle = CycleProcess(fleet, spec)
    try:
        await until(lambda: has_put_a_file(fleet))
        cycle.kill()
    finally:
        cycle.stop()
    again = asyncio.create_task(checkpoint_to_rollout(spec))

    async def both_nodes_work_on() -> bool:
        noted = {path.parents[1] for path in fleet.bucket.glob("_hotload/nodes/*/nodes/*")}
        return len(noted) == 2 or again.done()

    await until(both_nodes_work_on)
    assert not again.done()
    (fleet.root / "gate").touch()
    report = await again
    assert_each_once(report)
    assert report.rollouts.found_sample_count > 0


async def test_where_no_node_is_left_the_cycle_samples(
    fleet: Fleet, nodes: dict[str, Node]
) -> None:
    first = await checkpoint_to_rollout(sampling_spec(fleet, "gone-0", "trainer-1"))
    assert first.rollouts.found_sample_count == 0
    second = await checkpoint_to_rollout(sampling_spec(fleet, "gone-0", "gone-1", again="rollouts"))
    assert rows_of(second).equals(rows_of(first))
    assert rows_of(second).height == 24
