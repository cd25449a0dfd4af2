"""The codec against what others do: ratio, speed, memory, and the bars it has to meet.

    python -m benchmarks.codec [--witness PYTHON] [--dir DIR] [--write] [--quick]

Every measurement runs in a process of its own; what is compared with one another is measured in
turn, and only ratios within one run count. `--witness` names an interpreter that has torch and the
vendor's package; rows that need them are left out where it has not. `--dir` says where the files
may live (25 GB; removed at the end). `--write` puts what is printed into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, report
from benchmarks.in_memory import PLAIN
from benchmarks.report import Disk, Memory, Results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SHARD = "bf16, lr 1e-6"  # the data of everything on disk
OURS = ["hotload, sequences", "hotload, zstd 1"]
VENDOR = "vendor's package"


class Bench:
    """One run: its settings, its directory, and the processes that measure."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.directory, self.seed, self.is_quick = directory, options.seed, options.quick
        self.repetitions = options.repetitions
        self._witness = os.path.abspath(shutil.which(options.witness) or options.witness)
        self.has_torch = self._can_import("torch")
        self.has_vendor = self._can_import("torch, fireworks_delta_compression")
        self.shard_bytes = 1 << 25 if self.is_quick else 1 << 30
        self.large_bytes = 1 << 25 if self.is_quick else 5_000_000_000
        self.layers = 2 if self.is_quick else 12
        self.layer = checkpoints.make(SHARD, seed=self.seed, is_quick=self.is_quick)
        self.widest = max(self.layer, key=lambda one: one.old.nbytes)

    def in_memory(self, data: str, ways: list[str], *, is_witness: bool = False) -> dict[str, Any]:
        told = ["--seed", self.seed, "--repetitions", self.repetitions]
        told += ["--quick"] if self.is_quick else []
        return self._child("benchmarks.in_memory", data, *ways, *told, is_witness=is_witness)

    def on_disk(self, job: str, way: str, *paths: Path) -> dict[str, Any]:
        return self._child("benchmarks.on_disk", job, way, *paths, is_witness=way == "vendor")

    def trained(self) -> dict[str, Path]:
        """Directories of the trained model's pairs by title; made once for a seed, then kept."""
        if self.is_quick or not self.has_torch:
            return {}
        version = zlib.crc32(Path(ROOT, "benchmarks", "training.py").read_bytes())
        kept = Path(tempfile.gettempdir()) / f"hotload-trained-{self.seed}-{version:08x}"
        say(f"the trained model, kept in {kept}")
        subprocess.run(
            [self._witness, "-m", "benchmarks.training", kept, "--seed", str(self.seed)],
            cwd=ROOT,
            check=True,
            stdout=sys.stderr,
        )
        return {f"trained GPT, lr {path.name}": path for path in sorted(kept.iterdir())}

    def _child(self, module: str, *told: object, is_witness: bool) -> dict[str, Any]:
        python = self._witness if is_witness else sys.executable
        command = [python, "-W", "ignore", "-m", module, *map(str, told)]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    def _can_import(self, names: str) -> bool:
        command = [self._witness, "-c", f"import {names}"]
        try:
            return not subprocess.run(command, stderr=subprocess.DEVNULL).returncode
        except FileNotFoundError:
            return False


