"""One job over files, in a process of its own, and what it took.

    python -m benchmarks.on_disk JOB WAY PATH…

encode WAY BASE TARGET DELTA · apply WAY BASE DELTA OUT · verify WAY BASE DELTA TARGET, where the
paths are files for a shard's ways and directories for `directory-1` and `directory-2` (workers);
convert directory-1 DELTA OUT. Prints JSON: wall and CPU seconds, and the peak of memory, VmHWM at
the end minus VmRSS before the first file is opened (Linux). count directory-1 BASE DELTA OUT
applies too, and tells how often a zstd decoder was called.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from safetensors.numpy import save_file

from benchmarks.checkpoints import read_head
from hotload.checkpoint.safetensors import TensorInfo

Job = Callable[..., object]


def take(path: Path, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
    """All bytes of a tensor."""
    offset = read_head(path).data_start + tensor.start
    return np.fromfile(path, np.uint8, tensor.size_bytes, offset=offset)


def plain_encode(base: Path, target: Path, delta: Path) -> None:
    """As `peers.Plain`, tensor by tensor, the file written by the safetensors library."""
    payloads, checksums = {}, {}
    for tensor in read_head(base).tensors:
        new = take(target, tensor)
        difference = np.bitwise_xor(take(base, tensor), new)
        frame = zstandard.ZstdCompressor(level=1).compress(difference.data)
        payloads[tensor.name] = np.frombuffer(frame, np.uint8)
        checksums[tensor.name] = str(zlib.adler32(new.data))
    save_file(payloads, delta, checksums)


def plain_apply(base: Path, delta: Path, out: Path) -> None:
    head = read_head(delta)
    with open(out, "wb") as file:
        file.write(first_bytes(base, read_head(base).data_start))
        for tensor in read_head(base).tensors:
            frame = take(delta, head.by_name[tensor.name])
            difference = zstandard.ZstdDecompressor().decompress(frame.data)
            new = np.bitwise_xor(take(base, tensor), np.frombuffer(difference, np.uint8))
            if str(zlib.adler32(new.data)) != head.metadata[tensor.name]:
                raise SystemExit(f"{tensor.name}: other bytes")
            file.write(new.data)


def sparse_encode(base: Path, target: Path, delta: Path) -> None:
    """As `peers.Sparse`: two tensors for each, of elements of 16 bits."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for tensor in read_head(base).tensors:
        old, new = take(base, tensor).view(np.uint16), take(target, tensor).view(np.uint16)
        index = np.flatnonzero(old != new).astype(np.int32)
        arrays |= {f"{tensor.name}.idx": index, f"{tensor.name}.val": new[index]}
    save_file(arrays, delta)


def sparse_apply(base: Path, delta: Path, out: Path) -> None:
    by_name = read_head(delta).by_name
    with open(out, "wb") as file:
        file.write(first_bytes(base, read_head(base).data_start))
        for tensor in read_head(base).tensors:
            values = take(base, tensor).view(np.uint16)
            index = take(delta, by_name[f"{tensor.name}.idx"]).view(np.int32)
            values[index] = take(delta, by_name[f"{tensor.name}.val"]).view(np.uint16)
            file.write(values.data)


def vendor_jobs() -> dict[str, Job]:
    """Whole files by its own functions; in place, so that applying begins with a copy."""
    import fireworks_delta_compression as package  # type: ignore[import-not-found]

    def encode(base: Path, target: Path, delta: Path) -> None:
        package.delta_compress_files_to_file(
            src=str(base), dst=str(target), diff_file=str(delta), compression_format="arc_v2"
        )

    def apply(base: Path, delta: Path, out: Path) -> None:
        shutil.copyfile(base, out)
        package.delta_decompress_inplace(
            base_path=str(out), diff_path=str(delta), compression_format="arc_v2"
        )

    return {"encode": encode, "apply": apply}


def first_bytes(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def hotload_jobs(workers: int) -> dict[str, Job]:
    """Shard to shard; SHA-256 of base, target and delta too, and durable files."""
    from hotload.delta.ordered_threads import Workers
    from hotload.directory.shards import apply_file, encode_file, verify_file

    def with_pool(job: Job) -> Job:
        if workers == 1:
            return job

        def run(*paths: Path) -> object:
            with Workers(workers) as pool:
                return job(*paths, pool=pool)

        return run

    jobs: dict[str, Job] = {
        "encode": encode_file,
        "apply": apply_file,
        "verify": verify_file,
    }
    return {name: with_pool(job) for name, job in jobs.items()}


def directory_jobs(workers: int) -> dict[str, Job]:
    from hotload.delta.dialects import Dialect, Lineage
    from hotload.directory import operations

    def encode(base: Path, target: Path, out: Path) -> None:
        operations.encode_directory(base, target, out, workers=workers)

    def apply(base: Path, delta: Path, out: Path) -> None:
        operations.apply_directory(base, delta, out, workers=workers)

    def verify(base: Path, delta: Path, target: Path) -> None:
        operations.verify_directory(base, delta, target, workers=workers)

    def convert(delta: Path, out: Path) -> None:
        lineage = Lineage("000002", "000001")
        operations.convert_directory(
            delta, out, dialect=Dialect.SLIME, lineage=lineage, workers=workers
        )

    return {"encode": encode, "apply": apply, "verify": verify, "convert": convert}


WAYS: dict[str, Callable[[], dict[str, Job]]] = {
    "plain": lambda: {"encode": plain_encode, "apply": plain_apply},
    "sparse": lambda: {"encode": sparse_encode, "apply": sparse_apply},
    "vendor": vendor_jobs,
    "hotload-1": lambda: hotload_jobs(1),
    "hotload-2": lambda: hotload_jobs(2),
    "directory-1": lambda: directory_jobs(1),
    "directory-2": lambda: directory_jobs(2),
}


def measured(job: Job, paths: list[Path]) -> dict[str, float]:
    """Run it once."""
    start_bytes = memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    job(*paths)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_bytes": memory("VmHWM") - start_bytes,
    }


def counted(job: Job, paths: list[Path]) -> dict[str, float]:
    """Run it once and count its calls of zstd decoders."""
    calls = 0

    def watch(frame: FrameType, event: str, called: Any) -> None:
        nonlocal calls
        if event == "c_call" and type(called.__self__).__name__.startswith("ZstdDecompress"):
            calls += 1

    threading.setprofile(watch)
    sys.setprofile(watch)
    job(*paths)
    sys.setprofile(None)
    return {"decoded": calls}


def memory(field: str, process: int | str = "self") -> int:
    """Bytes of a line of /proc/self/status; unlike ru_maxrss it does not remember the parent."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{field}:"))


if __name__ == "__main__":
    name, way, *given = sys.argv[1:]
    run = counted if name == "count" else measured
    job = WAYS[way]()["apply" if name == "count" else name]
    print(json.dumps(run(job, [Path(path) for path in given])))
