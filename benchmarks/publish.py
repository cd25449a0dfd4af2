"""What publishing costs beside the codec: validate, plan, encode and upload of a checkpoint.

    python -m benchmarks.publish [--size-bytes 8e9] [--repetitions 3] [--dir DIR]

A generated checkpoint of 32 files goes as deltas to a store that is a directory, each in a process
of its own, on a running Prefect server; replicas answer at once. Beside it, in turn: the codec's
own encode of the same two directories with two workers, and SHA-256 of the target by one core. The
same weights go once more with 8 layers a file and no spec, through the view, and once for a trainer
that vouches for its digests and files. On a busy machine the ratios of CPU seconds hold, of seconds
the smallest. `--dir` says where the files may live (eight times the size; removed at the end).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks import checkpoints
from benchmarks.codec import ROOT, size_of
from benchmarks.on_disk import memory
from examples.processes import prefect_server
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE
from hotload.checkpoint.rules import check_full
from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.directory.files import sha256_file
from hotload.directory.operations import encode_directory
from hotload.directory.shards import read_checkpoint
from hotload.directory.supplied_digests import DIGESTS_FILE

FILES, LAYERS_A_FILE = 32, 8
SIDES = ("old", "new")
TIMES_ENCODE, TIMES_SHA256SUM, TIMES_SERVED_LAYOUT = 1.6, 1.2, 1.15
PEAK_MIB = 256
TENSORS, TENSOR_SHAPE, A_LAYER = 70_000, (32, 32), 1000
ENCODE_MICROSECONDS, CHECK_MICROSECONDS = 40, 15
STAGES = ("validate", "plan", "encode, upload")


def main() -> None:
    """Run the benchmark and print its tables."""
    options = parse()
    if options.job:
        print(json.dumps(asyncio.run(published(**json.loads(options.job)))))
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        root = Path(directory)
        with prefect_server(root / "prefect"):
            bench(root, int(options.size_bytes), options.repetitions)
        small_tensors(root / "small")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What publishing costs beside the codec.")
    parser.add_argument("--size-bytes", type=float, default=8e9, help="of the checkpoint")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dir", help="where the files may live")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def bench(root: Path, size_bytes: int, repetitions: int) -> None:
    served, mixed, vouched = root / "served", root / "mixed", root / "vouched"
    write_model(served, size_bytes)
    for side in SIDES:
        join_layers(served / side, mixed / side)
        lines_of = (f"{sha256_file(path)}  {path.name}\n" for path in shards_of(served / side))
        (served / side / DIGESTS_FILE).write_text("".join(lines_of))
    subprocess.run(["sync"], check=True)  # or the first fsync would wait for these
    target = served / "new"
    total = size_of(target)
    print(f"publishing {total / 1e9:.1f} GB in {FILES} files, of {repetitions} deltas each")
    lines: dict[Path, list[dict[str, Any]]] = {served: [], mixed: [], vouched: []}
    codec: list[dict[str, float]] = []
    sha256, sha256sum = [], []
    with replicas() as first, replicas() as second, replicas() as third:
        doors = dict(zip(lines, (first, second, third), strict=True))
        for version in range(1, repetitions + 3):  # a full, the first delta after it, the others
            for place, url in doors.items():
                source = mixed if place is mixed else served
                job = {"root": str(place), "source": str(source), "url": url, "version": version}
                job |= {"vouched": place is vouched}
                command = ["-m", "benchmarks.publish", "--job", json.dumps(job)]
                lines[place].append(json.loads(run([sys.executable, "-W", "ignore", *command])))
            if version > 2:
                codec.append(encode_alone(served, root / "delta"))
                sha256.append(seconds(lambda: [sha256_file(p) for p in shards_of(target)]))
                sha256sum.append(seconds(lambda: run(["sha256sum", *shards_of(target)])))
    ours, view, trusted = lines.values()
    assert [one["kind"] for one in ours] == ["FULL"] + ["DELTA"] * (repetitions + 1)
    assert [one["shard_bytes"] for one in ours] == [one["shard_bytes"] for one in view]
    print_stages("a full", ours[:1], total)
    print_stages("the first delta after it", ours[1:2], total)
    print_stages("a delta", ours[2:], total)
    print_stages("a delta through the view", view[2:], total)
    print_stages("a delta of a trainer that vouches", trusted[2:], total)
    alone, alone_cpu = (min(one[way] for one in codec) for way in ("wall", "cpu"))
    print(f"\nthe codec's encode alone: {alone:.2f} s, {alone_cpu:.2f} s of CPU")
    for name, made, bar in (("a delta", ours, TIMES_ENCODE), ("… vouched for", trusted, None)):
        wall, cpu = (min(one[way] for one in made[2:]) for way in ("wall", "cpu"))
        print_ratio(f"{name} to the codec's encode, seconds", wall / alone, bar)
        print_ratio("… CPU, Prefect's included", cpu / alone_cpu, None)
        print_ratio("… to `sha256sum` of the target", wall / min(sha256sum), TIMES_SHA256SUM)
        print_ratio("… to OpenSSL's SHA-256 of it, one core", wall / min(sha256), None)
    for way in ("wall", "cpu"):
        pairs = (one[way] / other[way] for one, other in zip(view[2:], ours[2:], strict=True))
        said = f"the view to the served layout, {way}, median of pairs"
        print_ratio(said, median(pairs), TIMES_SERVED_LAYOUT)
    peak = max(one["peak_bytes"] for one in (*ours, *view, *trusted)) / 2**20
    print_ratio("peak memory above start, MiB", peak, PEAK_MIB)


async def published(
    root: str, source: str, url: str, version: int, vouched: bool
) -> dict[str, Any]:
    """Publish one version in this process: seconds by stage, bytes read and written, memory."""
    from prefect import flow

    from flows.publish import publish_snapshot
    from hotload.clients.access import Access
    from hotload.clients.service import HotLoadClient
    from hotload.clients.store import Store, publisher_lease
    from hotload.concurrently import taking_turns
    from hotload.spec import CycleSpec
    from tasks.baseline import baseline_of, keep_baseline
    from tasks.plan import plan_snapshot
    from tasks.validate import validate_checkpoint

    place = Path(root)
    (place / "bucket").mkdir(parents=True, exist_ok=True)
    access = Access(
        base_url=url, api_key="bench", account_id="bench", model_id="m", deployment_id="fleet"
    )
    declared = {
        "checkpoint": str(Path(source) / SIDES[version % 2 == 0]),
        "run_id": "bench",
        "policy_version": version,
        **dict.fromkeys(("service", "store", "rollouts"), "bench"),
        "work_dir": str(place / "work"),
        "problems": {"dataset": str(place / "problems.jsonl")},
        "readiness": {"poll_interval_seconds": 0.05},
        "cadence": {"full_every": 128},
        "snapshot": {"trust_digests": vouched, "link_baseline": vouched},
    }
    spec = CycleSpec.model_validate(declared)
    store, service = Store(url=(place / "bucket").as_uri()), HotLoadClient(access)
    workspace = access.workspace(Path(spec.work_dir))

    @flow(name="publish")
    async def publish() -> dict[str, Any]:
        baseline = await baseline_of(spec, workspace, store)
        start_bytes, marks = memory("VmRSS"), [time.perf_counter()]
        counts, cpu = [transferred()], time.process_time()
        content = await validate_checkpoint(spec, [service], baseline.digests)
        marks.append(time.perf_counter())
        async with publisher_lease(store, "bench/fleet", spec.name) as lease:
            plan = await plan_snapshot(spec, service, baseline, content, lease)
            marks.append(time.perf_counter())
            with taking_turns():
                made = await publish_snapshot(spec, service, baseline, content, plan, lease, 1)
        taken = [marks[1] - marks[0], marks[2] - marks[1], made.seconds_by_stage["publish"]]
        counts.append(transferred())
        cpu = time.process_time() - cpu
        marks.append(time.perf_counter())
        await keep_baseline(baseline, plan.identity)
        counts.append(transferred())
        return {
            "kind": plan.kind.name,
            "stages": taken,
            "wall": sum(taken),
            "cpu": cpu,
            "keep": time.perf_counter() - marks[-1],
            "shard_bytes": made.size_bytes,
            "read": [counts[1][0] - counts[0][0], counts[2][0] - counts[1][0]],
            "written": [counts[1][1] - counts[0][1], counts[2][1] - counts[1][1]],
            "peak_bytes": memory("VmHWM") - start_bytes,
        }

    return await publish()


def transferred() -> tuple[int, int]:
    """Bytes that this process has read and written by calls, whatever kept them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    numbers = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return numbers["rchar"], numbers["wchar"]


