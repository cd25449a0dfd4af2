"""What the codec's benchmark measured, as one page of Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Taken = list[dict[str, Any]]

OURS = "hotload, sequences"
# Bars are for tensors over 1 MiB with 1 to 3 % changed bf16 elements.
BAR_DATA = ("bf16, lr 1e-6", "bf16, lr 3e-6", "trained GPT, lr 1e-06", "trained GPT, lr 2e-06")
MIB = 1 << 20

TITLE = """\
# The codec, measured

Written by `make bench` (`python -m benchmarks.codec --write`); what was tried and dropped is in
[LOG.md](LOG.md). Every line restored its tensors bit for bit, or the run would have ended. Speeds
move with whatever else the machine does, by up to two times; **×** is the median of the ratios to
the plain way, each taken in one repetition of one process, and is what counts.
"""
MEMORY_NOTES = """\
## In memory, one thread

Speed is bytes of the new tensors per CPU second, in GB/s (10⁹). Encode is difference, frame and
checksum; decode is frame, difference and checksum, into memory that is there already. *XOR + zstd
1* is the plain way of peers: whole arrays in numpy, one frame of python-zstandard per tensor,
zlib's Adler-32. Ours reads its shards piece by piece and copies each piece, as from a file, which
the others are spared. *index + value* is int32 positions and new values, with neither checksum nor
compression. The vendor's package is compared with a plain way in its own process.
"""
SHARD_NOTES = """\
## One shard, from file to file

Files in the page cache; base and target read, delta written, and so back. Peak is memory above what
the process had before it opened the first file. Ours alone makes files durable (fsync) and takes
SHA-256 of what it reads and writes. `-2` has two workers.
"""
DIRECTORY_NOTES = """\
## A checkpoint directory

