"""One attempt's answer, piece by piece and against the clock; and slots at the moment of a
cancellation."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
import pytest

from hotload.clients.inference.attempt import Call, exchange
from hotload.clients.inference.request_slots import Slots
from hotload.clients.inference.transport import Wire
from hotload.rollout.completions_api import Answer
from hotload.rollout.failures import Cause
from hotload.rollout.window import Attempt, Window
from hotload.spec import Concurrency, Sampling
from tests.blocks.scripted_inference import GOOD, MODEL, event, token

PING = b"event: ping\ndata: {}\n\n"


class Pieces(httpx.AsyncByteStream, httpx.AsyncBaseTransport):
    """A service whose answers come in these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


async def answered(*pieces: bytes, silence_seconds: float) -> tuple[Answer, Cause | None]:
    wire = Wire(Pieces(*pieces), "http://a", {}, httpx.Timeout(1))
    answer = Answer(Sampling(), None)
    call = Call("/", b"{}", "r", "s", 1 << 20, silence_seconds)
    fault = await exchange(wire, call, answer)
    return answer, fault and fault.cause


async def test_an_answer_may_take_long_as_long_as_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second passes with every piece, and three are the limit."""
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr("hotload.clients.inference.attempt.time", clock)
    slow = [piece for _ in range(20) for piece in (token(1, "a"), PING, PING)]
    end = event({"model": MODEL, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    answer, cause = await answered(*slow, end, silence_seconds=3)
    assert len(answer.sampling_logprobs) == 20
    assert cause is Cause.MISSING_TOKEN_IDS  # read to its end; its prompt was never told
    _, cause = await answered(token(1, "a"), *[PING] * 4, GOOD, silence_seconds=3)
    assert cause is Cause.TIMEOUT


async def test_a_slot_that_was_handed_over_to_somebody_who_left_is_free() -> None:
    window = Window(Concurrency(mode="fixed", initial_window=1))
    slots = Slots(window)
    await slots.acquire()
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    slots.release(Attempt(200))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert window.in_flight == 0
    await slots.acquire()
