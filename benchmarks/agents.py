"""Agents: from bytes in the bucket to an engine that reloaded, and a fleet behind one door.

    python -m benchmarks.agents [--layers 10] [--turns 5] [--swaps 25] [--agents 64] [--dir DIR]

Beside stub engines, which answer the calls of vLLM or SGLang at once, so that their own reload is
nothing. One agent, a process, loads deltas of a checkpoint of so many layers of 100 MB, 1 % of the
elements changed, warm, from a bucket that is a directory; in turn with it, in a process of
its own with as many workers, the codec applies the same delta to the same directory. Requests go
one after the other while a tiny model is swapped. The fleet's agents live in two processes, each
with a directory, a port, an engine and a thread; the door is a process, and is asked for the status
0.3 s after each answer. Objects that agents read from the bucket are counted where they are read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from agent.beside.app import create_agent_app
from agent.beside.engine_replica import EngineReplica
from agent.beside.following import Following
from agent.beside.peers import Peers
from agent.engines.vllm import Vllm
from agent.fleet.addresses import Addresses
from agent.fleet.log import FleetLog
from agent.fleet.report import LOOK_PATH, REPORT_PATH
from agent.fleet.state import FleetEvent
from agent.loading.bucket import SnapshotBucket
from agent.server import Server, bind
from benchmarks import checkpoints
from benchmarks.codec import ROOT
from benchmarks.on_disk import memory
from examples.processes import free_port, process
from hotload.clients.store.store import Store
from hotload.clock import utc_now
from hotload.directory.operations import encode_directory
from hotload.identity import SnapshotKind
from hotload.publish.fireworks_api import delta_metadata
from hotload.publish.fireworks_names import HOT_LOAD_PATH
from tests.factories import recorded_manifest

TITLE = "bf16, lr 1e-6"
TIMES_APPLY, MEMORY_MIB, PAUSE_MS, FLEET_SECONDS = 1.3, 128, 50, 3.0
PROCESSES = 2
PATIENCE_SECONDS = 600.0
GAP_SECONDS = 0.002  # between two requests
LOOK_SECONDS = 0.3  # between two looks at the status of a fleet
KEY = "the-key-of-the-bench"
NAMES = {
    "authorization": "Bearer bench",
    "fireworks-model": "accounts/local/models/policy",
    "fireworks-deployment": "accounts/local/deployments/rollouts",
}


class StubEngine:
    """What vLLM and SGLang answer to an agent, and a request that waits while they are paused."""

    def __init__(self) -> None:
        self.version: str | None = None
        self.runs = asyncio.Event()
        self.runs.set()
        self.resumed_at = 0.0
        self.swaps = 0

    async def answer(self, path: str, body: Any) -> Any:
        match path:
            case "/generate":
                await self.runs.wait()
            case "/pause" | "/pause_generation":
                self.runs.clear()
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/update_weights_from_disk":
                self.version = body["weight_version"]
            case "/resume" | "/continue_generation":
                self.resumed_at = time.perf_counter()
                self.swaps += 1
                self.runs.set()
            case "/weight_info" | "/model_info":
                return {"weight_version": self.version}
        return {"success": True}

    async def listen(self) -> str:
        """Answer from here on; the address."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                size = 0
                while (header := await reader.readline()).strip():
                    name, _, value = header.partition(b":")
                    size = int(value) if name.lower() == b"content-length" else size
                data = await reader.readexactly(size)
                path = line.split()[1].decode().partition("?")[0]
                told = json.dumps(await self.answer(path, json.loads(data) if data else None))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(told))
                writer.write(told.encode())
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextmanager
def stub_engine() -> Iterator[tuple[StubEngine, str, asyncio.AbstractEventLoop]]:
    """An engine in a thread with a loop of its own."""
    started: Future[tuple[StubEngine, str, asyncio.AbstractEventLoop]] = Future()
    ended = asyncio.Event()

    async def serve() -> None:
        engine = StubEngine()
        started.set_result((engine, await engine.listen(), asyncio.get_running_loop()))
        await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    engine, url, loop = started.result()
    try:
        yield engine, url, loop
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()


