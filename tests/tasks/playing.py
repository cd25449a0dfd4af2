"""Rollout functions for tests: good ones, and every way to be none."""

import asyncio
import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from hotload.clients.inference.conversation import Conversation, TurnFailedError
from hotload.errors import ServiceRefusedError
from hotload.rollout.trajectory import Problem, Segment, Trajectory

KEY_VARIABLE = "judge_key"


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class UnusualError(BaseException):
    pass


def made_otherwise(sampler: Conversation, **changes: Any) -> Trajectory:
    return replace(sampler.trajectory(), **changes)


async def two_turns(problem: Problem, sampler: Conversation, question: str = "and?") -> Any:
    messages: list[dict[str, Any]] = [{"role": "user", "content": str(problem.prompt)}]
    turn = await sampler.sample(messages)
    messages += [turn.message, {"role": "user", "content": question}]
    await sampler.sample(messages, max_tokens=3)
    return sampler.trajectory()


async def undeterred(problem: Problem, sampler: Conversation) -> None:
    """Has no sample where it got no answer, and does not say why."""
    with suppress(TurnFailedError):
        await sampler.sample(str(problem.prompt))


async def one_turn(problem: Problem, sampler: Conversation) -> Trajectory:
    await sampler.sample(str(problem.prompt))
    return sampler.trajectory()


async def stubborn(problem: Problem, sampler: Conversation) -> Trajectory:
    """Does not let itself be cancelled."""
    while True:
        with suppress(asyncio.CancelledError):
            await sampler.sample(str(problem.prompt))


async def pausing(problem: Problem, sampler: Conversation, seconds: float) -> Trajectory:
    await sampler.sample(str(problem.prompt))
    await asyncio.sleep(seconds)
    await sampler.sample("go on")
    return sampler.trajectory()


async def own_segments(problem: Problem, sampler: Conversation) -> list[Segment]:
    turn = await sampler.sample("go")
    count = len(turn.token_ids)
    ids, logprobs = np.array(turn.token_ids), np.array(turn.sampling_logprobs)
    return [Segment(turn.prompt_token_ids, ids, logprobs, np.ones(count, bool))]  # type: ignore[arg-type]


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
        case "promptless":
            return [Segment((1,), (2,), (-1.0,), (True,)), Segment((), (3,), (-1.0,), (True,))]
        case "negative":
            return [Segment((-1,), (2,), (-1.0,), (True,))]
        case "half":
            return made_otherwise(sampler, text="half \ud800")
        case "halves":
            half = "\ud800"
            return made_otherwise(sampler, finish_reason=half, detail=half)
        case "routes":
            return [replace(one, routes=bytes(7)) for one in sampler.trajectory().segments]
        case "half a cause":
            return made_otherwise(sampler, failure="\ud800")
        case "unpicklable":

            class Text(str):
                pass

            return made_otherwise(sampler, transcript=({"role": "user", "content": Text("hi")},))
        case "not json":
            return made_otherwise(sampler, transcript=({"role": object()},))
        case "unprintable":
            raise UnprintableError
        case "own fault":
            raise TurnFailedError("mine")  # type: ignore[arg-type]
        case "own service":
            raise ServiceRefusedError("judge", 401, "no such key")
        case "sentence":
            return made_otherwise(sampler, failure="it did not go well at 12:31")
        case "unusual":
            raise UnusualError
        case "no segments":
            return []
        case "key":
            raise ValueError("x" * 180 + os.environ[KEY_VARIABLE])
        case "key told":
            return made_otherwise(sampler, failure="own", detail=os.environ[KEY_VARIABLE])
        case "turn":
            await sampler.sample("hang please")
    assert turn.text
    return sampler.trajectory()


def not_async(problem: Problem, sampler: Conversation) -> None:
    return None


async def dying(problem: Problem, sampler: Conversation) -> None:
    os._exit(3)
