"""An inference server that answers byte for byte as a script says, and good bytes for it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from blocks.rollout_client import RolloutClient
from hotload.clients.inference.client import InferenceClient
from hotload.clients.inference.sampler import Sampler
from hotload.rollout.trajectory import Problem, Trajectory
from hotload.spec import Sampling

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


def http(
    body: bytes,
    status: int = 200,
    content_type: str = "text/event-stream",
    length: int | None = None,
    **headers: str,
) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}"]
    lines += [f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Script:
    """Answers the n-th request with the n-th reply, at last for ever; keeps what it was sent."""

    def __init__(self, *replies: bytes) -> None:
        self.replies = list(replies)
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.paths: list[str] = []
        self.port = 0
        self.on_request: Callable[[], Any] = lambda: None
        self._connections: set[asyncio.Task[None]] = set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.paths.append(head[0].split()[1])
        self.requests.append((headers, body))
        self.on_request()
        writer.write(self.replies[min(len(self.requests), len(self.replies)) - 1])
        await writer.drain()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Script"]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self
            await asyncio.gather(*self._connections)


class Naps:
    """Waits that take no time and are remembered."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


def block(port: int, **fields: Any) -> RolloutClient:
    names = {"account_id": "a", "model_id": "m", "deployment_id": "d", "api_key": KEY}
    return RolloutClient(**{"base_url": f"http://127.0.0.1:{port}", **names, **fields})


def client(port: int, **fields: Any) -> InferenceClient:
    return block(port, **fields).open()


PROBLEM = Problem("p1", prompt="the secret prompt", answer="ab")


@asynccontextmanager
async def sampling(
    *replies: bytes,
    naps: Naps | None = None,
    swap: float = 600,
    script: Script | None = None,
    **fields: Any,
) -> AsyncIterator[tuple[Sampler, Script]]:
    async with (
        (script or Script(*replies)).running() as script,
        client(script.port).session(
            Sampling(max_completion_tokens=8, **fields),
            identity=IDENTITY,
            policy_version=3,
            swap_timeout_seconds=swap,
            sleep=naps or Naps(),
        ) as sampler,
    ):
        yield sampler, script


async def sample_once(*replies: bytes, problem: Problem = PROBLEM, **fields: Any) -> Trajectory:
    async with sampling(*replies, **fields) as (sampler, _):
        return await sampler.sample(problem, 0)
