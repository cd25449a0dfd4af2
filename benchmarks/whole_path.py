"""CPU of a sample over the whole path: asked, parsed, scored, judged, written as Parquet.

500 problems of 8 samples with 128 tokens each and their log-probabilities, streamed by a stub
service in its own process, through the engine of the rollout flow without Prefect, into a store on
disk. Prints milliseconds of CPU for a sample, in turns, and then the five costs on top by a
profiler, with what otherwise runs in threads called in line so that the profiler sees it.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.client import stub
from benchmarks.fan_out import without_prefect
from benchmarks.profiles import print_costs
from benchmarks.stub_service import PROMPT
from hotload.spec import CycleSpec


class InLine(ThreadPoolExecutor):
    """Work runs where it is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - as an executor hands it on
            future.set_exception(error)
        return future


def spec_of(options: argparse.Namespace, dataset: Path, version: int) -> CycleSpec:
    """A cycle whose rollouts are all there is to it."""
    return CycleSpec.model_validate(
        {
            "checkpoint": str(dataset.parent),
            "work_dir": str(dataset.parent),
            "run_id": "bench",
            "policy_version": version,
            "problems": {"dataset": str(dataset)},
            "sampling": {
                "completions_per_prompt": options.samples,
                "max_completion_tokens": options.tokens,
                "concurrency": {"mode": "fixed", "initial_window": options.in_flight},
            },
            "reward": {"name": "contains"},
        }
    )


async def carry(spec: CycleSpec, url: str, root: Path, expected: int, *, in_line: bool) -> None:
    """Every sample of `spec`, from its request to its file."""
    if in_line:
        asyncio.get_running_loop().set_default_executor(InLine())
    summary = await without_prefect(spec, url, root)
    if summary.failed_samples or summary.sample_count != expected:
        raise SystemExit(f"{summary.sample_count} samples, failed: {summary.failed_samples}")


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--samples", type=int, default=8, help="per problem")
    parser.add_argument("--tokens", type=int, default=128, help="per sample")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--events-per-write", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--costs", type=int, default=5, help="lines of the profile")
    options = parser.parse_args()
    total = options.problems * options.samples
    form = ["--tokens", str(options.tokens), "--events-per-write", str(options.events_per_write)]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        dataset = root / "problems.jsonl"
        rows = ({"id": i, "prompt": PROMPT, "answer": "t7"} for i in range(options.problems))
        dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
        taken = []
        with stub(root, *form) as url:
            for version in range(options.turns):
                spec = spec_of(options, dataset, version)
                wall, cpu = time.perf_counter(), time.process_time()
                asyncio.run(carry(spec, url, root, total, in_line=False))
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                taken.append(1e3 * cpu / total)
                print(f"turn {version + 1}: {total / wall:6.0f} samples/s, {taken[-1]:.2f} ms CPU")
            spec = spec_of(options, dataset, options.turns)
            print_costs(
                lambda: asyncio.run(carry(spec, url, root, total, in_line=True)),
                total,
                options.costs,
            )
    print(
        f"\nwhole path, {total} samples of {options.tokens} tokens: "
        f"{statistics.median(taken):.2f} ms of CPU for a sample"
    )


if __name__ == "__main__":
    main()
