"""Peak memory, speed and ratio of encoding one large shard, beside the plain way to do it.

    python benchmarks/encode_memory.py [--dir DIR] [--size-gib 2] [--tensors 1]

Writes two bf16 shards into a temporary directory, below DIR if that is named (a little over twice
the size, removed at the end), then runs each encoder in a process of its own. fp32 master weights,
N(0, 0.03), take one Adam-like step of `--step` and are rounded to bf16 before and after it; at the
default about 1 % of the elements change.

plain    what peers do: both tensors whole in memory, one vectorised XOR, one zstd level 1 frame,
         zlib's Adler-32, the file written by the safetensors library. No SHA-256.
hotload  `hotload.local.encode_file`: also takes the SHA-256 of base, target and delta, in a second
         thread, and makes the file durable.

Peak memory is VmHWM at the end minus VmRSS before the first shard is opened (Linux). The shards are
in the page cache as far as it holds them; the faster of two runs counts. Ratios are exact for a
seed; speeds depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

COLUMNS = 4096
PIECE_ELEMENTS = 1 << 22
RUNS = 2  # the first pays for pages the system has not handed out yet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where the shards may live; else the system's own")
    parser.add_argument("--size-gib", type=float, default=2.0, help="size of one shard")
    parser.add_argument("--tensors", type=int, default=1, help="tensors it is split into")
    parser.add_argument("--step", type=float, default=5e-7, help="learning rate of the one step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="encode-memory-") as directory:
        rows = int(arguments.size_gib * 2**30) // 2 // COLUMNS // arguments.tensors
        settings = [rows, arguments.tensors, arguments.step, arguments.seed]
        made = child("generate", directory, *settings)
        share = 100 * made["changed"] / made["elements"]
        print(
            f"{arguments.size_gib:g} GiB bf16, {arguments.tensors} tensor(s), "
            f"{share:.2f} % of the elements changed, seed {arguments.seed}"
        )
        print(
            f"{'':8}{'peak memory':>14}{'wall':>9}{'wall':>12}{'CPU':>12}{'delta':>12}{'ratio':>8}"
        )
        for encoder in ("plain", "hotload"):
            print(line(encoder, child(encoder, directory)))
        child("check", directory)
        print("both deltas restore the target bit for bit")


def child(job: str, directory: str, *settings: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", job, directory, *map(str, settings)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(finished.stdout)


def line(encoder: str, told: dict[str, float]) -> str:
    size = told["size_bytes"]
    return (
        f"{encoder:8}{told['peak_bytes'] / 2**20:>10.0f} MiB{told['wall']:>7.2f} s"
        f"{size / told['wall'] / 1e9:>7.2f} GB/s{size / told['cpu'] / 1e9:>7.2f} GB/s"
        f"{told['delta_bytes'] / 2**20:>8.1f} MiB{size / told['delta_bytes']:>8.1f}"
    )


def generate(directory: Path, rows: str, tensors: str, step: str, seed: str) -> dict[str, float]:
    """Stream the two shards to disk; the count of changed elements."""
    from hotload.shards import TensorInfo, render_header

    generator = np.random.default_rng(int(seed))
    shape, size = (int(rows), COLUMNS), int(rows) * COLUMNS * 2
    entries = [
        TensorInfo(f"model.layers.0.part_{i}.weight", "BF16", shape, i * size, (i + 1) * size)
        for i in range(int(tensors))
    ]
    head = render_header(entries, {"format": "pt"})
    changed, left = 0, len(entries) * int(rows) * COLUMNS
    elements = left
    with (
        open(directory / "base.safetensors", "wb") as base,
        open(directory / "target.safetensors", "wb") as target,
    ):
        base.write(head)
        target.write(head)
        while left:
            count = min(PIECE_ELEMENTS, left)
            master = generator.standard_normal(count, np.float32) * np.float32(0.03)
            before = bfloat16(master)
            # Adam's normalised step: of the size of the learning rate, in either direction.
            master += np.float32(step) * generator.standard_normal(count, np.float32).clip(-1, 1)
            after = bfloat16(master)
            changed += int(np.count_nonzero(before != after))
            base.write(before)
            target.write(after)
            left -= count
    return {"changed": changed, "elements": elements}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of fp32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    return (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype(np.uint16)


def hotload(directory: Path) -> dict[str, float]:
    from hotload.local import encode_file

    names = ("base.safetensors", "target.safetensors", "hotload.safetensors")
    base, target, delta = (directory / name for name in names)
    return measured(lambda: encode_file(base, target, delta), target, delta)


def plain(directory: Path) -> dict[str, float]:
    import zstandard
    from safetensors.numpy import save_file

    names = ("base.safetensors", "target.safetensors", "plain.safetensors")
    base, target, delta = (directory / name for name in names)

    def encode() -> None:
        header, start = raw_header(base)
        payloads, checksums = {}, {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            old = np.fromfile(base, np.uint8, end - first, offset=start + first)
            new = np.fromfile(target, np.uint8, end - first, offset=start + first)
            frame = zstandard.ZstdCompressor(level=1).compress(np.bitwise_xor(old, new).data)
            payloads[name] = np.frombuffer(frame, np.uint8)
            checksums[name] = str(zlib.adler32(new.data))
        save_file(payloads, delta, checksums)

    return measured(encode, target, delta)


def raw_header(path: Path) -> tuple[dict, int]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def check(directory: Path) -> dict[str, float]:
    from hotload.local import verify_file

    for encoder in ("plain", "hotload"):
        verify_file(
            directory / "base.safetensors",
            directory / f"{encoder}.safetensors",
            directory / "target.safetensors",
        )
    return {}


def measured(encode: Callable[[], object], target: Path, delta: Path) -> dict[str, float]:
    """Peak memory over both runs and the times of the faster one."""
    start_bytes = memory("VmRSS")
    times = []
    for _ in range(RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        encode()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = min(times)
    return {
        "peak_bytes": memory("VmHWM") - start_bytes,
        "wall": wall,
        "cpu": cpu,
        "size_bytes": target.stat().st_size,
        "delta_bytes": delta.stat().st_size,
    }


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status; unlike ru_maxrss it does not remember the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{field}:"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        jobs = {job.__name__: job for job in (generate, plain, hotload, check)}
        print(json.dumps(jobs[sys.argv[2]](Path(sys.argv[3]), *sys.argv[4:])))
    else:
        main()
