"""A trajectory of several turns, asked for by a rollout function (protocol §11, §12).

All turns share one session, so that the replica that holds their common prefix answers them all.
Token ids come from the service alone; nothing is ever tokenized here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from hotload.clock import monotonic
from hotload.errors import HotLoadError, ServiceError
from hotload.options import Sampling
from hotload.rollout.completions_api import Answer
from hotload.rollout.failures import CANCELLED, Action, Cause, Failure
from hotload.rollout.merge_turns import Turns
from hotload.rollout.request import Request
from hotload.rollout.straddling import settle_weights
from hotload.rollout.trajectory import TOKEN_ID_LIMIT, Problem, Provenance, Segment, Trajectory

# A function that was left behind waits for each refusal, lest it keep the event loop to itself.
CLOSED_WAIT_SECONDS = 0.1

Asked = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""What a turn asks: text, token ids, or the messages of a chat."""


class Outcome(NamedTuple):
    """What came of one logical request, repeated within its budgets."""

    answer: Answer
    failure: Failure | None


class Ask(Protocol):
    """Sends one logical request, repeated within its budgets."""

    def __call__(
        self,
        request: Request,
        on_attempt: Callable[[], None],
        on_end: Callable[[Failure | None], None],
    ) -> Awaitable[Outcome]:
        """Return its outcome; the first is called as an attempt is sent, the other as it ends.

        Raises:
            ServiceError: no request can succeed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer. `token_ids` and `sampling_logprobs` have the same length; log-probabilities are
    natural, under the distribution really sampled. A server that parses chats keeps `reasoning` and
    `tool_calls` apart from the text; their tokens are among the others.
    """

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    finish_reason: str | None
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to be appended to a chat."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message


