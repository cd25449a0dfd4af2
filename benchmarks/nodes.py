"""What a second node gains: validate, plan, encode and upload of a checkpoint, on one and on two.

    python -m benchmarks.nodes [--size-bytes 8e9] [--repetitions 3] [--dir DIR]

Every node is a `python -m flows.serve --node` with a directory and one core of its own; of
two cores, two nodes take both, and Prefect's server, the store and the coordinator share them.
Deltas go in turn by one node, and by two. `--dir` says where the files may live (eight times the
size; removed at the end).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.codec import ROOT, size_of
from benchmarks.publish import SIDES, STAGES, replicas, run, write_model
from examples.processes import prefect_server

TIMES_ONE_NODE = 1.7
START_SECONDS = 120.0
PLACEMENTS = {"one": ("one-a",), "two": ("two-a", "two-b")}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="What a second node gains.")
    parser.add_argument("--size-bytes", type=float, default=8e9, help="of the checkpoint")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dir", help="where the files may live")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(asyncio.run(published(**json.loads(options.job)))))
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as directory, ExitStack() as stack:
        root = Path(directory)
        stack.enter_context(prefect_server(root / "prefect"))
        cores = sorted(os.sched_getaffinity(0))
        for nodes in PLACEMENTS.values():
            for core, node in zip(cores, nodes, strict=False):
                stack.enter_context(running_node(node, root / "disks" / node, core))
        bench(root, int(options.size_bytes), options.repetitions)


def bench(root: Path, size_bytes: int, repetitions: int) -> None:
    write_model(root / "model", size_bytes)
    subprocess.run(["sync"], check=True)  # or the first fsync would wait for these
    total = size_of(root / "model" / SIDES[1])
    print(f"publishing {total / 1e9:.1f} GB by nodes of one core, {repetitions} deltas each")
    made: dict[str, list[list[float]]] = {name: [] for name in PLACEMENTS}
    with replicas() as one, replicas() as two:
        for version in range(1, repetitions + 3):  # a full, the first delta after it, the others
            for (name, nodes), url in zip(PLACEMENTS.items(), (one, two), strict=True):
                job = {"root": str(root), "name": name, "nodes": nodes, "url": url}
                command = [
                    "-m",
                    "benchmarks.nodes",
                    "--job",
                    json.dumps(job | {"version": version}),
                ]
                told = json.loads(run([sys.executable, "-W", "ignore", *command]))
                stages = ", ".join(f"{one:.2f} s" for one in told["stages"])
                print(f"{name}, version {version}, {told['kind']}: {stages}", flush=True)
                assert told["kind"] == ("FULL" if version == 1 else "DELTA"), told
                if version > 2:
                    made[name].append(told["stages"])
    for name, runs in made.items():
        print(f"\n{name}: {statistics.median(map(sum, runs)):.2f} s, smallest {least(runs):.2f}")
        for number, stage in enumerate(STAGES):
            print(f"  {statistics.median(one[number] for one in runs):6.2f} s  {stage}")
    gain = least(made["one"]) / least(made["two"])
    print(f"\n{gain:8.2f}  one node's seconds to two nodes', smallest (bar {TIMES_ONE_NODE})")


def least(runs: list[list[float]]) -> float:
    return min(map(sum, runs))


@contextmanager
def running_node(name: str, work_dir: Path, core: int) -> Iterator[None]:
    """Run a node on one core, until the block ends; begins once a worker asks for its work."""
    command = [sys.executable, "-m", "flows.serve", "--node", name, "--work-dir", str(work_dir)]
    process = subprocess.Popen(
        ["taskset", "--cpu-list", str(core), *command], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        asyncio.run(until_ready(name))
        yield
    finally:
        process.terminate()
        process.wait()


async def until_ready(name: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    deadline = time.monotonic() + START_SECONDS
    async with get_client() as client:
        while time.monotonic() < deadline:
            try:
                found = await client.read_deployment_by_name(f"node/{name}")
            except ObjectNotFound:
                found = None
            if found is not None and found.status is not None and found.status.value == "READY":
                return
            await asyncio.sleep(0.25)
    raise TimeoutError(f"node {name} did not start")


async def published(
    root: str, name: str, nodes: list[str], url: str, version: int
) -> dict[str, Any]:
    """Publish one version by nodes, from this process: seconds by stage."""
    from prefect import flow

    from blocks.account import InferenceAccount
    from blocks.checkpoint_store import CheckpointStore
    from blocks.hot_load_service import HotLoadService
    from flows.carry import keep_baselines
    from flows.publish import find_content, load_services, publish_snapshot
    from hotload.clients.store import publisher_lease
    from hotload.concurrently import taking_turns
    from hotload.spec import CycleSpec
    from tasks.baseline import baseline_of
    from tasks.conclude import find_earlier
    from tasks.plan import plan_snapshot

    place = Path(root)
    bucket = place / f"bucket-{name}"
    bucket.mkdir(exist_ok=True)
    account = InferenceAccount(
        base_url=url, api_key="bench", account_id="bench", model_id="m", deployment_id=name
    )
    await HotLoadService(account=account).save(name, overwrite=True)
    await CheckpointStore(url=bucket.as_uri()).save(name, overwrite=True)
    declared = {
        "checkpoint": str(place / "model" / SIDES[version % 2 == 0]),
        "run_id": "bench",
        "policy_version": version,
        **dict.fromkeys(("service", "store", "rollouts"), name),
        "work_dir": str(place / "work"),
        "problems": {"dataset": str(place / "problems.jsonl")},
        "readiness": {"poll_interval_seconds": 0.05},
        "cadence": {"full_every": 128},
        "placement": dict.fromkeys(nodes, ()),
    }
    spec = CycleSpec.model_validate(declared)

    @flow(name="publish")
    async def publish() -> dict[str, Any]:
        services = await load_services(spec)
        service, store = services[name], (await CheckpointStore.load(name)).open()
        workspace = service.access.workspace(Path(spec.work_dir))
        baseline = await baseline_of(spec, workspace, store)
        earlier = await find_earlier(store, services.values(), spec)
        marks = [time.perf_counter()]
        content = await find_content(spec, services, baseline, earlier)
        marks.append(time.perf_counter())
        async with publisher_lease(store, service.access.service, spec.name) as lease:
            plan = await plan_snapshot(spec, service, baseline, content, lease)
            marks.append(time.perf_counter())
            with taking_turns():
                made = await publish_snapshot(spec, service, baseline, content, plan, lease, 1)
        await keep_baselines(spec, baseline, content, [plan.identity])
        taken = [marks[1] - marks[0], marks[2] - marks[1], made.seconds_by_stage["publish"]]
        return {"kind": plan.kind.name, "stages": taken}

    return await publish()


if __name__ == "__main__":
    main()
