"""Publishing tensors that a trainer holds, against the codec alone on the same tensors in memory.

    python -m benchmarks.ranks [--layers 10] [--turns 5]

A rank hands over so many shards of one layer, 100 MB each, of which 1 % of the elements changed:
checked, encoded on its copy of what is served, recorded, put into a store on disk to the last byte.
The codec encodes the same pairs: with the SHA-256 and the self-check that a cycle asks for, and
without. All by one thread a core, in turns, in one process: medians of wall seconds, which other
load moves, and of CPU seconds of all threads.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.in_memory import Buffer, opened
from hotload.checkpoint.safetensors import ShardHeader
from hotload.clients.publish import ShardPublisher, Store
from hotload.clients.publish.served_shard import ServedShard
from hotload.clients.store.records import write_manifest
from hotload.clock import utc_now
from hotload.delta.encode import encode_shard
from hotload.delta.ordered_threads import Workers
from hotload.identity import SnapshotKind
from hotload.publish.chain import plan_full
from hotload.publish.snapshot import CheckpointContent, ShardBatch, SnapshotManifest
from hotload.records import FileDigest

TITLE = "bf16, lr 1e-6"
Pair = tuple[Buffer, ShardHeader, Buffer, ShardHeader]


def record_served(store: Store, served: dict[str, ServedShard]) -> SnapshotManifest:
    """Record the shards as a full snapshot of version 0."""
    files = (
        FileDigest(file=file, size_bytes=one.header.size_bytes, sha256=one.sha256)
        for file, one in served.items()
    )
    content = CheckpointContent(kind=SnapshotKind.FULL, shards=tuple(files), side_files=())
    plan = plan_full(content, "bench", run_id="bench", policy_version=0)
    shards = ShardBatch.as_written(content.shards).shards
    manifest = SnapshotManifest.of(plan, content, shards, created_at=utc_now())
    asyncio.run(write_manifest(store, manifest))
    return manifest


def encode_all(pairs: list[Pair], pool: Workers, *, is_checked: bool) -> int:
    """Encode every pair; returns the bytes of the deltas."""
    size_bytes = 0
    for base, base_header, target, target_header in pairs:
        out = Buffer(base.data[:0].copy())
        out.data.resize(base.size_bytes // 4, refcheck=False)
        encode = partial(encode_shard, base, base_header, target, target_header, out, pool=pool)
        size_bytes += encode(with_sha256=is_checked, self_check=is_checked).size_bytes
    return size_bytes


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=10, help="shards of 100 MB")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="an eighth of the bytes")
    options = parser.parse_args()
    changes = checkpoints.make(TITLE, is_quick=options.quick)
    old, new = (checkpoints.image(changes, side) for side in ("old", "new"))
    tensors = [{one.name: one.new.copy() for one in changes} for _ in range(options.layers)]
    pairs = [(*opened(old.copy()), *opened(new.copy())) for _ in range(options.layers)]
    served = {
        f"layer-{n:02d}.safetensors": ServedShard(f"layer-{n:02d}.safetensors", old.copy())
        for n in range(options.layers)
    }
    versions = iter(range(1, 1000))
    with tempfile.TemporaryDirectory() as directory, Workers(os.cpu_count() or 1) as pool:
        store = Store(Path(directory).as_uri())
        first = record_served(store, served)

        def put_all() -> int:
            rank = ShardPublisher(
                store, "bench", next(versions), 0, 1, served, previous=first.identity
            )
            with rank as publisher:
                pairs = zip(publisher.share, tensors, strict=True)
                return sum(publisher.put(file, each).size_bytes for file, each in pairs)

        ways: dict[str, Callable[[], int]] = {
            "put by a rank": put_all,
            "codec, as a cycle encodes": partial(encode_all, pairs, pool, is_checked=True),
            "codec, bare": partial(encode_all, pairs, pool, is_checked=False),
        }
        taken: dict[str, list[tuple[float, float]]] = {title: [] for title in ways}
        for turn in range(options.turns + 1):  # the first one warms up
            for title, way in ways.items():
                began = time.perf_counter(), time.process_time()
                delta_bytes = way()
                ended = time.perf_counter(), time.process_time()
                if turn:
                    taken[title].append((ended[0] - began[0], ended[1] - began[1]))
    size_bytes = len(new) * options.layers
    changed = checkpoints.changed_percent(changes)
    print(
        f"{size_bytes / 1e9:.2f} GB of bf16 in {options.layers} shards, {changed:.2f} % changed, "
        f"delta {delta_bytes / 1e6:.1f} MB, {os.cpu_count()} cores"
    )
    middle = {
        title: [statistics.median(each) for each in zip(*times, strict=True)]
        for title, times in taken.items()
    }
    for title, (wall, cpu) in middle.items():
        print(f"{title:28} {wall:6.2f} s wall {cpu:6.2f} s CPU {size_bytes / wall / 1e9:6.2f} GB/s")
    shares = [
        codec / put
        for codec, put in zip(
            middle["codec, as a cycle encodes"], middle["put by a rank"], strict=True
        )
    ]
    print(
        f"of the codec's in-memory encode: {shares[0]:.2f} by wall (bar: at least 0.9), "
        f"{shares[1]:.2f} by CPU"
    )


if __name__ == "__main__":
    main()
