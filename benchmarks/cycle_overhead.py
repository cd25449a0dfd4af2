"""What one cycle costs beside its work: tiny weights, instant replicas, a running Prefect server.

    python -m benchmarks.cycle_overhead
    python -m benchmarks.cycle_overhead --database postgresql+asyncpg://user@127.0.0.1/prefect

Prints the median cycle, where its time went, and the calls that it makes to the server.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.counting_proxy import counting_proxy
from examples.processes import emulator, prefect_server
from hotload.options import RewardSpec
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec

CYCLES = 10
BAR_SECONDS, BAR_SECONDS_POSTGRESQL = 1.0, 0.9
BAR_CALLS = 20
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--engine", "stub"]
FLEET += ["--account", "bench", "--model", "tiny", "--deployment", "fleet"]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="What one cycle costs beside its work.")
    parser.add_argument("--database", help="the Prefect server's, with SQLAlchemy's async driver")
    database = parser.parse_args().database
    if database:
        os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        with prefect_server(root / "prefect") as api:
            began = time.perf_counter()
            from examples.five_cycles import declare_blocks, spec_of, write_checkpoints
            from flows.cycle import checkpoint_to_rollout

            imported = time.perf_counter() - began
            checkpoints = write_checkpoints(root / "checkpoints", CYCLES + 1)
            bucket = (root / "bucket").as_uri()

            def spec(version: int) -> CycleSpec:
                # A built-in reward: a user's own starts processes, which is its work.
                update: dict[str, Any] = {"reward": RewardSpec()}
                return spec_of(root, checkpoints, version).model_copy(update=update)

            with emulator(bucket, checkpoints[0], root / "emulator.log", FLEET) as service:

                async def cycles() -> list[tuple[float, Any]]:
                    await declare_blocks(service, bucket, NAMES)
                    taken = []
                    for version in range(1, CYCLES + 1):
                        start = time.perf_counter()
                        report = await checkpoint_to_rollout(spec(version))
                        taken.append((time.perf_counter() - start, report))
                    return taken

                taken = asyncio.run(cycles())
                calls = count_calls(api, root / "cycle.yaml", spec(CYCLES + 1))
    bar = BAR_SECONDS_POSTGRESQL if database else BAR_SECONDS
    print_times(taken, imported, bar)
    print(f"calls of one delta: {calls.total()} (bar {BAR_CALLS}), in a process of its own")
    for call, count in calls.most_common():
        print(f"  {count:6}    {call}")


def count_calls(api: str, file: Path, spec: CycleSpec) -> Counter[str]:
    """The calls of one cycle that is run from the shell."""
    import yaml

    file.write_text(yaml.safe_dump({"cycle": spec.model_dump(mode="json")}))
    with counting_proxy(api) as (address, calls):
        subprocess.run(
            [sys.executable, "-m", "flows", str(file)],
            env=os.environ | {"PREFECT_API_URL": f"{address}/api"},
            check=True,
            capture_output=True,
        )
    return Counter(calls)


def print_times(taken: list[tuple[float, CycleReport]], imported: float, bar: float) -> None:
    """Print the median delta and where its time went."""
    deltas = sorted(taken[1:], key=lambda one: one[0])
    seconds, report = deltas[len(deltas) // 2]
    span = f"{deltas[0][0]:.2f} to {deltas[-1][0]:.2f}"
    print(f"one cycle, median of {len(deltas)} deltas: {seconds:.2f} s ({span}; bar {bar} s)")
    print(f"first cycle (full): {taken[0][0]:.2f} s; importing everything: {imported:.2f} s")
    stages = report.snapshot.seconds_by_stage
    rest = seconds - stages["publish"] - stages["signal"] - stages["converge"]
    rows = {
        "encode, verify, upload": stages["publish"],
        "signal": stages["signal"],
        "converge (replicas load)": stages["converge"],
        f"rollouts ({report.rollouts.sample_count} samples, baseline beside them)": (
            report.rollouts.seconds
        ),
        "validate, plan, lease, flow run, artifact, report": rest - report.rollouts.seconds,
    }
    for stage, took in rows.items():
        print(f"  {took:6.2f} s  {stage}")


if __name__ == "__main__":
    main()
