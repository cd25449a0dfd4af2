"""Samples from a service: the retry loop of a request, and the window its attempts share
(protocol §11-§15).

The one retry layer of a sample is here; nothing around it repeats a request.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from hotload.clients.inference.attempt import body_bytes, send_once
from hotload.clients.inference.conversation import Conversation, Outcome
from hotload.clients.inference.request_slots import RequestSlots
from hotload.clients.inference.transport import HttpTransport
from hotload.clock import monotonic
from hotload.errors import ServiceRefusedError
from hotload.options import Sampling
from hotload.rollout import completions_api
from hotload.rollout.breaker import Breaker
from hotload.rollout.engines.kind import ServerKind, form_of
from hotload.rollout.failures import Action, Cause, Failure, RetryBudget
from hotload.rollout.request import Request, first_request
from hotload.rollout.trajectory import Problem, Trajectory
from hotload.rollout.window import Attempt, StepReport, TracePoint, Window

Sleep = Callable[[float], Awaitable[None]]


class Sampler:
    """Samples under one identity, within one window.

    Made by `InferenceClient.session` and used in one event loop.
    """

    def __init__(
        self,
        transport: HttpTransport,
        window: Window,
        sampling: Sampling,
        *,
        kind: ServerKind,
        model: str,
        remedy: Callable[[int | None], str],
        identity: str,
        policy_version: int,
        swap_timeout_seconds: float,
        sleep: Sleep,
    ) -> None:
        self.sampling = sampling
        self.identity = identity
        self.policy_version = policy_version
        self._transport = transport
        self._slots = RequestSlots(window)
        self._kind = kind
        self._model = model
        self._remedy = remedy
        self._swap_timeout_seconds = swap_timeout_seconds
        self._sleep = sleep
        self.failed_attempts: Counter[str] = Counter()
        """Attempts so far that got no usable answer, counted by `Failure.label`."""
        self.breaker = Breaker()
        """Is told of every request that has ended."""
        self._names_weights = False
        self._uniform = random.random

    @property
    def window(self) -> Window:
        """What its requests share."""
        return self._slots.window

    @property
    def size(self) -> int:
        """Requests that may be in flight now."""
        return self._slots.window.size

    @property
    def in_flight(self) -> int:
        """Requests that are in flight now."""
        return self._slots.window.in_flight

    def wake(self) -> None:
        """Let requests go that wait for a slot: the window has become wider from outside."""
        self._slots.wake()

    def end_step(self) -> StepReport:
        """Report what the window did since the last step ended."""
        return self._slots.window.end_step()

    def trace(self) -> Sequence[TracePoint]:
        """Return the window's path through time; seconds of the monotonic clock."""
        return self._slots.window.trace()

    async def sample(
        self, problem: Problem, sample_number: int, *, is_hedge: bool = False
    ) -> Trajectory:
        """Ask for one answer to `problem`; a sample that failed is returned, marked with its cause.

        A slot of the window is held per attempt and free during every wait.

        Args:
            is_hedge: ask beside a request that is still under way, in a session of its own, so that
                another replica may answer.

        Raises:
            ServiceRefusedError: 401, 402, 403, 412 or an undocumented code: no sample can succeed.
            ProtocolError: the service answers 200 with something else than an answer.
        """
        return await self.converse(problem, sample_number, is_hedge=is_hedge).answer()

    def converse(
        self,
        problem: Problem,
        sample_number: int,
        *,
        turn_timeout_seconds: float | None = None,
        is_hedge: bool = False,
    ) -> Conversation:
        """Begin a trajectory of several turns in one session, for a rollout function."""
        request = first_request(
            problem,
            sample_number,
            sampling=self.sampling,
            identity=self.identity,
            policy_version=self.policy_version,
            is_hedge=is_hedge,
        )
        return Conversation(self._ask, request, turn_timeout_seconds=turn_timeout_seconds)

    async def _ask(
        self,
        request: Request,
        on_attempt: Callable[[], None],
        on_end: Callable[[Failure | None], None],
    ) -> Outcome:
        sampling = request.sampling
        prompt = request.problem.prompt if isinstance(request.problem.prompt, tuple) else None
        limit = sampling.max_seq_len
        if limit is not None and prompt is not None and len(prompt) >= limit:
            detail = "the prompt fills max_seq_len"
            unsent = Failure(Action.FAIL_SAMPLE, Cause.TOO_LONG, None, detail)
            return Outcome(completions_api.Answer(sampling, None), unsent)
        form = form_of(request.problem)
        endpoint = self._kind.endpoints.get(form)
        if endpoint is None:
            reason = f"{self._kind.name} is asked {form}, which cannot be trained on there"
            raise ServiceRefusedError("sample", None, reason, self._kind.advice)
        budget = RetryBudget(self._swap_timeout_seconds, self._uniform)
        met_swap = False
        while True:
            # Nothing is made before there is a slot: thousands may wait here for one.
            await self._slots.acquire()
            number = budget.transient_count + 1
            try:
                body = body_bytes(endpoint.body(request, self._model))
                on_attempt()
                answer = completions_api.Answer(sampling, prompt, endpoint.reading)
                started_at = monotonic()
                failure = await send_once(self._transport, self._kind, request, body, answer)
            except BaseException:
                self._slots.abandon()
                raise
            seconds = monotonic() - started_at
            failure = failure or self._doubt_about(answer)
            on_end(failure)
            if failure is not None:
                self.failed_attempts[failure.label] += 1
            self._slots.release(_attempt_of(answer, failure, number, seconds))
            if failure is None:
                self.breaker.note_request(None, met_swap=met_swap)
                return Outcome(answer, None)
            if failure.action is Action.STOP_RUN:
                status = failure.status_code
                raise ServiceRefusedError("sample", status, failure.detail, self._remedy(status))
            met_swap = met_swap or failure.action is Action.WAIT_FOR_SWAP
            wait = budget.wait_seconds(failure, seconds)
            if wait is None:
                self.breaker.note_request(failure, met_swap=met_swap)
                if failure.action is Action.RETRY:
                    self._slots.window.note_exhaustion()
                return Outcome(answer, failure)
            await self._sleep(wait)

    def _doubt_about(self, answer: completions_api.Answer) -> Failure | None:
        """Refuse an answer that names no weights where an earlier one did: base weights have no
        name, and a replica may fall back to them while others are sampled.
        """
        self._names_weights |= bool(answer.observed)
        if answer.observed or not self._names_weights:
            return None
        detail = "it names no weights, and earlier answers did: base weights, perhaps"
        return Failure(Action.FAIL_SAMPLE, Cause.OTHER_WEIGHTS, 200, detail)


def _attempt_of(
    answer: completions_api.Answer, failure: Failure | None, number: int, seconds: float
) -> Attempt:
    """Sum up what the window learns from an attempt."""
    cause = None if failure is None else failure.cause
    status = 200 if failure is None else failure.status_code
    return Attempt(
        # A stream that was cut is a transport error, whatever it began with.
        status_code=None if cause is Cause.TRUNCATED else status,
        number=number,
        prefill_queue_seconds=answer.prefill_queue_seconds,
        seconds=seconds,
        is_swap=failure is not None and failure.action is Action.WAIT_FOR_SWAP,
    )


class InferenceSource(Protocol):
    """What is sampled from: an `InferenceClient`, whichever kinds of servers it knows."""

    def session(
        self,
        sampling: Sampling,
        *,
        identity: str,
        policy_version: int,
        replica_count: int | None = None,
        swap_timeout_seconds: float = ...,
        window: Window | None = None,
    ) -> AbstractAsyncContextManager[Sampler]:
        """Open a sampler whose samples all share one window."""

    async def warm_up(self, *, retries: int) -> bool:
        """Tell whether a small request was answered within `retries` tries."""
