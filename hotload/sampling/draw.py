"""Draw: one sample of a group, by a single request or by the user's own rollout function.

A function runs in the event loop of the rollouts; one that raises, hangs or returns nonsense costs
its own sample, marked. One that blocks the loop blocks everything: what computes belongs in a
thread or a process of its own.
"""

import asyncio
import inspect
import json
import operator
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from hotload.clients.inference.conversation import Conversation, TurnFailedError
from hotload.clients.redaction import redact
from hotload.errors import RolloutFunctionError
from hotload.options import RolloutFunction
from hotload.rollout.failures import Action, Cause, Failure
from hotload.rollout.routing import read_routes
from hotload.rollout.trajectory import (
    LOGPROB_RANGE,
    TOKEN_ID_LIMIT,
    Problem,
    Segment,
    Trajectory,
)
from hotload.sampling.reward.user_errors import (
    DETAIL_LIMIT_CHARACTERS,
    describe_exception,
    replace_surrogates,
    secret_values,
)
from hotload.sampling.user_function import import_function

UserRollout = Callable[..., Awaitable[Any]]

GRACE_SECONDS = 5.0
OWN_CAUSE = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Draw:
    """One sample under way; made by `Drawing.begin`."""

    def __init__(self, conversation: Conversation, answer: Callable[[], Awaitable[Trajectory]]):
        self._conversation = conversation
        self.answer = answer
        """The sample, marked if it failed; raises ServiceError if none can succeed."""

    @property
    def attempts(self) -> int:
        """Requests sent for it so far."""
        return self._conversation.attempts

    @property
    def failed_attempts(self) -> tuple[str, ...]:
        """What those of them met that got no usable answer; one under way counts as cancelled."""
        return self._conversation.failed_attempts

    def close(self) -> None:
        """Send no further request for it: those that were sent are counted now."""
        self._conversation.close()

    def cut_off(self, cause: Cause, detail: str) -> Trajectory:
        """Return what there is of a sample that was ended before it had."""
        return _failed(self._conversation, _failure(cause, detail))


class Drawing:
    """Makes the draws of one rollout, as its spec declares them.

    Args:
        converse: as `Sampler.converse`.

    Raises:
        RolloutFunctionError: there is a rollout function and it cannot be used.
    """

    def __init__(
        self, declared: RolloutFunction | None, converse: Callable[..., Conversation]
    ) -> None:
        self._declared = declared
        self._converse = converse
        self._function = None if self._declared is None else load_rollout(self._declared)

    def begin(self, problem: Problem, number: int, *, is_hedge: bool = False) -> Draw:
        """Make the draw with this number; nothing is sent before it is awaited."""
        declared, function = self._declared, self._function
        if declared is None or function is None:
            single = self._converse(problem, number, is_hedge=is_hedge)
            return Draw(single, single.answer)
        conversation = self._converse(
            problem,
            number,
            turn_timeout_seconds=declared.turn_timeout_seconds,
            is_hedge=is_hedge,
        )
        return Draw(conversation, lambda: _play(declared, function, problem, conversation))


def load_rollout(declared: RolloutFunction) -> UserRollout:
    """Import the rollout function, here and now.

    Raises:
        RolloutFunctionError: not importable, not async, or it cannot take the declared arguments.
    """
    found = import_function(
        declared.name, declared.arguments, RolloutFunctionError, positional_count=2
    )
    if not inspect.iscoroutinefunction(found):
        raise RolloutFunctionError(declared.name, "expected `async def rollout(problem, sampler)`")
    return cast(UserRollout, found)


async def _play(
    declared: RolloutFunction, function: UserRollout, problem: Problem, conversation: Conversation
) -> Trajectory:
    """One call of a rollout function, and what came of it.

    Raises:
        ServiceError: a turn met it: no sample can succeed.
    """
    limit = declared.trajectory_timeout_seconds
    call = asyncio.ensure_future(_call(function(problem, conversation, **declared.arguments)))
    try:
        done, _ = await asyncio.wait({call}, timeout=limit)
    finally:
        conversation.close()
        await _end(call)
    if not done:
        why = f"the trajectory took more than {limit:g} s"
        return _failed(conversation, _failure(Cause.TRAJECTORY_TIMEOUT, why))
    try:
        return _readable(_taken(conversation, call.result()))
    except KeyboardInterrupt:
        raise
    # Whatever it is, the sample is what failed; a cancellation of ours would have ended the wait.
    except BaseException as error:  # noqa: BLE001
        if isinstance(error, TurnFailedError) and isinstance(error.failure, Failure):
            return _failed(conversation, error.failure)
        why = describe_exception(error, secret_values(os.environ))
        return _failed(conversation, _failure(Cause.ROLLOUT_RAISED, why))


