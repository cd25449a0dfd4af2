"""Publishing a checkpoint that lies in a bucket, over reading the same bytes by ranged gets alone.

    python -m benchmarks.from_bucket                           # moto, slow as a distant bucket
    python -m tests.radosgw python -m benchmarks.from_bucket --layers 8   # Ceph, on these cores

Validate and upload of a full, validate and encode and upload of a delta, into a store on disk, as
the tasks do them, without Prefect. How many bytes that reads from the bucket is counted, and as
many are then read by gets of 4 MiB, eight at once, and thrown away. In turns; medians. Bar: at most
1.2 times the gets.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec.asyn import sync

from benchmarks import checkpoints
from hotload.checkpoint.rules import check_full, refuse_errors
from hotload.clients import remote_checkpoint
from hotload.clients.remote_checkpoint import RemoteCheckpoint
from hotload.clients.store import Store
from hotload.clients.store.store import open_filesystem
from hotload.directory.file_digests import FileDigests
from hotload.directory.relayout import CheckpointView, view_checkpoint
from hotload.directory.shards import encode_file
from tests.servers import BUCKET, LoopbackServer

BAR = 1.2
RANGE_BYTES, RANGES_AT_ONCE = 4 << 20, 8


@contextmanager
def bucket() -> Iterator[tuple[str, dict[str, Any]]]:
    """The store that the environment names, as `tests.radosgw` does, or moto's."""
    if url := os.environ.get("HOTLOAD_TEST_STORE_URL"):
        yield url, json.loads(os.environ["HOTLOAD_TEST_STORE_OPTIONS"])
        return
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
        server = LoopbackServer("moto", Path(directory), lambda port: [*command, str(port)])
        try:
            server.start()
            server.wait()
            options = {"endpoint_url": server.address, "key": "moto", "secret": "moto"}
            open_filesystem("s3", options).mkdir(BUCKET)
            yield f"s3://{BUCKET}", options
        finally:
            server.stop()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of what is read from the bucket."""
    sizes: list[int] = []
    read = remote_checkpoint._Connection.read

    def counting(connection: Any, path: str, version: str, start: int, size_bytes: int) -> bytes:
        sizes.append(size_bytes)
        return read(connection, path, version, start, size_bytes)

    remote_checkpoint._Connection.read = counting  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        remote_checkpoint._Connection.read = read  # type: ignore[method-assign]


def validate(place: RemoteCheckpoint, digests: FileDigests) -> CheckpointView:
    """Every rule, and every byte for its digest."""
    view = view_checkpoint(place)
    refuse_errors((*check_full(view.checkpoint), *view.check_heads()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(digests.of, [view.file(one.file) for one in view.checkpoint.shards]))
    return view


async def put(store: Store, files: Mapping[str, Any], digests: FileDigests) -> None:
    """As `tasks.upload` does: the digest is looked at after the upload."""

    async def one(name: str, file: Any) -> None:
        await store.put_file(file, f"{uuid4().hex}/{name}")
        await asyncio.to_thread(digests.of, file)

    await asyncio.gather(*(one(name, file) for name, file in files.items()))


def publish_full(place: RemoteCheckpoint, store: Store, base: Path, out: Path) -> None:
    del base, out
    digests = FileDigests()
    view = validate(place, digests)
    files = {one.file: view.file(one.file) for one in view.checkpoint.shards}
    asyncio.run(put(store, files, digests))


def publish_delta(place: RemoteCheckpoint, store: Store, base: Path, out: Path) -> None:
    digests = FileDigests()
    view = validate(place, digests)
    names = [one.file for one in view.checkpoint.shards]

    def encode(name: str) -> None:
        encode_file(base / name, view.file(name), out / name, self_check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(encode, names))
    asyncio.run(put(store, {name: out / name for name in names}, digests))


def timed(work: Callable[..., object], *args: Any) -> tuple[float, float]:
    """Seconds of wall and of CPU."""
    began, used = time.perf_counter(), time.process_time()
    work(*args)
    return time.perf_counter() - began, time.process_time() - used


def gets_alone(url: str, options: Mapping[str, Any], size_bytes: int) -> None:
    """Read so many bytes of what lies below a URL, again and again."""
    filesystem = open_filesystem("s3", options)
    root = filesystem._strip_protocol(url)
    ranges = [
        (info["name"], start, min(start + RANGE_BYTES, info["size"]))
        for info in filesystem.ls(root, detail=True)
        for start in range(0, info["size"], RANGE_BYTES)
    ]
    left = size_bytes
    todo = []
    for name, start, end in itertools.cycle(ranges):
        if left <= 0:
            break
        todo.append((name, start, end))
        left -= end - start

    async def read_all() -> None:
        gate = asyncio.Semaphore(RANGES_AT_ONCE)

        async def one(name: str, start: int, end: int) -> None:
            async with gate:
                await filesystem._cat_file(name, start=start, end=end)

        await asyncio.gather(*(one(*each) for each in todo))

    sync(filesystem.loop, read_all)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Publishing from a bucket, over ranged gets.")
    parser.add_argument("--layers", type=int, default=2, help="of 100 MB each (2)")
    parser.add_argument("--turns", type=int, default=3, help="of each way (3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, bucket() as (url, store_options):
        root = Path(directory)
        changes = checkpoints.make("bf16, lr 1e-6")
        checkpoints.write_checkpoints(root, changes, layers=options.layers)
        trainer = Store(f"{url}/{uuid4().hex}", store_options)

        async def fill() -> None:
            for path in sorted((root / "new").iterdir()):
                await trainer.put_file(path, f"new/{path.name}")

        asyncio.run(fill())
        place = RemoteCheckpoint(f"{trainer.url}/new", store_options)
        whole = sum(path.stat().st_size for path in (root / "new").iterdir())
        for name in ("bucket", "deltas"):
            (root / name).mkdir()
        store = Store(f"file://{root / 'bucket'}")
        print(f"{whole / 1e9:.2f} GB in {options.layers} shards, medians of {options.turns}")
        for way, publish in {"full": publish_full, "delta": publish_delta}.items():
            ours: list[tuple[float, float]] = []
            gets: list[tuple[float, float]] = []
            for _ in range(options.turns):
                with counted() as sizes:
                    ours.append(timed(publish, place, store, root / "old", root / "deltas"))
                gets.append(timed(gets_alone, place.url, store_options, sum(sizes)))
            (seconds, cpu), (alone, cpu_alone) = map(statistics.median_low, (ours, gets))
            print(
                f"  {way:5}  {seconds:6.2f} s, gets alone {alone:6.2f} s:"
                f" {seconds / alone:.2f} (bar {BAR}); CPU of this process {cpu:.2f} s and"
                f" {cpu_alone:.2f} s; the checkpoint was read {sum(sizes) / whole:.2f} times"
            )


if __name__ == "__main__":
    main()
