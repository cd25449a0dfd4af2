"""What one cycle costs beside its work: tiny weights, instant replicas, a running Prefect server.

Bar: at most 2 s beyond process start. Prints the median cycle and where its time went, read from
the Prefect server's own record of the run.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from examples.processes import emulator, prefect_server

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

                async def cycles() -> list[tuple[float, dict[str, float]]]:
                    await declare_blocks(service, bucket, NAMES)
                    taken = []
                    for version in range(1, CYCLES + 1):
                        spec = spec_of(root, checkpoints, version)
                        start = time.perf_counter()
                        await checkpoint_to_rollout(spec)
                        taken.append((time.perf_counter() - start, await breakdown(spec.name)))
                    return taken

                taken = asyncio.run(cycles())
    deltas = sorted(taken[1:], key=lambda one: one[0])
    median = statistics.median(seconds for seconds, _ in deltas)
    print(f"\none cycle, median of {len(deltas)} deltas: {median:.2f} s (bar {BAR_SECONDS:.0f} s)")
    print(f"first cycle (full): {taken[0][0]:.2f} s; importing everything: {imported:.2f} s")
    print("the median cycle's runs, as the server recorded them (subflows contain tasks):")
    for name, seconds in deltas[len(deltas) // 2][1].items():
        print(f"  {seconds:7.3f} s  {name}")


async def breakdown(flow_run_name: str) -> dict[str, float]:
    """Seconds of the flow runs and task runs below one cycle, by name, in order of their start."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    async with get_client() as client:
        (cycle,) = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name]))
        )
        return {cycle.name: cycle.total_run_time.total_seconds()}


if __name__ == "__main__":
    main()
