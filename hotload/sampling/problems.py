"""Read problems: what a cycle samples, planned before anything is sampled."""

import asyncio
from pathlib import Path

from hotload.dataset.rollout_plan import RolloutPlan, plan_rollout
from hotload.errors import InvalidProblemsError
from hotload.rollout.trajectory import DATASET_LIMIT_BYTES, Problem, parse_problems
from hotload.spec import CycleSpec


def read_problems(dataset: str) -> tuple[Problem, ...]:
    """Read the problems of a JSON-lines file on this machine.

    Raises:
        InvalidProblemsError: it cannot be read, is empty, or has a malformed row.
    """
    path = Path(dataset)
    try:
        if path.exists() and not path.is_file():
            raise InvalidProblemsError(dataset, 0, "is not a regular file")
        if path.stat().st_size > DATASET_LIMIT_BYTES:
            raise InvalidProblemsError(dataset, 0, f"larger than {DATASET_LIMIT_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise InvalidProblemsError(dataset, 0, f"cannot be read: {error.strerror}") from None
    return parse_problems(data, source=dataset)


async def plan_rollouts(spec: CycleSpec, identity: str) -> RolloutPlan:
    """Plan which problems this policy version samples under `identity`, and in which parts.

    Raises:
        InvalidProblemsError: as `read_problems`.
    """
    # Tens of seconds where the problems are many: meanwhile leases have to be renewed.
    return await asyncio.to_thread(_plan, spec, identity)


def _plan(spec: CycleSpec, identity: str) -> RolloutPlan:
    return plan_rollout(spec, identity, read_problems(spec.problems.dataset))
