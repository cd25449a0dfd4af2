"""One sample from a service: the retry loop of a request, and the window its attempts share
(protocol §11-§15).

The one retry layer of a sample is here; nothing around it repeats a sample.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import orjson

from blocks.transport import NO_ANSWER, Wire, head_of, names_in
from hotload.concurrency import Attempt, StepReport, Window
from hotload.errors import ProtocolError, ServiceRefusedError
from hotload.faults import Action, Cause, Fault, RetryBudget, fault_of_status
from hotload.spec import Sampling
from hotload.trajectories import Problem, Provenance, Trajectory, sample_seed
from hotload.wire import fireworks, inference

Sleep = Callable[[float], Awaitable[None]]

ANSWER_LIMIT_BYTES = 1 << 20
ANSWER_LIMIT_BYTES_PER_TOKEN = 16 << 10
EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True, slots=True)
class _Call:
    """One logical request: named the same over all its attempts and after a restart."""

    problem: Problem
    sample_number: int
    seed: int
    request_id: str
    session_id: str
    path: str
    body: bytes
    started_at: float

    @property
    def prompt(self) -> tuple[int, ...] | None:
        """The token ids that are sent, where ids are."""
        return self.problem.prompt if isinstance(self.problem.prompt, tuple) else None


class Sampler:
    """Samples under one identity, within one window.

    Made by `RolloutClient.session` and used in one event loop.
    """

    def __init__(
        self,
        wire: Wire,
        window: Window,
        sampling: Sampling,
        *,
        model: str,
        identity: str,
        policy_version: int,
        swap_timeout_seconds: float,
        sleep: Sleep,
    ) -> None:
        self.sampling = sampling
        self.identity = identity
        self.policy_version = policy_version
        self._wire = wire
        self._slots = _Slots(window)
        self._model = model
        self._swap_timeout_seconds = swap_timeout_seconds
        self._sleep = sleep
        self._uniform = random.Random().random
        self._answer_limit_bytes = (
            ANSWER_LIMIT_BYTES + ANSWER_LIMIT_BYTES_PER_TOKEN * sampling.max_completion_tokens
        )

    @property
    def widest(self) -> int:
        """Samples that can ever be in flight."""
        return self._slots.window.widest

    def end_step(self) -> StepReport:
        """What the window did since the last step ended."""
        return self._slots.window.end_step()

    async def sample(self, problem: Problem, sample_number: int) -> Trajectory:
        """One answer to `problem`; a sample that failed comes back as one, marked with its cause.

        A slot of the window is held per attempt and free during every wait.

        Raises:
            ServiceRefusedError: 401, 402, 403, 412 or an undocumented code: no sample can succeed.
            ProtocolError: the service answers 200 with something else than an answer.
        """
        call = self._call(problem, sample_number)
        limit = self.sampling.max_seq_len
        if limit is not None and call.prompt is not None and len(call.prompt) >= limit:
            fault = Fault(Action.FAIL_SAMPLE, Cause.TOO_LONG, None, "the prompt fills max_seq_len")
            return self._trajectory(call, inference.Answer(self.sampling, None), fault, 0)
        budget = RetryBudget(self._swap_timeout_seconds, self._uniform)
        attempts = 0
        while True:
            attempts += 1
            answer = inference.Answer(self.sampling, call.prompt)
            failed = await self._attempt(call, answer, budget.transient_count + 1)
            if failed is None:
                return self._trajectory(call, answer, None, attempts)
            if failed.action is Action.STOP_RUN:
                raise ServiceRefusedError("sample", failed.status_code, failed.detail)
            wait = budget.wait_seconds(failed)
            if wait is None:
                if failed.action is Action.RETRY:
                    self._slots.window.note_exhaustion()
                return self._trajectory(call, answer, failed, attempts)
            await self._sleep(wait)

    def _call(self, problem: Problem, sample_number: int) -> _Call:
        seed = sample_seed(self.sampling.seed, problem.id, self.policy_version, sample_number)
        facts = json.dumps([self.identity, problem.id, sample_number, seed])
        digest = hashlib.sha256(facts.encode()).hexdigest()
        body = inference.sample_body(problem, self.sampling, model=self._model, seed=seed)
        is_chat = problem.messages is not None
        return _Call(
            problem,
            sample_number,
            seed,
            request_id=f"r-{digest[:32]}",
            session_id=f"s-{digest[32:]}",
            path=fireworks.CHAT_PATH if is_chat else fireworks.COMPLETIONS_PATH,
            body=_render(body),
            started_at=time.monotonic(),
        )

    async def _attempt(
        self, call: _Call, answer: inference.Answer, congestion_number: int
    ) -> Fault | None:
        await self._slots.acquire()
        try:
            fault = await self._exchange(call, answer)
        except BaseException:
            self._slots.abandon()
            raise
        self._slots.release(
            Attempt(
                status_code=200 if fault is None else fault.status_code,
                number=congestion_number,
                prefill_queue_seconds=answer.prefill_queue_seconds,
                prompt_tokens=answer.prompt_token_count,
                cached_prompt_tokens=answer.cached_prompt_token_count,
                is_swap=fault is not None and fault.action is Action.WAIT_FOR_SWAP,
            )
        )
        return fault

    async def _exchange(self, call: _Call, answer: inference.Answer) -> Fault | None:
        session = call.session_id.encode()
        headers = [
            (fireworks.REQUEST_ID_HEADER.encode(), call.request_id.encode()),
            (fireworks.SESSION_HEADER.encode(), session),
            (fireworks.AFFINITY_HEADER.encode(), session),
        ]
        try:
            response = await self._wire.post(call.path, call.body, headers)
            try:
                return await self._read(response, answer)
            finally:
                await response.aclose()
        except httpx.ConnectTimeout as error:
            # The transport gives this name to every connection that broke before an answer.
            return _no_answer(Cause.CONNECTION, error)
        except (httpx.TimeoutException, TimeoutError) as error:
            return _no_answer(Cause.TIMEOUT, error)
        except NO_ANSWER as error:
            return _no_answer(Cause.CONNECTION, error)

    async def _read(self, response: httpx.Response, answer: inference.Answer) -> Fault | None:
        # One pass over the raw headers: httpx searches all of them for every name.
        headers = {
            name.lower().decode("latin-1"): value.decode("latin-1")
            for name, value in response.headers.raw
        }
        answer.response_id = next(
            (headers[name][:256] for name in fireworks.RESPONSE_ID_HEADERS if headers.get(name)),
            None,
        )
        if response.status_code != 200:
            return _fault_of_status(response.status_code, headers, await head_of(response))
        named = headers.get("content-type", "").partition(";")[0].strip().lower()
        if named not in (EVENT_STREAM, "application/json"):
            raise ProtocolError("sample", 200, f"expected {EVENT_STREAM}, found {named[:80]!r}")
        events = inference.EventStream()
        plain: list[bytes] = []
        size_bytes = 0
        is_encoded = "content-encoding" in headers
        pieces = response.aiter_bytes() if is_encoded else response.aiter_raw()
        async for piece in pieces:
            size_bytes += len(piece)
            if size_bytes > self._answer_limit_bytes:
                detail = f"more than {self._answer_limit_bytes} bytes"
                return Fault(Action.FAIL_SAMPLE, Cause.TOO_LONG, 200, detail)
            if named != EVENT_STREAM:
                plain.append(piece)
                continue
            for name, data in events.feed(piece):
                fault = _take(name, data, answer)
                if fault is not None:
                    return fault
        if named != EVENT_STREAM:
            answer.is_done = True
            fault = _take("", b"".join(plain), answer)
            if fault is not None:
                return fault
        if answer.prefill_queue_seconds is None:
            answer.add_metrics(headers)
        return answer.finish()

    def _trajectory(
        self, call: _Call, answer: inference.Answer, fault: Fault | None, attempts: int
    ) -> Trajectory:
        trajectory = Trajectory(
            problem_id=call.problem.id,
            sample_number=call.sample_number,
            seed=call.seed,
            provenance=Provenance(
                identity=self.identity,
                request_id=call.request_id,
                session_id=call.session_id,
                attempts=attempts,
                observed=tuple(answer.observed),
                last=answer.last_identity,
                replica=answer.replica,
                response_id=answer.response_id,
            ),
            latency_seconds=time.monotonic() - call.started_at,
        )
        if fault is not None:
            status = "no answer" if fault.status_code is None else f"HTTP {fault.status_code}"
            detail = f"{status} at attempt {attempts}: {fault.detail}"
            return replace(trajectory, failure=fault.cause.value, detail=detail)
        count = len(answer.token_ids)
        limit = self.sampling.max_seq_len
        is_too_long = limit is not None and len(answer.prompt_token_ids) + count > limit
        return replace(
            trajectory,
            prompt_token_ids=answer.prompt_token_ids,
            token_ids_T=answer.token_ids,
            sampling_logprobs_T=tuple(answer.sampling_logprobs),
            loss_mask_T=(True,) * count,
            text=answer.text,
            finish_reason=answer.finish_reason,
            cached_prompt_token_count=answer.cached_prompt_token_count,
            failure=Cause.TOO_LONG.value if is_too_long else None,
            detail=f"prompt and completion exceed {limit} tokens" if is_too_long else "",
        )


class _Slots:
    """The window's slots, handed out in the order they were asked for."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        if not self._waiting and self.window.try_acquire():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.abandon()  # the slot was ours just before we were cancelled
            raise

    def release(self, attempt: Attempt) -> None:
        self.window.release(attempt, time.monotonic())
        self._wake()

    def abandon(self) -> None:
        self.window.abandon()
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # cancelled while it waited
                self._waiting.popleft()
            elif self.window.try_acquire():
                self._waiting.popleft().set_result(None)
            else:
                return


def _render(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:  # an integer of more than 64 bits in somebody's messages
        return json.dumps(body).encode()


def _take(name: str, data: bytes, answer: inference.Answer) -> Fault | None:
    if data == inference.DONE:
        answer.is_done = True
        return None
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        if name in inference.HEARTBEAT_EVENTS:
            return None
        return inference.malformed("an event is not JSON")
    if name == "error" and isinstance(chunk, dict) and "error" not in chunk:
        chunk = {"error": chunk}
    return answer.add(chunk)


def _no_answer(cause: Cause, error: Exception) -> Fault:
    # The class says enough; a transport's message may quote what was sent.
    return Fault(Action.RETRY, cause, None, type(error).__name__)


def _fault_of_status(status_code: int, headers: Mapping[str, str], body: bytes) -> Fault:
    return fault_of_status(
        status_code,
        body[:2048].decode("utf-8", "replace"),
        names_in(body),
        _retry_after(headers.get("retry-after"), headers.get("date")),
    )


def _retry_after(text: str | None, date: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date counted from the server's own clock."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(
            0.0, (parsedate_to_datetime(text) - parsedate_to_datetime(date or "")).total_seconds()
        )
    except (TypeError, ValueError):
        return None
