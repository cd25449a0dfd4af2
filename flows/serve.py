"""Serve: run the cycles that trainers trigger, at once, in processes forked from a warm one.

    python -m flows.serve        # the deployment checkpoint-to-rollout/served, until Ctrl-C

A worker starts a Python that imports everything anew for each cycle; that alone takes seconds.
Every cycle here has a process of its own, too: what a cycle breaks or leaks ends with it.
"""

import asyncio
import multiprocessing
import sys
from multiprocessing import forkserver

from prefect.exceptions import TerminationSignal
from prefect.runner import Runner

from flows.cycle import checkpoint_to_rollout

QUERY_SECONDS = 0.5


def fork_from_a_warm_process() -> None:
    """Let Prefect's runner fork its processes from one that has imported the flow.

    Prefect asks for the start method `spawn`. Should it stop asking, cycles start slower, no worse.
    The warm process has no threads of Python's, and no cycle runs in it.
    """
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(["flows.cycle"])
    multiprocessing.get_context = lambda method=None: warm  # type: ignore[assignment]
    forkserver.ensure_running()


async def serve_cycles() -> None:
    """Create or update the deployment `served`, and run what is triggered, one cycle at a time."""
    runner = Runner(name="hotload", query_seconds=QUERY_SECONDS, limit=1)
    await runner.aadd_flow(checkpoint_to_rollout, name="served", tags=["hotload"])
    await runner.start()


def main() -> int:
    """Serve until it is interrupted."""
    fork_from_a_warm_process()
    try:
        asyncio.run(serve_cycles())
    except (KeyboardInterrupt, TerminationSignal):
        print("stopped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
