"""Rollout functions for tests: good ones, and every way to be none."""

import asyncio
from typing import Any

from blocks.conversation import Conversation
from hotload.trajectories import Problem, Segment, Trajectory


async def two_turns(problem: Problem, sampler: Conversation, question: str = "and?") -> Any:
    messages: list[dict[str, Any]] = [{"role": "user", "content": str(problem.prompt)}]
    turn = await sampler.sample(messages)
    messages += [turn.message, {"role": "user", "content": question}]
    await sampler.sample(messages, max_tokens=3)
    return sampler.trajectory()


async def own_segments(problem: Problem, sampler: Conversation) -> list[Segment]:
    turn = await sampler.sample("go")
    count = len(turn.token_ids)
    return [Segment(turn.prompt_token_ids, turn.token_ids, turn.sampling_logprobs, (True,) * count)]


async def by_problem(problem: Problem, sampler: Conversation) -> Any:
    """What the problem's `answer` says, after one good turn."""
    turn = await sampler.sample(str(problem.prompt))
    match problem.answer:
        case "none":
            return None
        case "raise":
            raise ValueError("a \ud800 surrogate")
        case "exit":
            raise SystemExit(3)
        case "cancel":
            raise asyncio.CancelledError
        case "hang":
            await asyncio.Event().wait()
        case "number":
            return 7
        case "uneven":
            return [Segment((1,), (2, 3), (-1.0,), (True, True))]
        case "nan":
            return [Segment((1,), (2,), (float("nan"),), (True,))]
        case "negative":
            return [Segment((-1,), (2,), (-1.0,), (True,))]
        case "half":
            made = sampler.trajectory()
            fields = {name: getattr(made, name) for name in made.__slots__}
            return Trajectory(**{**fields, "text": "half \ud800"})
        case "turn":
            await sampler.sample("hang please")
    assert turn.text
    return sampler.trajectory()


def not_async(problem: Problem, sampler: Conversation) -> None:
    return None