class Bucket:
    """A bucket with a full snapshot of one of two checkpoints and deltas to and fro after it."""

    def __init__(self, root: Path, layers: int, tensors: int | None, *, is_quick: bool) -> None:
        self.root, self.path = root, root / "bucket"
        changes = checkpoints.make(TITLE, is_quick=is_quick)[:tensors]
        checkpoints.write_checkpoints(root, changes, layers=layers)
        self.sides = (root / "old", root / "new")
        for number, (base, target) in enumerate((self.sides, self.sides[::-1])):
            encode_directory(base, target, root / f"delta-{number}", workers=2)
        self.path.mkdir()
        self.count = 0
        self.size_bytes = sum(path.stat().st_size for path in self.sides[0].iterdir())
        os.sync()

    def publish(self, kind: SnapshotKind) -> tuple[str, str | None]:
        """Put the next snapshot into the bucket, with its record; its name and the one before."""
        number, self.count = self.count, self.count + 1
        is_delta = kind is SnapshotKind.DELTA
        previous = f"v{number - 1}" if is_delta else None
        source = self.delta(number) if is_delta else self.sides[number % 2]
        stored = self.path / f"v{number}"
        shutil.copytree(source, stored)
        manifest = recorded_manifest(stored, self.sides[number % 2], previous)
        record = self.path / "_hotload" / "snapshots" / f"v{number}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_bytes(manifest.render())
        os.sync()
        return stored.name, previous

    def delta(self, number: int) -> Path:
        """What leads to the checkpoint of that number."""
        return self.root / f"delta-{(number + 1) % 2}"

    async def signal(self, identity: str, previous: str | None) -> None:
        """Write a signal into the log, as a door does."""
        log = FleetLog(Store(self.path.as_uri()), "local", "rollouts")
        event = FleetEvent(
            event="signal",
            at=utc_now(),
            identity=identity,
            kind=SnapshotKind.DELTA if previous else SnapshotKind.FULL,
            previous=previous,
        )
        assert await log.append(event, after=await log.read())


