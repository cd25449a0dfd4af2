"""A trainer's trigger: one cycle through the Prefect API, and what became of it.

    python -m examples.trigger cycle.yaml          # the first attempt
    python -m examples.trigger cycle.yaml --attempt 2

Repeating a trigger never makes a second cycle: the server answers a key it knows with the run it
knows. That run may have failed, so the state is read; after a failure the next attempt has the next
number. deployments/README.md shows the same with plain HTTP.
"""

import argparse
import sys
from pathlib import Path

from blocks import server_door
from flows.command_line import run_command
from flows.cycle_file import load_cycle_file
from hotload.clients.trigger import SERVED, publish
from hotload.spec import CycleSpec


def main() -> int:
    """Trigger and wait; exit codes as `run_command`, 1 also when the cycle failed."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.trigger", description="Trigger a cycle and wait for its end."
    )
    parser.add_argument("cycle_file", type=Path)
    parser.add_argument("--deployment", default=SERVED, help="default: %(default)s")
    parser.add_argument("--attempt", type=int, default=1, help="count up after a failure")
    given = parser.parse_args()

    def publish_loaded(spec: CycleSpec) -> int:
        api_url, authorization = server_door()
        run = publish(
            api_url,
            spec.model_dump(mode="json"),
            deployment=given.deployment,
            attempt=given.attempt,
            authorization=authorization,
        )
        print(f"{run.name} {run.id}: {run.state} {run.message}".rstrip())
        return 0 if run.is_completed else 1

    return run_command(load_cycle_file(given.cycle_file), publish_loaded)


if __name__ == "__main__":
    sys.exit(main())