Wall time of one process, import left out, page cache warm; `cat` reads base and target as an
encode does, but writes all of it.
"""


@dataclass(frozen=True)
class Memory:
    """One way over one data set in memory, and the plain way beside it."""

    data: str
    changed_percent: float
    size_bytes: int
    way: str
    taken: dict[str, Any]
    plain: dict[str, Any]

    @property
    def gain(self) -> float:
        """How many times smaller than the plain way."""
        return self.plain["bytes"] / self.taken["bytes"]

    def speed(self, step: str, taken: dict[str, Any] | None = None) -> float:
        """GB of new tensors per CPU second; of this way unless another is given."""
        return median(self.size_bytes / seconds for seconds in (taken or self.taken)[step]) / 1e9

    def times(self, step: str) -> float:
        """How many times faster than the plain way."""
        pairs = zip(self.plain[step], self.taken[step], strict=True)
        return median(plain / ours for plain, ours in pairs)


@dataclass
class Disk:
    """One way over one shard on disk: each repetition of each job."""

    way: str
    size_bytes: int
    delta_bytes: int = 0
    encode: Taken = field(default_factory=list)
    apply: Taken = field(default_factory=list)
    verify: Taken = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """Everything one run measured."""

    memory: list[Memory]
    shards: list[Disk]
    large: Disk
    directories: dict[str, Taken]


@dataclass(frozen=True)
class Bar:
    """One bar, what was found, and whether that meets it."""

    what: str
    text: str
    found: float
    unit: str
    is_met: bool
    detail: str = ""


def bars(results: Results) -> list[Bar]:
    """The bars of the codec, in the order they were set."""
    ours = [one for one in results.memory if one.way == OURS and one.data in BAR_DATA]
    taken = results.directories

    def worst(what: str, of: Callable[[Memory], float], least: float) -> Bar:
        found = min(map(of, ours))
        detail = ", ".join(f"{one.data}: {of(one):.2f}" for one in ours)
        return Bar(what, f"≥ {least:g} ×", found, "×", found >= least, detail)

    two = ratio(taken["encode, 1 worker"], taken["encode, 2 workers"])
    cat = ratio(taken["encode, 2 workers"], taken["cat of both to one file"])
    convert = ratio(taken["encode, 2 workers"], taken["convert for slime"])
    large = results.large
    peak = max(map(peak_of, (large.encode, large.apply, large.verify))) / MIB
    (checkpoint,) = taken["checkpoint"]
    still = 100 * taken["encode, nothing changed"][0]["bytes"] / checkpoint["bytes"]
    changed, unchanged = (one["decoded"] for one in taken["calls of a zstd decoder"])
    size = f"{large.size_bytes / 1e9:.2g} GB; the largest of encode, apply, verify"
    return [
        worst("size against XOR + zstd 1", lambda one: one.gain, 1.45),
        worst("encode per core against the plain way", lambda one: one.times("encode"), 1.5),
        worst("decode + verify + apply per core", lambda one: one.times("decode"), 1.7),
        Bar("two workers against one, encode a directory", "≥ 1.7 ×", two, "×", two >= 1.7),
        Bar("peak memory, two workers", "≤ 128 MiB", peak, " MiB", peak <= 128, size),
        Bar("encode a directory against `cat`", "≤ 3 ×", cat, "×", cat <= 3, "two workers"),
        Bar("bytes of unchanged tensors", "< 0.01 %", still, " %", still < 0.01, "whole directory"),
        Bar(
            "calls of a zstd decoder where nothing changed",
            "0",
            unchanged,
            "",
            unchanged == 0,
            f"{changed} to apply a change",
        ),
        Bar("converting against encoding", "≥ 20 ×", convert, "×", convert >= 20, "two workers"),
    ]


def ratio(first: Taken, second: Taken) -> float:
    """Median of the ratios of wall times, repetition by repetition."""
    return median(a["wall"] / b["wall"] for a, b in zip(first, second, strict=True))


def peak_of(taken: Taken) -> float:
    return max(one["peak_bytes"] for one in taken)


def render(results: Results, conditions: Iterable[str], *, is_quick: bool) -> str:
    """The page."""
    parts = [TITLE]
    if is_quick:
        parts.append("**Quick: small data, which shows that it runs and nothing more.**\n")
    parts += ["## In short\n", table(("", "this codec", "beside"), short_rows(results))]
    parts += [
        "## Bars\n",
        table(("What", "Bar", "Found", "", "In detail"), map(bar_row, bars(results))),
    ]
    parts += ["## Conditions\n", "".join(f"- {line}\n" for line in conditions)]
    head = ("Data", "changed", "way", "ratio", "×", "encode GB/s", "×", "decode GB/s", "×")
    parts += [MEMORY_NOTES, table(head, map(memory_row, results.memory))]
    head = ("Way", "ratio", "encode, wall", "CPU", "peak", "apply, wall", "CPU", "peak", "verify")
    size = f"{results.shards[0].size_bytes / 1e9:.2f} GB, {BAR_DATA[0]}, one tensor of two fifths"
    parts += [SHARD_NOTES, f"{size}:\n", table(head, map(disk_row, results.shards))]
    size = f"{results.large.size_bytes / 1e9:.2f} GB, once:\n"
    parts += [size, table(head, [disk_row(results.large)])]
    parts += [DIRECTORY_NOTES, table(("Job", "wall", "GB/s", "written"), directory_rows(results))]
    return "\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def bar_row(bar: Bar) -> list[str]:
    found = f"{bar.found:.2g}" if 0 < bar.found < 0.1 else f"{bar.found:.4g}"
    verdict = "met" if bar.is_met else "**not met**"
    return [bar.what, bar.text, f"{found}{bar.unit}", verdict, bar.detail]


def short_rows(results: Results) -> Iterable[list[str]]:
    """What the README tells."""
    for data in (BAR_DATA[0], BAR_DATA[2]):
        for row in results.memory:
            if (row.data, row.way) == (data, OURS):
                ours, plain = (
                    row.size_bytes / row.taken["bytes"],
                    row.size_bytes / row.plain["bytes"],
                )
                what = f"delta of {data}, {row.changed_percent:.1f} % of the elements changed"
                yield [what, f"**1 : {ours:.0f}**", f"1 : {plain:.0f}, XOR + zstd-1 as peers do it"]
                for step, named in (
                    ("encode", "… encode a core: difference, frame, checksum"),
                    ("decode", "… decode, verify, apply a core"),
                ):
                    speed = f"**{row.times(step):.1f} ×**, {row.speed(step):.1f} GB/s"
                    yield [named, speed, f"1, {row.speed(step, row.plain):.1f} GB/s"]
    large, plain_way = results.large, results.shards[0]
    peak = f"**{peak_of(large.encode) / MIB:,.0f} MiB** above start"
    beside = f"{peak_of(plain_way.encode) / MIB:,.0f} MiB for {plain_way.size_bytes / 1e9:.1f} GB"
    yield [f"memory to encode a shard of {large.size_bytes / 1e9:.1f} GB, 2 workers", peak, beside]
    taken = results.directories
    size = f"{taken['checkpoint'][0]['bytes'] / 1e9:.1f} GB"
    wall = f"**{middle(taken['encode, 2 workers'], 'wall'):.2f} s**"
    beside = f"{middle(taken['cat of both to one file'], 'wall'):.2f} s, `cat` of both"
    yield [f"checkpoint directory of {size} end to end, 2 workers", wall, beside]


def memory_row(row: Memory) -> list[str]:
    ratio = row.size_bytes / row.taken["bytes"]
    cells = [row.data, f"{row.changed_percent:.2f} %", row.way, f"{ratio:.1f}", f"{row.gain:.2f}"]
    for step in ("encode", "decode"):
        cells += [f"{row.speed(step):.2f}", f"{row.times(step):.2f}"]
    return cells


def disk_row(row: Disk) -> list[str]:
    cells = [row.way, f"{row.size_bytes / row.delta_bytes:.1f}"]
    for taken in (row.encode, row.apply):
        cells += [f"{middle(taken, 'wall'):.2f} s", f"{middle(taken, 'cpu'):.2f} s"]
        cells.append(f"{peak_of(taken) / MIB:,.0f} MiB")
    return [*cells, f"{middle(row.verify, 'wall'):.2f} s" if row.verify else "–"]


def directory_rows(results: Results) -> Iterable[list[str]]:
    size_bytes = results.directories["checkpoint"][0]["bytes"]
    for job, taken in results.directories.items():
        if "wall" not in taken[0] or "decoded" in taken[0]:
            continue
        wall = middle(taken, "wall")
        written = taken[0].get("bytes")
        told = "–" if written is None else f"{written / MIB:,.2f} MiB"
        yield [job, f"{wall:.2f} s", f"{size_bytes / wall / 1e9:.2f}", told]


def middle(taken: Taken, of: str) -> float:
    return median(one[of] for one in taken)


def conditions(*, repetitions: int, seed: int, load: float, seconds: float) -> list[str]:
    """Machine, versions and settings, a line each."""
    from hotload.delta.checksums import ADLER32_SOURCE
    from hotload.delta.frame import FrameMethod, best_method, describe_method

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "zstandard")]
    today = datetime.datetime.now(datetime.UTC).date()
    return [
        f"{today}, {processor()}, {os.cpu_count()} cores, {memory_bytes / 2**30:.0f} GiB, "
        f"{platform.system()} {platform.release()}",
        f"{', '.join(versions)}; Adler-32 from {ADLER32_SOURCE}",
        f"frames: {describe_method(best_method())}, "
        f"and {describe_method(FrameMethod.LEVEL_ONE)} where it is absent",
        f"seed {seed}, median of {repetitions} repetitions in turn after one that warms up; "
        f"load average {load:.1f} at the start; {seconds / 60:.0f} minutes",
    ]


def processor() -> str:
    """Its name, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