class TurnFailedError(HotLoadError):
    """A turn got no usable answer. A rollout function may end with it: its sample is marked."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return f"a turn failed: {self.failure.cause.value}, {self.failure.detail}"


class Conversation:
    """The turns of one trajectory; a rollout function gets it as `sampler`.

    Made by `Sampler.converse`. Turns are asked one after the other.
    """

    def __init__(
        self, ask: Ask, request: Request, *, turn_timeout_seconds: float | None = None
    ) -> None:
        self.problem = request.problem
        self.sample_number = request.sample_number
        self.attempts = 0
        """Requests sent so far."""
        self._ask = ask
        self._request = request
        self._turn_timeout_seconds = turn_timeout_seconds
        self._first_sent_at: float | None = None
        self._answered_count = 0
        self._failed: tuple[str, ...] = ()
        self._turn_count = 0
        self._turns = Turns()
        self._is_closed = False
        self._failure: Failure | None = None
        self._stop: ServiceError | None = None
        self._transcript: list[Mapping[str, Any]] = []

    @property
    def failed_attempts(self) -> tuple[str, ...]:
        """`Failure.label` of every request that got no usable answer; one that has not ended is
        `cancelled`, since what is counted now is given up.
        """
        unfinished = self.attempts - self._answered_count - len(self._failed)
        return (*self._failed, *(CANCELLED,) * unfinished)

    async def sample(
        self, asked: Asked, *, max_tokens: int | None = None, stop: Sequence[str] | None = None
    ) -> Turn:
        """Ask messages, token ids or text, and return the answer.

        Ids that begin with the ids of the turns so far (`turn.prompt_token_ids + turn.token_ids`)
        go on with their sequence; what is new between them is never trained on.

        Args:
            asked: everything, from the first message or token on.
            max_tokens: tokens at most; empty is the spec's `max_completion_tokens`.
            stop: texts that end the answer; empty is the spec's.

        Raises:
            TurnFailedError: there is no usable answer, or not within the turn's time.
            ServiceRefusedError: 401, 402, 403, 412 or an undocumented code: no turn can succeed.
            ProtocolError: the service answers 200 with something else than an answer.
            ValueError: nothing, or something else, was asked.
            RuntimeError: the sample has ended; nothing is sent.
        """
        sampling = self._request.sampling
        changes: dict[str, Any] = {}
        if max_tokens is not None:
            changes["max_completion_tokens"] = max_tokens
        if stop is not None:
            changes["stop"] = tuple(stop)
        if changes:
            sampling = Sampling.model_validate({**sampling.model_dump(), **changes})
        question = _question(self.problem, asked)
        answer, failure = await self.ask(question, sampling)
        if failure is not None:
            raise TurnFailedError(failure)
        turn = _turn(answer)
        self._write_down(question, turn)
        return turn

    async def answer(self) -> Trajectory:
        """Ask the problem itself: a trajectory of one turn, marked if it failed. It has a
        transcript where the text is not all that was said.

        Raises:
            ServiceRefusedError, ProtocolError: as `ask`.
        """
        answer, failure = await self.ask(self.problem, self._request.sampling)
        if failure is None and (answer.reasoning or answer.tool_calls):
            self._write_down(self.problem, _turn(answer))
        return self.trajectory()

    async def ask(self, question: Problem, sampling: Sampling) -> Outcome:
        """Ask one turn; its failure is a value.

        Raises:
            ServiceRefusedError: no turn can succeed.
            ProtocolError: the service answers 200 with something else than an answer.
            RuntimeError: the sample has ended; nothing is sent.
        """
        if self._is_closed:
            await asyncio.sleep(CLOSED_WAIT_SECONDS)
            self._check_open()
        number, before = self._turn_count, self.attempts
        self._turn_count += 1
        # A turn's time begins as it is first sent: the wait for a slot is our own doing.
        limit = asyncio.timeout(None)

        def note_attempt() -> None:
            self._note_attempt()
            if limit.when() is None and self._turn_timeout_seconds is not None:
                now = asyncio.get_running_loop().time()
                limit.reschedule(now + self._turn_timeout_seconds)

        try:
            async with limit:
                request = self._request.turn(number, question, sampling)
                answer, failure = await self._ask(request, note_attempt, self._note_end)
        except TimeoutError:
            if not limit.expired():
                raise
            detail = f"turn {number + 1} took more than {self._turn_timeout_seconds} s"
            answer = Answer(sampling, None)
            failure = Failure(Action.FAIL_SAMPLE, Cause.TURN_TIMEOUT, None, detail)
        except ServiceError as error:
            self._stop = error
            raise
        self._turns.note(answer)
        longest = sampling.max_seq_len
        if failure is not None:
            status = "no answer" if failure.status_code is None else f"HTTP {failure.status_code}"
            detail = f"{status} at attempt {self.attempts - before}: {failure.detail}"
            failure = replace(failure, detail=detail)
        else:
            self._turns.take(answer)
            if longest and len(answer.prompt_token_ids) + len(answer.token_ids) > longest:
                detail = f"prompt and completion exceed {longest} tokens"
                failure = Failure(Action.FAIL_SAMPLE, Cause.TOO_LONG, 200, detail)
        self._failure = failure
        return Outcome(answer, failure)

    def close(self) -> None:
        """Send nothing any more: what was sent is counted now. A request that is under way is the
        caller's to cancel.
        """
        self._is_closed = True

    def trajectory(
        self, failure: Failure | None = None, *, segments: Sequence[Segment] | None = None
    ) -> Trajectory:
        """Put the turns so far together; marked as failed by `failure`, or if the last turn failed.

        Args:
            segments: the sequences to train on, where the rollout function made them itself.

        Raises:
            ServiceRefusedError: a turn met it, even if the rollout function went on.
            ProtocolError: as above.
            ValueError: `segments` is empty.
        """
        if segments is not None and not segments:
            raise ValueError("expected one segment or more")
        if self._stop is not None:
            raise self._stop
        failure = failure or self._failure
        turns, request = self._turns, self._request
        is_own = segments is not None and not _are_same_tokens(segments, turns.segments)
        if segments is not None and not is_own:
            pairs = zip(segments, turns.segments, strict=True)
            segments = [replace(one, routes=sampled.routes) for one, sampled in pairs]
        now = monotonic()
        trajectory = Trajectory(
            problem_id=request.problem.id,
            sample_number=request.sample_number,
            seed=request.seed,
            provenance=Provenance(
                identity=request.identity,
                request_id=request.request_id,
                session_id=request.session_id,
                attempts=self.attempts,
                failed_attempts=self.failed_attempts,
                observed=turns.observed,
                last=turns.last_identity,
                replica=turns.replica,
                response_id=turns.response_id,
                runs=() if is_own else turns.runs,
            ),
            latency_seconds=now - (self._first_sent_at or now),
            segments=tuple(segments or turns.segments),
            text=turns.text,
            finish_reason=turns.finish_reason,
            prompt_token_count=turns.prompt_token_count,
            cached_prompt_token_count=turns.cached_prompt_token_count,
            completion_token_count=turns.completion_token_count,
            failure=None if failure is None else failure.cause.value,
            detail="" if failure is None else failure.detail,
            turn_count=max(1, self._turn_count),
            transcript=tuple(self._transcript),
            is_hedge=request.is_hedge,
        )
        return settle_weights(trajectory, request.sampling.groups.on_straddling)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the sample has ended: no further turn is sent for it")

    def _note_attempt(self) -> None:
        self._check_open()
        self.attempts += 1
        if self._first_sent_at is None:
            self._first_sent_at = monotonic()

    def _note_end(self, failure: Failure | None) -> None:
        if failure is None:
            self._answered_count += 1
        else:
            self._failed += (failure.label,)

    def _write_down(self, question: Problem, turn: Turn) -> None:
        """Add the turn to the transcript: a chat as it stands, anything else line after line."""
        if question.messages is not None:
            self._transcript = [*question.messages]
        elif isinstance(question.prompt, str):
            self._transcript.append({"role": "user", "content": question.prompt})
        else:
            content = f"({len(turn.prompt_token_ids)} token ids)"
            self._transcript.append({"role": "user", "content": content})
        self._transcript.append(turn.message)


def _are_same_tokens(segments: Sequence[Segment], others: Sequence[Segment]) -> bool:
    return [(one.prompt_token_ids, one.token_ids_T) for one in segments] == [
        (one.prompt_token_ids, one.token_ids_T) for one in others
    ]


def _turn(answer: Answer) -> Turn:
    return Turn(
        answer.text,
        answer.prompt_token_ids,
        answer.token_ids,
        tuple(answer.sampling_logprobs),
        answer.finish_reason,
        answer.reasoning,
        answer.tool_calls,
    )


def _question(problem: Problem, asked: Asked) -> Problem:
    name, extra = problem.id, {"tools": problem.extra.get("tools")}
    if isinstance(asked, str) and asked:
        return Problem(name, prompt=asked)
    parts: tuple[Any, ...] = tuple(asked)
    if parts and all(type(part) is int and 0 <= part < TOKEN_ID_LIMIT for part in parts):
        return Problem(name, prompt=parts)
    if parts and all(isinstance(part, Mapping) and "role" in part for part in parts):
        return Problem(name, messages=tuple(dict(part) for part in parts), extra=extra)
    raise ValueError("expected text, token ids, or messages that each have a role")