async def _call(made: Awaitable[Any]) -> Any:
    try:
        return await made
    except SystemExit as error:  # of a task's own, it would end the loop
        raise RuntimeError(f"SystemExit: {error.code}") from None


async def _end(call: asyncio.Future[Any]) -> None:
    """End a call that has not ended; one that does not let itself be ended is left behind."""
    if not call.done():
        call.cancel()
        await asyncio.wait({call}, timeout=GRACE_SECONDS)
    if call.done() and not call.cancelled():
        call.exception()  # seen


def _taken(conversation: Conversation, made: object) -> Trajectory:
    """What a rollout function returned, as a sample of ours.

    Raises:
        ValueError, TypeError: it is not of the expected form.
    """
    if made is None:
        return conversation.trajectory(_failure(Cause.ROLLOUT_SKIPPED, "it returned None"))
    if isinstance(made, Trajectory):
        own = conversation.trajectory(segments=_checked(made.segments))
        detail = redact(str(made.detail), secret_values(os.environ))[:DETAIL_LIMIT_CHARACTERS]
        return replace(
            own,
            text=str(made.text),
            finish_reason=_text(made.finish_reason),
            transcript=tuple(made.transcript) or own.transcript,
            failure=own.failure or _cause(made.failure),
            detail=own.detail or detail,
        )
    if isinstance(made, (list, tuple)) and all(isinstance(each, Segment) for each in made):
        return conversation.trajectory(segments=_checked(made))
    raise TypeError(
        f"it returned {type(made).__name__}, expected a Trajectory, a list of Segments, or None"
    )


def _text(value: object) -> str | None:
    return None if value is None else replace_surrogates(str(value))


def _cause(failure: object) -> str | None:
    """A cause of the function's own: failed samples are counted by it, so it is a name."""
    if failure is None:
        return None
    if OWN_CAUSE.fullmatch(str(failure)):
        return str(failure)
    raise ValueError("failure: expected a name like `wrong_tool`, at most 64 of a-z 0-9 _")


def _checked(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    checked = []
    for segment in segments:
        prompt = tuple(map(operator.index, segment.prompt_token_ids))
        tokens = tuple(map(operator.index, segment.token_ids_T))
        logprobs = tuple(map(float, segment.sampling_logprobs_T))
        mask = tuple(map(bool, segment.loss_mask_T))
        if not len(tokens) == len(logprobs) == len(mask):
            raise ValueError("a segment's tokens, log-probabilities and mask differ in length")
        if any(mask) and not prompt:
            raise ValueError("a segment with tokens to train on has no prompt")
        for token in prompt + tokens:
            if not 0 <= token < TOKEN_ID_LIMIT:
                raise ValueError(f"a segment's token id is {token}, expected 0 to 2³¹-1")
        for logprob in logprobs:
            if not LOGPROB_RANGE[0] <= logprob <= LOGPROB_RANGE[1]:
                raise ValueError(f"a segment's log-probability is {logprob}, expected at most 0")
        if segment.routes is not None:
            read_routes(segment.routes, len(prompt) + len(tokens))
        checked.append(Segment(prompt, tokens, logprobs, mask, segment.routes))
    return tuple(checked)


def _failure(cause: Cause, detail: str) -> Failure:
    return Failure(Action.FAIL_SAMPLE, cause, None, detail[:DETAIL_LIMIT_CHARACTERS])


def _failed(conversation: Conversation, failure: Failure) -> Trajectory:
    """What there is of a sample that failed.

    Raises:
        ServiceError: a turn met it: no sample can succeed.
    """
    sample = conversation.trajectory(failure)
    try:
        return _readable(sample)
    except (TypeError, ValueError, RecursionError):  # what it said was never JSON
        return _readable(replace(sample, transcript=()))


def _readable(sample: Trajectory) -> Trajectory:
    """The sample with nothing in it but what a file can hold and another process can read.

    Raises:
        TypeError, ValueError, RecursionError: the transcript is not JSON.
    """
    transcript = json.loads(replace_surrogates(json.dumps(sample.transcript, ensure_ascii=False)))
    return replace(
        sample,
        text=replace_surrogates(sample.text),
        finish_reason=_text(sample.finish_reason),
        detail=replace_surrogates(sample.detail),
        transcript=tuple(transcript),
    )
