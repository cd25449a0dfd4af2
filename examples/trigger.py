"""A trainer's trigger: one cycle through the Prefect API, and what became of it.

    python -m examples.trigger cycle.yaml          # the first attempt
    python -m examples.trigger cycle.yaml --attempt 2

Repeating a trigger never makes a second cycle: the server answers a key it knows with the run it
knows. That run may have failed, so the state is read; after a failure the next attempt has the next
number. deployments/README.md shows the same with plain HTTP.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment

from flows.cycle_file import load_cycle_file
from hotload.spec import CycleSpec

DEPLOYMENT = "checkpoint-to-rollout/served"
POLL_SECONDS = 0.5


async def trigger(spec: CycleSpec, deployment: str, attempt: int) -> FlowRun:
    """The flow run of this cycle and attempt, in its final state.

    Raises:
        ValueError: this cycle and attempt was triggered before, as something else.
        prefect.exceptions.ObjectNotFound: there is no such deployment.
    """
    declared = spec.model_dump(mode="json")
    run = await arun_deployment(
        deployment,
        parameters={"spec": declared},
        idempotency_key=f"cycle/{deployment}/{spec.name}/{attempt}",
        timeout=None,
        poll_interval=POLL_SECONDS,
    )
    if run.parameters["spec"] != declared:
        raise ValueError(f"attempt {attempt} of {spec.name} was triggered with other parameters")
    return run


def main() -> int:
    """Trigger and wait; 0 when every replica serves the checkpoint and the groups are scored."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.trigger", description="Trigger a cycle and wait for its end."
    )
    parser.add_argument("cycle_file", type=Path)
    parser.add_argument("--deployment", default=DEPLOYMENT, help="default: %(default)s")
    parser.add_argument("--attempt", type=int, default=1, help="count up after a failure")
    given = parser.parse_args()

    async def triggered() -> FlowRun:
        return await trigger(
            await load_cycle_file(given.cycle_file), given.deployment, given.attempt
        )

    run = asyncio.run(triggered())
    assert run.state is not None
    print(f"{run.name} {run.id}: {run.state.name} {run.state.message or ''}".rstrip())
    return 0 if run.state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
