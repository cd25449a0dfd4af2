"""What an inference server may say, and samples by one that says it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from blocks.account import InferenceAccount
from blocks.rollout_client import RolloutClient
from hotload.clients.inference.client import InferenceClient
from hotload.clients.inference.sampler import Sampler
from hotload.options import Sampling
from hotload.rollout.trajectory import Problem, Trajectory
from tests.scripted_server import Reply, ScriptedServer, http

KEY = "sk-very-secret"
IDENTITY = "run-000003-0badf00d"
MODEL = f"accounts/a/models/m@{IDENTITY}"


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def token(number: int, text: str, model: str = MODEL, **extra: Any) -> bytes:
    entry = {
        "token": text,
        "token_id": number,
        "logprob": -0.25,
        "sampling_logprob": -0.5 - number,
        **extra,
    }
    return event(
        {"model": model, "choices": [{"index": 0, "text": text, "logprobs": {"content": [entry]}}]}
    )


def last(ids: list[int], model: str = MODEL, finish: str = "stop", **extra: Any) -> bytes:
    raw = {"completion_token_ids": ids, "prompt_token_ids": [7, 8]}
    choice = {"index": 0, "text": "", "finish_reason": finish, "raw_output": raw}
    usage = {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    metrics = {"prefill-queue-duration": "0.25", "backend-host": "replica-2"}
    return event(
        {"model": model, "choices": [choice], "usage": usage, "perf_metrics": metrics, **extra}
    )


DONE = b"data: [DONE]\n\n"
GOOD = token(1, "a") + token(2, "b") + last([1, 2]) + DONE


def saying(text: str, *models: str, finish: str = "stop") -> bytes:
    """A good answer, one token a character; from `models`, one after the other."""
    served = models or (MODEL,)
    pieces = [
        token(number, each, served[min(number, len(served) - 1)])
        for number, each in enumerate(text)
    ]
    return http(b"".join(pieces) + last(list(range(len(text))), served[-1], finish) + DONE)


NO_IDS = http(token(1, "a", token_id=None) + last([]) + DONE)  # fails for good, at once


class Naps:
    """Waits that take no time and are remembered."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


def block(port: int, **fields: Any) -> RolloutClient:
    names = {"account_id": "a", "model_id": "m", "deployment_id": "d", "api_key": KEY}
    own = {name: fields.pop(name) for name in RolloutClient.model_fields if name in fields}
    account = {"base_url": f"http://127.0.0.1:{port}", **names, **fields}
    return RolloutClient(account=InferenceAccount(**account), **own)


def client(port: int, **fields: Any) -> InferenceClient:
    return block(port, **fields).open()


PROBLEM = Problem("p1", prompt="the secret prompt", answer="ab")


@asynccontextmanager
async def sampling(
    *replies: Reply,
    naps: Callable[[float], Awaitable[None]] | None = None,
    swap: float = 600,
    **fields: Any,
) -> AsyncIterator[tuple[Sampler, ScriptedServer]]:
    async with (
        ScriptedServer(*replies).running() as script,
        client(script.port).session(
            Sampling(max_completion_tokens=8, **fields),
            identity=IDENTITY,
            policy_version=3,
            swap_timeout_seconds=swap,
            sleep=naps or Naps(),
        ) as sampler,
    ):
        yield sampler, script


async def sample_once(*replies: Reply, problem: Problem = PROBLEM, **fields: Any) -> Trajectory:
    async with sampling(*replies, **fields) as (sampler, _):
        return await sampler.sample(problem, 0)
