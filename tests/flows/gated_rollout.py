"""A rollout function that a test holds up, wherever it runs."""

import asyncio
from pathlib import Path

from hotload.clients.inference.conversation import Conversation
from hotload.rollout.trajectory import Problem, Trajectory
from tests.waiting import until


async def rollout(problem: Problem, sampler: Conversation, gate: str, free: int) -> Trajectory:
    """One turn; beyond the first `free` problems not before there is a file `gate`."""
    if int(problem.id) >= free:
        await until(lambda: asyncio.to_thread(Path(gate).exists), patience_seconds=600)
    await sampler.sample(problem.prompt)
    return sampler.trajectory()
