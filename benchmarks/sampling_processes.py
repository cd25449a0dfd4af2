"""Sampling processes: the whole path in several processes against the same in one.

300 problems of 8 samples with 128 tokens each and their log-probabilities, streamed by a stub
service in its own process, sampled, scored and written into a store on disk, without Prefect; the
sides in turns, each once its processes have begun. Then two processes with an adaptive window
against a service that slows down tenfold for a while: how far apart they end. Bars: two processes
1.6 times one, where there are two cores for them; ends within 20 % of each other.
"""

import argparse
import asyncio
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.client import stub
from benchmarks.stub_service import PROMPT
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import share_parts
from hotload.sampling.part_carrier import Together
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.processes.coordinator import open_carrier
from hotload.sampling.rollout import SampledService
from hotload.spec import CycleSpec

BAR, FAIR_BAR = 1.6, 1.2
IDENTITY = "bench-000001-00000000"
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
LOGGER = logging.getLogger("benchmark")


def spec_of(
    options: argparse.Namespace, root: Path, version: int, count: int, window: dict[str, Any]
) -> CycleSpec:
    """A cycle whose rollouts are all there is to it."""
    return CycleSpec.model_validate(
        {
            "checkpoint": str(root),
            "work_dir": str(root),
            "run_id": "bench",
            "policy_version": version,
            "problems": {"dataset": str(root / "problems.jsonl")},
            "sampling": {
                "completions_per_prompt": options.samples,
                "max_completion_tokens": options.tokens,
                "problems_per_task": max(1, options.problems // 16),
                "processes": count,
                "concurrency": window,
            },
            "reward": {"name": "contains"},
        }
    )


async def sample(spec: CycleSpec, url: str, root: Path) -> dict[str, Any]:
    """Every sample of `spec`: seconds to begin and to sample, and when each process had ended."""
    client = InferenceClient(Access(base_url=url, api_key="bench", **NAMES))
    store = Store(url=(root / "bucket").as_uri())
    plan = await plan_rollouts(spec, IDENTITY)
    shares = share_parts(plan.parts, [1.0] * spec.sampling.processes)
    ends = [0.0 for _ in shares]
    asked_at = time.perf_counter()
    async with open_carrier(
        spec,
        plan,
        SampledService(client, IDENTITY),
        store,
        LOGGER,
        numbers=range(len(plan.parts)),
        together=Together(plan, store, LOGGER),
        service_count=1,
    ) as carrier:
        begun_at, cpu = time.perf_counter(), used()

        async def carry(number: int) -> None:
            await carrier.carry(number)
            share = next(n for n, share in enumerate(shares) if number in share)
            ends[share] = time.perf_counter() - begun_at

        await overlap(carry(part.number) for part in plan.parts)
        seconds, cpu = (
            time.perf_counter() - begun_at,
            [b - a for a, b in zip(cpu, used(), strict=True)],
        )
        summary = carrier.manifest(is_complete=True).summary
    if summary.failed_samples or summary.group_count != plan.problem_count:
        raise SystemExit(f"{summary.group_count} groups, failed: {summary.failed_samples}")
    start = begun_at - asked_at
    return {"start": start, "seconds": seconds, "cpu": cpu, "ends": ends, "summary": summary}


def used() -> tuple[float, float]:
    """CPU seconds of this process, and of those it samples in."""
    here = psutil.Process()
    others = [one for one in here.children() if "stub" not in str(one.cmdline())]
    mine, *theirs = (one.cpu_times() for one in (here, *others))
    return mine.user + mine.system, sum(one.user + one.system for one in theirs)


def compare(options: argparse.Namespace, url: str, root: Path) -> float:
    """Print the turns; the median of how many times faster several processes are than one."""
    total, gains = options.problems * options.samples, []
    window = {"mode": "fixed", "initial_window": options.in_flight}
    print("  turn  processes  samples/s  ms CPU here, there  s to begin")
    for turn in range(options.turns):
        rates = []
        for side, count in enumerate((1, options.processes)):
            spec = spec_of(options, root, 2 * turn + side, count, window)
            taken = asyncio.run(sample(spec, url, root))
            rates.append(total / taken["seconds"])
            here, there = (1e3 * one / total for one in taken["cpu"])
            print(
                f"{turn + 1:6}{count:11}{rates[-1]:11.0f}{here:14.2f}{there:8.2f}"
                f"{taken['start']:12.2f}",
                flush=True,
            )
        gains.append(rates[1] / rates[0])
    return statistics.median(gains)


def fairness(options: argparse.Namespace, root: Path) -> float:
    """Two processes in a bad time: how much later the last ends than the first."""
    form = ["--tokens", "16", "--events-per-write", "16", "--latency", "0.1"]
    with stub(root, *form, "--slow-at", "2", "--slow-for", "4") as url:
        spec = spec_of(options, root, 10**6, 2, {"initial_window": 64})
        taken = asyncio.run(sample(spec, url, root))
    trace = taken["summary"].window_trace
    attempts = taken["summary"].groups.attempts
    path = " → ".join(str(each) for each in (trace[0][1], min(p[1] for p in trace), trace[-1][1]))
    print(
        f"\na bad time: window {path}, {attempts // 32} adjustments; the processes ended after "
        + " and ".join(f"{end:.2f} s" for end in taken["ends"])
    )
    return max(taken["ends"]) / min(taken["ends"])


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--samples", type=int, default=8, help="per problem")
    parser.add_argument("--tokens", type=int, default=128, help="per sample")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}; stub, coordinator and processes share them"
    )
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        rows = ({"id": i, "prompt": PROMPT, "answer": "t7"} for i in range(options.problems))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "problems.jsonl").write_text(lines)
        with stub(root, "--tokens", str(options.tokens)) as url:
            gain = compare(options, url, root)
        apart = fairness(options, root)
    print(
        f"sampling processes, {options.problems} x {options.samples} samples of {options.tokens} "
        f"tokens: {options.processes} are {gain:.2f} times one (bar {BAR} for two on two cores); "
        f"two end within {apart:.2f} of each other (bar {FAIR_BAR})"
    )


if __name__ == "__main__":
    main()
