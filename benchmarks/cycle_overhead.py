"""What one cycle costs beside its work: tiny weights, instant replicas, a running Prefect server.

Bar: at most 2 s beyond process start. Prints the median cycle and where its time went.
"""

import asyncio
import tempfile
import time
from pathlib import Path

from examples.processes import emulator, prefect_server
from hotload.report.cycle_report import CycleReport
from hotload.spec import RewardSpec

CYCLES = 6
BAR_SECONDS = 2.0
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--engine", "stub"]
FLEET += ["--account", "bench", "--model", "tiny", "--deployment", "fleet"]


def main() -> None:
    """Run the benchmark and print its table."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        with prefect_server(root / "prefect"):
            began = time.perf_counter()
            from examples.five_cycles import declare_blocks, spec_of, write_checkpoints
            from flows.cycle import checkpoint_to_rollout

            imported = time.perf_counter() - began
            checkpoints = write_checkpoints(root / "checkpoints", CYCLES)
            bucket = (root / "bucket").as_uri()
            with emulator(bucket, checkpoints[0], root / "emulator.log", FLEET) as service:

                async def cycles() -> list[tuple[float, CycleReport]]:
                    await declare_blocks(service, bucket, NAMES)
                    taken = []
                    for version in range(1, CYCLES + 1):
                        # A built-in reward: a user's own starts processes, which is its work.
                        spec = spec_of(root, checkpoints, version)
                        spec = spec.model_copy(update={"reward": RewardSpec()})
                        start = time.perf_counter()
                        report = await checkpoint_to_rollout(spec)
                        taken.append((time.perf_counter() - start, report))
                    return taken

                taken = asyncio.run(cycles())
    deltas = sorted(taken[1:], key=lambda one: one[0])
    seconds, report = deltas[len(deltas) // 2]
    print(f"one cycle, median of {len(deltas)} deltas: {seconds:.2f} s (bar {BAR_SECONDS:.0f} s)")
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
        "validate, plan, lease, subflow starts, artifacts, report": rest - report.rollouts.seconds,
    }
    for stage, took in rows.items():
        print(f"  {took:6.2f} s  {stage}")


if __name__ == "__main__":
    main()
