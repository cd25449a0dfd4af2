"""One attempt's answer, piece by piece and against the clock; and slots at the moment of a
cancellation."""

import asyncio
import zlib
from collections.abc import AsyncIterator

import pytest

from hotload.clients.inference.attempt import send_once
from hotload.clients.inference.request_slots import RequestSlots
from hotload.clients.inference.transport import HttpTransport
from hotload.options import Concurrency, Sampling
from hotload.rollout.completions_api import Answer
from hotload.rollout.engines.fireworks import FIREWORKS
from hotload.rollout.engines.vllm import VLLM
from hotload.rollout.failures import Action, Cause
from hotload.rollout.request import first_request
from hotload.rollout.window import Attempt, Window
from tests.blocks.scripted_inference import (
    GOOD,
    IDENTITY,
    MODEL,
    PROBLEM,
    client,
    event,
    sample_once,
    token,
)
from tests.scripted_server import JSON, Request, ScriptedServer, http
from tests.waiting import PATIENCE_SECONDS

PING = b"event: ping\ndata: {}\n\n"


class Pieces:
    """Writes the next of these pieces when the one before was read, with the time."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.wanted = asyncio.Semaphore(0)
        self.seconds = 0

    def monotonic(self) -> float:
        """A clock by which a second passes from one piece to the next."""
        self.wanted.release()
        self.seconds += 1
        return float(self.seconds)

    async def reply(self, _: Request) -> AsyncIterator[bytes]:
        yield http(b"", length=sum(map(len, self.pieces)))
        for piece in self.pieces:
            await self.wanted.acquire()
            yield piece


async def answered(
    monkeypatch: pytest.MonkeyPatch, *pieces: bytes, silence_seconds: float
) -> tuple[Answer, Cause | None]:
    clock = Pieces(*pieces)
    async with ScriptedServer(clock.reply).running() as server:
        monkeypatch.setattr("hotload.clients.inference.attempt.monotonic", clock.monotonic)
        origin = f"http://127.0.0.1:{server.port}"
        async with HttpTransport(
            origin, {}, connect_timeout_seconds=10, read_timeout_seconds=10, connections=1
        ) as transport:
            sampling = Sampling(sample_timeout=silence_seconds)
            request = first_request(
                PROBLEM, 0, sampling=sampling, identity=IDENTITY, policy_version=3
            )
            answer = Answer(sampling, None)
            fault = await send_once(transport, FIREWORKS, request, b"{}", answer)
        for _ in pieces:
            clock.wanted.release()
    return answer, fault and fault.cause


async def test_an_answer_may_take_long_as_long_as_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second passes with every piece, and three are the limit."""
    slow = [piece for _ in range(20) for piece in (token(1, "a"), PING, PING)]
    end = event({"model": MODEL, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    answer, cause = await answered(monkeypatch, *slow, end, silence_seconds=3)
    assert len(answer.sampling_logprobs) == 20
    assert cause is Cause.MISSING_TOKEN_IDS  # read to its end; its prompt was never told
    empty = event({"model": MODEL, "choices": []})
    for nothing in (PING, empty):
        pieces = [token(1, "a"), *[nothing] * 4, GOOD]
        _, cause = await answered(monkeypatch, *pieces, silence_seconds=3)
        assert cause is Cause.TIMEOUT


@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_that_comes_byte_by_byte_is_cut(status: int) -> None:
    """Its bytes never end, and no two of them are as far apart as the limit."""
    sampling = Sampling(sample_timeout=0.2)

    async def trickle(_: Request) -> AsyncIterator[bytes]:
        yield http(b"", status, JSON, length=1 << 20)
        while True:
            yield b" "
            await asyncio.sleep(sampling.sample_timeout / 20)

    async with ScriptedServer(trickle).running() as server, asyncio.timeout(PATIENCE_SECONDS):
        origin = f"http://127.0.0.1:{server.port}"
        async with HttpTransport(
            origin, {}, connect_timeout_seconds=10, read_timeout_seconds=10, connections=1
        ) as transport:
            request = first_request(
                PROBLEM, 0, sampling=sampling, identity=IDENTITY, policy_version=3
            )
            answer = Answer(sampling, None)
            failure = await send_once(transport, VLLM, request, b"{}", answer)
    assert failure is not None
    assert (failure.cause, failure.action) == (Cause.TIMEOUT, Action.RETRY)


async def test_headers_of_any_bytes_are_text_a_file_can_hold() -> None:
    reply = http(GOOD, x_request_id="id-?").replace(b"id-?", b"id-\xff")
    sample = await sample_once(reply)
    assert sample.provenance.response_id == "id-\xff"


async def test_nothing_is_sent_but_what_we_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cookie could send every session to one replica; a proxy could read the key."""
    for name, value in (("http_proxy", "http://127.0.0.1:1"), ("no_proxy", "")):
        monkeypatch.setenv(name, value)
        monkeypatch.delenv(name.upper(), raising=False)
    async with ScriptedServer(http(GOOD, set_cookie="replica=1; Path=/")).running() as script:
        # No jar keeps the cookie of a bare address.
        named = client(script.port, base_url=f"http://localhost:{script.port}")
        async with named.session(Sampling(), identity=IDENTITY, policy_version=3) as sampler:
            for number in range(2):
                assert (await sampler.sample(PROBLEM, number)).failure is None
    first, second = ({*request.headers} for request in script.requests)
    assert first == second
    assert "cookie" not in first


async def test_an_encoded_answer_is_decoded() -> None:
    body = zlib.compress(GOOD)
    sample = await sample_once(http(body, content_encoding="deflate"))
    assert (sample.failure, sample.text) == (None, "ab")


async def test_a_slot_that_was_handed_over_to_somebody_who_left_is_free() -> None:
    window = Window(Concurrency(mode="fixed", initial_window=1))
    slots = RequestSlots(window)
    await slots.acquire()
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    slots.release(Attempt(200))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert window.in_flight == 0
    await slots.acquire()