@contextmanager
def replicas() -> Iterator[str]:
    """Serve the address of one replica that has loaded whatever was signalled last."""
    current: list[str] = [""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            replica = {"readiness": True, "current_snapshot_identity": current[0] or None}
            replica["loading_state"] = {"stage": "completed"}
            self._answer({"replicas": [replica]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            current[0] = json.loads(body)["identity"]
            self._answer({})

        def _answer(self, told: object) -> None:
            data = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def write_model(directory: Path, size_bytes: int) -> None:
    """Two checkpoints one step apart, one layer in each of the files."""
    (widest,) = (
        one for one in checkpoints.make("bf16, lr 1e-6") if one.name == "mlp.gate_proj.weight"
    )
    rows = max(1, size_bytes // FILES // 4 // (2 * widest.old.shape[1]))
    parts = []
    for number in range(4):
        sides = (tile(side, rows, number) for side in (widest.old, widest.new))
        parts.append(checkpoints.Change(f"mlp.part_{number}.weight", "BF16", *sides))
    checkpoints.write_checkpoints(directory, parts, layers=FILES)


def tile(bits: checkpoints.Bits, rows: int, number: int) -> checkpoints.Bits:
    """So many rows, by repeating those there are from the `number`th on."""
    import numpy as np

    return bits[(np.arange(rows) + number) % len(bits)]


def join_layers(served: Path, out: Path) -> None:
    """The same tensors with 8 layers a file and no spec, as `save_pretrained` writes them."""
    out.mkdir(parents=True)
    shards, weight_map = shards_of(served), {}
    groups = [shards[at : at + LAYERS_A_FILE] for at in range(0, len(shards), LAYERS_A_FILE)]
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        heads = [checkpoints.read_head(path) for path in group]
        entries, end = [], 0
        for tensor in (one for head in heads for one in head.tensors):
            start, end = end, end + tensor.size_bytes
            entries.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, start, end))
            weight_map[tensor.name] = file
        with open(out / file, "wb") as joined:
            joined.write(render_header(entries, {"format": "pt"}))
            for path, head in zip(group, heads, strict=True):
                with path.open("rb") as source:
                    source.seek(head.data_start)
                    shutil.copyfileobj(source, joined, 1 << 22)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / INDEX_FILE).write_text(json.dumps(index))
    shutil.copy(served / CONFIG_FILE, out)


def encode_alone(place: Path, out: Path) -> dict[str, float]:
    """The codec's own encode, two workers, in a process of its own."""
    paths = [str(path) for path in (place / "old", place / "new", out)]
    command = [sys.executable, "-m", "benchmarks.on_disk", "encode", "directory-2", *paths]
    told = json.loads(run(command))
    shutil.rmtree(out)
    return told


def small_tensors(place: Path) -> None:
    """Encode and check a checkpoint of very many very small tensors, in this process."""
    import numpy as np

    random = np.random.default_rng(0)
    old = random.integers(0, 1 << 16, TENSOR_SHAPE, np.uint16)
    new = old.copy()
    new[::7, ::13] ^= 1
    changes = [
        checkpoints.Change(f"mlp.experts.{number}.up_proj.weight", "BF16", old, new)
        for number in range(A_LAYER)
    ]
    checkpoints.write_checkpoints(place, changes, layers=TENSORS // A_LAYER)
    base, target, out = place / "old", place / "new", place / "delta"
    encode = cpu_seconds(lambda: encode_directory(base, target, out))
    check = cpu_seconds(lambda: check_full(read_checkpoint(target)))
    print(f"\n{TENSORS:,} tensors of {old.nbytes:,} bytes, microseconds of CPU a tensor")
    print_ratio("encode", encode / TENSORS * 1e6, ENCODE_MICROSECONDS)
    print_ratio("check", check / TENSORS * 1e6, CHECK_MICROSECONDS)


def print_stages(title: str, lines: list[dict[str, Any]], total: int) -> None:
    """Print medians of the stages, and bytes in units of the checkpoint."""
    wall, cpu = (median(one[way] for one in lines) for way in ("wall", "cpu"))
    print(f"\n{title}: {wall:.2f} s, {total / wall / 1e9:.2f} GB/s; {cpu:.2f} s of CPU")
    for number, stage in enumerate(STAGES):
        print(f"  {median(one['stages'][number] for one in lines):6.2f} s  {stage}")
    print(f"  {median(one['keep'] for one in lines):6.2f} s  keep the baseline, beside sampling")
    read, written = (
        [median(one[way][part] / total for one in lines) for part in (0, 1)]
        for way in ("read", "written")
    )
    print(f"  read {read[0]:.2f} + {read[1]:.2f}, written {written[0]:.2f} + {written[1]:.2f}")


def print_ratio(what: str, value: float, bar: float | None) -> None:
    said = f" (bar {bar})" if bar else ""
    print(f"{value:8.2f}  {what}{said}")


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def run(command: list[Any]) -> str:
    done = subprocess.run([*map(str, command)], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().splitlines()[-1]


if __name__ == "__main__":
    main()
