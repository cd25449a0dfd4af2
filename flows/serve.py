"""Serve: run on this machine, in processes forked from a warm one, what others ask for.

    python -m flows.serve                                   # the cycles that trainers trigger
    python -m flows.serve --node trainer-0 --work-dir DIR   # the shares that cycles have here

The first is the deployment checkpoint-to-rollout/served, one cycle at a time; the second
node/trainer-0, which a cycle's `placement` or `sampling.nodes` names (docs/nodes.md). Both until
Ctrl-C.

A worker starts a Python that imports everything anew for each run; that alone takes seconds. Every
run here has a process of its own, too: what it breaks or leaks ends with it.
"""

import argparse
import asyncio
import multiprocessing
import re
import sys
from multiprocessing import forkserver
from pathlib import Path

from prefect.exceptions import TerminationSignal
from prefect.runner import Runner

from blocks import require_server
from flows.carry import work_on_share
from flows.cycle import checkpoint_to_rollout
from hotload.errors import ServiceUnavailableError
from hotload.options import NODE_NAME

QUERY_SECONDS = 0.5


def fork_from_a_warm_process(module: str) -> None:
    """Let Prefect's runner fork its processes from one that has imported the flow, of `module`.

    Prefect asks for the start method `spawn`. Should it stop asking, runs start slower, no worse.
    The warm process has no threads of Python's, and no run is made in it.
    """
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload([module])
    multiprocessing.get_context = lambda method=None: warm  # type: ignore[assignment]
    forkserver.ensure_running()


async def serve_cycles() -> None:
    """Create or update the deployment `served`, and run what is triggered, one cycle at a time.

    Raises:
        ServiceUnavailableError: no Prefect server answers.
    """
    await require_server()
    fork_from_a_warm_process("flows.cycle")
    runner = Runner(name="hotload", query_seconds=QUERY_SECONDS, limit=1)
    await runner.aadd_flow(checkpoint_to_rollout, name="served", tags=["hotload"])
    await runner.start()


async def serve_node(name: str, work_dir: Path) -> None:
    """Create or update the deployment of a node, and do the work that cycles place on it.

    Raises:
        ServiceUnavailableError: no Prefect server answers.
    """
    await require_server()
    fork_from_a_warm_process("flows.carry")
    runner = Runner(name=name, query_seconds=QUERY_SECONDS)
    await runner.aadd_flow(
        work_on_share, name=name, tags=["hotload"], parameters={"work_dir": str(work_dir)}
    )
    print(f"node {name}: takes what cycles place on it; Ctrl-C ends it", flush=True)
    await runner.start()


def node_name(text: str) -> str:
    """Parse the name of a node."""
    if not re.fullmatch(NODE_NAME, text):
        raise argparse.ArgumentTypeError("expected letters, digits, `_` and `-`")
    return text


def main() -> int:
    """Serve until it is interrupted; 0 then, 1 if there is no Prefect server to begin with."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve",
        description="Run the cycles that trainers trigger; or, as a node, read, encode and upload "
        "the shards that cycles place on this machine, and sample parts of their rollouts.",
    )
    parser.add_argument("--node", type=node_name, help="its name, as in a cycle's declaration")
    parser.add_argument("--work-dir", type=Path, help="of the node, on this machine's own disk")
    given = parser.parse_args()
    if (given.node is None) != (given.work_dir is None):
        parser.error("--node and --work-dir go together")
    node = given.node and serve_node(given.node, given.work_dir.resolve())
    try:
        asyncio.run(node or serve_cycles())
    except ServiceUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, TerminationSignal):
        print("stopped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
