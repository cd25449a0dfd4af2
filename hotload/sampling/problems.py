"""Read problems: what a cycle samples, planned before anything is sampled."""

import asyncio
from collections.abc import Mapping
from typing import Any

from hotload.clients.store import Store
from hotload.dataset.rollout_plan import RolloutPlan, plan_rollout
from hotload.options import Problems
from hotload.rollout.problem_rows import parse_problems
from hotload.rollout.trajectory import Problem
from hotload.sampling.problem_files import read_rows
from hotload.spec import CycleSpec


def read_problems(
    dataset: str,
    options: Mapping[str, Any] | None = None,
    *,
    prompt_field: str | None = None,
    answer_field: str = "answer",
    max_rows: int | None = None,
) -> tuple[Problem, ...]:
    """Read the problems of a dataset, of which rows beyond `max_rows` are not looked at.

    Args:
        options: of fsspec's file system.

    Raises:
        InvalidProblemsError: it cannot be read, is empty, or has a malformed row.
        StoreUnavailableError: the network, or the store, is away.
    """
    return parse_problems(
        read_rows(dataset, options or {}),
        source=dataset,
        prompt_field=prompt_field,
        answer_field=answer_field,
        max_rows=max_rows,
    )


async def read_declared(problems: Problems, store: Store | None) -> tuple[Problem, ...]:
    """Read the problems that a cycle declares. What lies in the store's own bucket is opened with
    the options of the store's block, anything else as the environment says.

    Raises:
        InvalidProblemsError, StoreUnavailableError: as `read_problems`.
    """
    options = {} if store is None else store.options_for(problems.dataset)
    # Tens of seconds where the problems are many: meanwhile leases have to be renewed.
    return await asyncio.to_thread(
        read_problems,
        problems.dataset,
        options,
        prompt_field=problems.prompt_field,
        answer_field=problems.answer_field,
        max_rows=problems.max_rows,
    )


async def plan_rollouts(spec: CycleSpec, identity: str, store: Store | None = None) -> RolloutPlan:
    """Plan which problems this policy version samples under `identity`, and in which parts.

    Raises:
        InvalidProblemsError, StoreUnavailableError: as `read_problems`.
    """
    problems = await read_declared(spec.to_sample, store)
    return await asyncio.to_thread(plan_rollout, spec, identity, problems)