@contextmanager
def one_agent(bucket: Bucket, kind: str, engine_url: str) -> Iterator[tuple[str, int]]:
    """An agent's process; its address and number."""
    command = ["-m", "agent", "--bucket", bucket.path.as_uri(), "--engine", kind]
    command += ["--engine-url", engine_url, "--model-dir", str(bucket.root / f"replica-{kind}")]
    command += ["--base-model", str(bucket.sides[0]), "--name", "bench"]
    with (bucket.root / "agent.log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert child.stdout is not None
    try:
        yield child.stdout.readline().split()[-1], child.pid
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def load(bucket: Bucket, url: str, engine: StubEngine, kind: SnapshotKind) -> float:
    """Publish, signal, and wait until the engine has reloaded; seconds from the signal on."""
    identity, previous = bucket.publish(kind)
    before = engine.swaps
    began = time.perf_counter()
    asyncio.run(bucket.signal(identity, previous))
    httpx.post(f"{url}{LOOK_PATH}", timeout=PATIENCE_SECONDS)
    wait_for(lambda: engine.swaps > before)
    seconds = engine.resumed_at - began
    # Sealed, and what was served before is gone.
    wait_for(lambda: report(url)["content_sha256"] and report(url)["current"] == identity)
    return seconds


def report(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}{REPORT_PATH}", timeout=PATIENCE_SECONDS).json()
    return found


def wait_for(is_so: Callable[[], object], look_seconds: float = 0.005) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit("the agents do not come to it")
        time.sleep(look_seconds)


def against_apply(root: Path, options: argparse.Namespace) -> None:
    """One agent against the codec's apply, and its memory."""
    bucket = Bucket(root, options.layers, None, is_quick=options.quick)
    workers = os.cpu_count() or 1
    ours, codec = [], []
    with (
        stub_engine() as (engine, engine_url, _),
        one_agent(bucket, "vllm", engine_url) as (url, pid),
    ):
        wait_for(lambda: report(url)["readiness"])
        start_bytes = memory("VmRSS", pid)
        load(bucket, url, engine, SnapshotKind.FULL)
        for _ in range(options.turns):
            number, out = bucket.count, root / "applied"
            base = bucket.sides[(number + 1) % 2]
            command = ["-W", "ignore", "-m", "benchmarks.on_disk", "apply", f"directory-{workers}"]
            command += [str(base), str(bucket.delta(number)), str(out)]
            told = subprocess.check_output([sys.executable, *command], cwd=ROOT)
            codec.append(json.loads(told)["wall"])
            shutil.rmtree(out)
            os.sync()
            ours.append(load(bucket, url, engine, SnapshotKind.DELTA))
        peak = (memory("VmHWM", pid) - start_bytes) / 2**20
    ratio = statistics.median(a / b for a, b in zip(ours, codec, strict=True))
    print(f"{bucket.size_bytes / 1e9:.2f} GB in {options.layers} files, {options.turns} deltas")
    print(
        f"  signal to reloaded {statistics.median(ours):.2f} s, the codec's apply "
        f"{statistics.median(codec):.2f} s: {ratio:.2f} (bar {TIMES_APPLY})"
    )
    print(f"  the agent's memory above start: {peak:.0f} MiB (bar {MEMORY_MIB})")


async def longest_requests(engine: StubEngine, url: str, is_over: threading.Event) -> list[float]:
    """Send one request after the other; the longest of each swap, in seconds."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    by_swap: dict[int, float] = {}
    while not is_over.is_set():
        swap, began = engine.swaps, time.perf_counter()
        writer.write(b"POST /generate HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.split(b":")[1]))
        by_swap[swap] = max(by_swap.get(swap, 0.0), time.perf_counter() - began)
        await asyncio.sleep(GAP_SECONDS)
    writer.close()
    return [by_swap[swap] for swap in range(1, engine.swaps)]


def pauses(root: Path, options: argparse.Namespace) -> None:
    """The longest request of every swap."""
    print(f"the longest request of a swap, {options.swaps} swaps of a tiny model")
    for kind in ("vllm", "sglang"):
        bucket = Bucket(root / kind, 1, 3, is_quick=True)
        over = threading.Event()
        with (
            stub_engine() as (engine, engine_url, loop),
            one_agent(bucket, kind, engine_url) as (url, _),
        ):
            wait_for(lambda url=url: report(url)["readiness"])
            load(bucket, url, engine, SnapshotKind.FULL)
            asked = asyncio.run_coroutine_threadsafe(
                longest_requests(engine, engine_url, over), loop
            )
            for _ in range(options.swaps + 1):
                load(bucket, url, engine, SnapshotKind.DELTA)
            over.set()
            found = sorted(1e3 * seconds for seconds in asked.result())
        p50, p99 = statistics.median(found), found[min(len(found) - 1, int(0.99 * len(found)))]
        print(f"  {kind:6}  p50 {p50:.1f} ms, p99 {p99:.1f} ms (bar {PAUSE_MS})")


class CountingBucket(SnapshotBucket):
    """A bucket that writes down what is read of snapshots."""

    def __init__(self, url: str, reads: Path) -> None:
        super().__init__(url, {})
        self._reads = reads

    def download(self, identity: str, file: str, target: Path) -> None:
        with self._reads.open("a") as out:
            out.write(f"{identity}/{file}\n")
        super().download(identity, file, target)


async def run_agents(root: str, ports: list[int], all_ports: list[int], has_peers: bool) -> None:
    """Be agents at ports, each with an engine, until killed."""
    place, servers = Path(root), []
    store = Store((place / "bucket").as_uri())
    addresses = Addresses([f"http://127.0.0.1:{port}" for port in all_ports])
    for port in ports:
        name = f"agent-{port}"
        peers = Peers(addresses, KEY) if has_peers else None
        replica = EngineReplica(
            name,
            place / "replicas" / f"{has_peers}" / name,
            CountingBucket(store.url, place / "reads"),
            ThreadPoolExecutor(1, "load"),
            Vllm(await StubEngine().listen()),
            engine_kind="vllm",
            base=place / "old",
            peers=peers,
        )
        following = Following(replica, FleetLog(store, "local", "rollouts"), 2.0)
        app = create_agent_app(following, peers)
        server = Server(app, lambda: None)
        listening, _ = bind(port)
        servers.append(server._serve([listening]))
    await asyncio.gather(*servers)


def served(door: str) -> list[str | None]:
    """What every replica serves, as the door says; `not ready` where it is not."""
    answer = httpx.get(f"{door}{HOT_LOAD_PATH}", headers=NAMES, timeout=PATIENCE_SECONDS)
    return [
        one["current_snapshot_identity"] if one["readiness"] else "not ready"
        for one in answer.raise_for_status().json()["replicas"]
    ]


def cpu_seconds() -> float:
    """Count the CPU of this process and of all that it started."""
    own = psutil.Process()
    times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def is_open(url: str) -> bool:
    try:
        httpx.get(url, timeout=PATIENCE_SECONDS)
    except httpx.TransportError:
        return False
    return True


def fleet(root: Path, options: argparse.Namespace, *, has_peers: bool) -> None:
    """Signal to all ready, and how often each object was read."""
    bucket = Bucket(root, options.fleet_layers, 3, is_quick=True)
    reads = root / "reads"
    with ExitStack() as stack:
        # Kept from here on, and listened at by the agents: nobody else takes them.
        kept = [stack.enter_context(bind(0)[0]) for _ in range(options.agents)]
        ports = [one.getsockname()[1] for one in kept]
        for number in range(PROCESSES):
            job = {"root": str(root), "ports": ports[number::PROCESSES], "all_ports": ports}
            job |= {"has_peers": has_peers}
            if not job["ports"]:
                continue
            command = ["-m", "benchmarks.agents", "--job", json.dumps(job)]
            asked = f"http://127.0.0.1:{ports[number]}{REPORT_PATH}"
            stack.enter_context(process(command, root / f"agents-{number}.log", asked))
        port = free_port()
        door = f"http://127.0.0.1:{port}"
        listed = [word for one in ports for word in ("--agent", f"http://127.0.0.1:{one}")]
        command = ["-m", "agent.door", "--bucket", bucket.path.as_uri(), "--port", str(port)]
        stack.enter_context(process([*command, *listed], root / "door.log", asked))
        wait_for(lambda: is_open(door) and set(served(door)) == {None})
        for _ in range(2):
            for kind in (SnapshotKind.FULL, SnapshotKind.DELTA):
                reads.write_text("")
                identity, previous = bucket.publish(kind)
                body = {"identity": identity, **(delta_metadata(previous) if previous else {})}
                used, began = cpu_seconds(), time.perf_counter()
                answer = httpx.post(
                    f"{door}{HOT_LOAD_PATH}", json=body, headers=NAMES, timeout=PATIENCE_SECONDS
                )
                answer.raise_for_status()
                wait_for(lambda name=identity: set(served(door)) == {name}, LOOK_SECONDS)
                seconds = time.perf_counter() - began
                used = cpu_seconds() - used
                counts = Counter(reads.read_text().split())
                told = f"{min(counts.values())} to {max(counts.values())}"
                print(
                    f"  peers {'on ' if has_peers else 'off'}  {kind.name:5}  {seconds:5.2f} s"
                    f" (bar {FLEET_SECONDS:g}), {used:5.2f} s of CPU, {len(counts)} objects,"
                    f" each read {told} times{' (bar 1)' if has_peers else ''}",
                    flush=True,
                )


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=10, help="of 100 MB each")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--swaps", type=int, default=25)
    parser.add_argument("--agents", type=int, default=64, help="behind one door")
    parser.add_argument("--fleet-layers", type=int, default=4, help="of their model, 1.6 MB each")
    parser.add_argument("--quick", action="store_true", help="an eighth of the bytes")
    parser.add_argument("--dir", help="where the files may live")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        asyncio.run(run_agents(**json.loads(options.job)))
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        root = Path(directory)
        against_apply(root / "one", options)
        shutil.rmtree(root / "one")
        pauses(root / "pauses", options)
        print(f"{options.agents} agents in {PROCESSES} processes behind one door, to all ready")
        for has_peers in (False, True):
            fleet(root / f"fleet-{has_peers}", options, has_peers=has_peers)


if __name__ == "__main__":
    main()