def say(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


def speeds(bench: Bench) -> list[Memory]:
    """Every data set by every way, in memory."""
    rows = []
    titles = report.BAR_DATA[:1] if bench.is_quick else checkpoints.RECIPES
    data: dict[str, str] = {title: title for title in titles}
    data |= {title: str(path) for title, path in bench.trained().items()}
    for title, source in data.items():
        say(title)
        found = [bench.in_memory(source, [PLAIN, *OURS, "index + value"])]
        if bench.has_vendor:
            found.append(bench.in_memory(source, [PLAIN, VENDOR], is_witness=True))
        for told in found:
            plain = told["ways"][PLAIN]
            rows += [
                Memory(title, told["changed_percent"], told["size_bytes"], way, taken, plain)
                for way, taken in told["ways"].items()
                if way != PLAIN or told is found[0]
            ]
    return rows


def shards(bench: Bench) -> list[Disk]:
    """One shard from file to file, by every way."""
    say(f"one shard of {bench.shard_bytes / 1e9:.1f} GB on disk")
    place = bench.directory / "shard"
    file = "model.safetensors"
    checkpoints.write_large_shard(place, file, bench.widest, size_bytes=bench.shard_bytes)
    os.sync()  # or the first fsync of a job would wait for these
    base, target = place / "old" / file, place / "new" / file
    ways = ["plain", "hotload-1", "hotload-2", "sparse"] + ["vendor"] * bench.has_vendor
    rows = {way: Disk(way, target.stat().st_size) for way in ways}
    for _ in range(bench.repetitions):
        for way, row in rows.items():
            delta, out = place / f"{way}.safetensors", place / "restored.safetensors"
            row.encode.append(bench.on_disk("encode", way, base, target, delta))
            row.apply.append(bench.on_disk("apply", way, base, delta, out))
            if way.startswith("hotload"):
                row.verify.append(bench.on_disk("verify", way, base, delta, target))
            if not row.delta_bytes and not filecmp.cmp(out, target, shallow=False):
                raise SystemExit(f"{way} restored another file")
            row.delta_bytes = delta.stat().st_size
            out.unlink()
    shutil.rmtree(place)
    return list(rows.values())


def large(bench: Bench) -> Disk:
    """The shard whose memory has a bar: two workers, once."""
    say(f"one shard of {bench.large_bytes / 1e9:.1f} GB on disk")
    place = bench.directory / "large"
    file = "model.safetensors"
    checkpoints.write_large_shard(place, file, bench.widest, size_bytes=bench.large_bytes)
    os.sync()  # or the first fsync of a job would wait for these
    base, target, delta = place / "old" / file, place / "new" / file, place / "delta.safetensors"
    row = Disk("hotload-2", target.stat().st_size)
    row.encode.append(bench.on_disk("encode", "hotload-2", base, target, delta))
    row.delta_bytes = delta.stat().st_size
    row.apply.append(bench.on_disk("apply", "hotload-2", base, delta, place / "out.safetensors"))
    row.verify.append(bench.on_disk("verify", "hotload-2", base, delta, target))
    shutil.rmtree(place)
    return row


def directories(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """A checkpoint directory: each job's repetitions, and bytes of what it wrote."""
    place = bench.directory / "checkpoints"
    checkpoints.write_checkpoints(place, bench.layer, layers=bench.layers)
    os.sync()  # or the first fsync of a job would wait for these
    base, target, delta, still = (place / name for name in ("old", "new", "delta", "still"))
    files = [path for side in (base, target) for path in sorted(side.iterdir())]
    out = place / "out"
    say(f"a checkpoint directory of {size_of(target) / 1e9:.1f} GB")
    told: dict[str, list[dict[str, Any]]] = {}

    def run(title: str, job: str, way: str, *paths: Path) -> None:
        result = bench.on_disk(job, way, *paths)
        if job != "verify":
            result["bytes"] = size_of(out)
            shutil.rmtree(out)
        told.setdefault(title, []).append(result)

    bench.on_disk("encode", "directory-1", base, target, delta)
    bench.on_disk("encode", "directory-1", base, base, still)
    for _ in range(bench.repetitions):
        run("encode, 1 worker", "encode", "directory-1", base, target, out)
        run("encode, 2 workers", "encode", "directory-2", base, target, out)
        told.setdefault("cat of both to one file", []).append(cat(files, place / "one"))
        run("apply, 1 worker", "apply", "directory-1", base, delta, out)
        run("apply, 2 workers", "apply", "directory-2", base, delta, out)
        run("verify, 2 workers", "verify", "directory-2", base, delta, target)
        run("convert for slime", "convert", "directory-1", delta, out)
        run("encode, nothing changed", "encode", "directory-2", base, base, out)
        run("apply, nothing changed", "apply", "directory-2", base, still, out)
    told["calls of a zstd decoder"] = [
        bench.on_disk("count", "directory-1", base, delta, place / "a"),
        bench.on_disk("count", "directory-1", base, still, place / "b"),
    ]
    for path in sorted(target.glob("*.safetensors")):
        if not filecmp.cmp(path, place / "a" / path.name, shallow=False):
            raise SystemExit(f"another {path.name} restored")
    told["checkpoint"] = [{"bytes": size_of(target), "tensors": len(bench.layer) * bench.layers}]
    shutil.rmtree(place)
    return told


def cat(files: list[Path], out: Path) -> dict[str, float]:
    with out.open("wb") as file:
        began = time.perf_counter()
        subprocess.run(["cat", *files], stdout=file, check=True)
        wall = time.perf_counter() - began
    size_bytes = out.stat().st_size
    out.unlink()
    return {"wall": wall, "bytes": size_bytes}


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--witness", default=sys.executable, help="a Python with torch")
    parser.add_argument("--dir", type=Path, help="where files may live; else the system's own")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small data: does it run at all?")
    parser.add_argument("--write", action="store_true", help="into benchmarks/RESULTS.md")
    options = parser.parse_args()
    began = time.perf_counter()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="hotload-bench-") as directory:
        bench = Bench(options, Path(directory))
        for has, what in ((bench.has_torch, "trained model"), (bench.has_vendor, VENDOR)):
            if not has:
                say(f"left out, since {options.witness} cannot import what it needs: {what}")
        results = Results(
            memory=speeds(bench),
            shards=shards(bench),
            large=large(bench),
            directories=directories(bench),
        )
    conditions = report.conditions(
        repetitions=options.repetitions,
        seed=options.seed,
        load=load,
        seconds=time.perf_counter() - began,
    )
    text = report.render(results, conditions, is_quick=options.quick)
    print(text)
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
