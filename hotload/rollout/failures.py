"""Failed attempts: what each means and how long to wait before the next (protocol §13).

One loop with two budgets: seven attempts for what may pass, and seconds of waiting for a swap of
weights, which is not the model's failure. Pure; randomness is a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from hotload.http_status import MAY_PASS, StatusMeaning, meaning_of

TRANSIENT_ATTEMPTS = 7
FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 30.0
SWAP_WAIT_SECONDS = 5.0
END_WORD = re.compile(r"[A-Za-z0-9_-]{1,40}")
CANCELLED = "cancelled"
"""Label of an attempt that was given up while under way."""
STATUS_NAMES = ("status_code", "status", "code")
SWAP_TEXTS = ("deployment_scaling_up", "model_not_ready", "hot loading", "model not found")


class Cause(StrEnum):
    """Why a sample failed."""

    REFUSED = "refused"  # the service will not take this request: bad or too large
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    CONNECTION = "connection"
    TRUNCATED = "truncated"  # the stream ended without a finish reason
    UNUSABLE_END = "unusable_end"  # by no stop, length or tool call; it would end so again
    MALFORMED = "malformed"  # the answer is not of the documented form
    SWAP_TIMEOUT = "swap_timeout"  # the service went on swapping weights or scaling up
    TOO_LONG = "too_long"  # more tokens than asked for, or than `max_seq_len`
    MISSING_TOKEN_IDS = "missing_token_ids"
    MISSING_LOGPROBS = "missing_logprobs"
    OTHER_WEIGHTS = "other_weights"  # of no version of this run, or unnamed where others are named
    STRADDLING = "straddling"  # two versions of the weights made it, and the spec drops such
    STALE = "stale"  # the service moved on by more versions than the spec allows
    DEADLINE = "deadline"  # the group's time was up
    TURN_TIMEOUT = "turn_timeout"
    TRAJECTORY_TIMEOUT = "trajectory_timeout"
    ROLLOUT_RAISED = "rollout_raised"  # the user's rollout function did
    ROLLOUT_SKIPPED = "rollout_skipped"  # it returned None
    BREAKER_OPEN = "breaker_open"  # too many recoverable failures before: not sent
    REWARD_RAISED = "reward_raised"
    REWARD_TIMEOUT = "reward_timeout"
    REWARD_CRASHED = "reward_crashed"  # it took its process down
    REWARD_NOT_A_NUMBER = "reward_not_a_number"
    REWARD_REFUSED = "reward_refused"  # its service will not score this sample
    REWARD_UNAVAILABLE = "reward_unavailable"  # its service failed, or could not be reached


# As protocol §16 lists them: 408, 425, 429 and 5xx, with the causes that stand for a network error
# or for a 5xx.
RECOVERABLE = frozenset(
    {
        *(str(code) for code in range(400, 600) if meaning_of(code) in MAY_PASS),
        *(Cause.CONNECTION, Cause.TIMEOUT, Cause.TRUNCATED, Cause.SERVER_ERROR),
    }
)


class Action(Enum):
    """What a failure asks for."""

    RETRY = "retry"
    WAIT_FOR_SWAP = "wait for swap"
    FAIL_SAMPLE = "fail the sample"
    STOP_RUN = "stop the run"


# What any other status asks for is to stop: no sample can succeed.
FAILURES = {
    StatusMeaning.BAD_REQUEST: (Action.FAIL_SAMPLE, Cause.REFUSED),
    StatusMeaning.NOT_FOUND: (Action.WAIT_FOR_SWAP, Cause.SWAP_TIMEOUT),
    StatusMeaning.TOO_EARLY: (Action.WAIT_FOR_SWAP, Cause.SWAP_TIMEOUT),
    StatusMeaning.TIMEOUT: (Action.RETRY, Cause.TIMEOUT),
    StatusMeaning.BUSY: (Action.RETRY, Cause.OVERLOADED),
    StatusMeaning.SERVER_ERROR: (Action.RETRY, Cause.SERVER_ERROR),
}


@dataclass(frozen=True, slots=True)
class FailureRules:
    """What a kind of server means by a failure, where it is something else than the vendor's
    service means: a status, a 503 with a text, an answer that ended by `abort`.
    """

    statuses: Mapping[int, tuple[Action, Cause]] = field(default_factory=dict)
    swap_texts: tuple[str, ...] = SWAP_TEXTS
    """In a 503, in small letters: it is a swap of weights."""
    abort: tuple[Action, Cause] = (Action.RETRY, Cause.SERVER_ERROR)


VENDOR = FailureRules()


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt; `detail` never holds a prompt or a key."""

    action: Action
    cause: Cause
    status_code: int | None
    detail: str
    retry_after_seconds: float | None = None
    end: str = ""
    """The word of an unusable end."""

    @property
    def label(self) -> str:
        """What the attempt is counted by: the status of an error, sent before an answer or inside
        a 200 (`"429"`), and else the cause (`"truncated"`), with the word of an unusable end
        (`"unusable_end:content_filter"`).
        """
        code = self.status_code
        if code is not None and 400 <= code <= 599:
            return str(code)
        is_word = END_WORD.fullmatch(self.end)
        return f"{self.cause}:{self.end}" if is_word else self.cause.value


def is_recoverable(label: str) -> bool:
    """Tell whether protocol §16 calls such a failure recoverable."""
    return label in RECOVERABLE


def failure_of_status(
    status_code: int,
    text: str,
    detail: str,
    retry_after_seconds: float | None = None,
    *,
    rules: FailureRules = VENDOR,
) -> Failure:
    """Report an error status, from outside a stream or in it.

    Args:
        text: the head of the body, searched for the signs of a swap.
        detail: what of it may be shown.
    """
    usual = FAILURES.get(meaning_of(status_code), (Action.STOP_RUN, Cause.REFUSED))
    action, cause = rules.statuses.get(status_code, usual)
    if status_code == 503 and any(sign in text.casefold() for sign in rules.swap_texts):
        action, cause = Action.WAIT_FOR_SWAP, Cause.SWAP_TIMEOUT
    return Failure(action, cause, status_code, detail, retry_after_seconds)


def failure_in_stream(chunk: Mapping[str, Any], rules: FailureRules = VENDOR) -> Failure:
    """Report an error inside a 200: its `status_code` or `status` counts, or a `code` that is a
    status; without one, 502 (protocol §12).
    """
    error = chunk.get("error")
    places = (error, chunk) if isinstance(error, Mapping) else (chunk,)
    codes = [place.get(name) for place in places for name in STATUS_NAMES]
    code = next((code for code in codes if type(code) is int and 400 <= code <= 599), 502)
    # Texts alone: what is nested may be nested too deep to be written out.
    messages = [value for place in places for value in place.values() if isinstance(value, str)]
    names = error_names(chunk)
    detail = f"error inside the answer: {names}"
    return failure_of_status(code, " ".join(messages)[:2048], detail, rules=rules)


def error_names(body: Any) -> str:
    """`code type` of an error body (protocol §3): never its message, which may quote the prompt."""
    error = body.get("error", body) if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        return "no documented error body"
    names = [name for name in (error.get("code"), error.get("type")) if type(name) in (str, int)]
    return " ".join(str(name)[:80] for name in names) or "no code"


class RetryBudget:
    """The waits between the attempts of one sample.

    Args:
        swap_timeout_seconds: what swaps may take, in all: the waits, and attempts that were held
            until they were refused.
        uniform: a random number in [0, 1) per call.
    """

    def __init__(self, swap_timeout_seconds: float, uniform: Callable[[], float]) -> None:
        self._swap_seconds_left = swap_timeout_seconds
        self._uniform = uniform
        self.transient_count = 0
        """Attempts that failed and count among the seven."""

    def wait_seconds(self, failure: Failure, attempt_seconds: float = 0.0) -> float | None:
        """Decide the seconds to wait before the next attempt; `None` when there is none.

        The server's Retry-After is a floor, itself capped at 30 s.

        Args:
            attempt_seconds: how long the failed attempt took.
        """
        jitter = 0.5 + self._uniform()
        floor = min(failure.retry_after_seconds or 0.0, LONGEST_WAIT_SECONDS)
        if failure.action is Action.WAIT_FOR_SWAP:
            self._swap_seconds_left -= attempt_seconds
            if self._swap_seconds_left <= 0:
                return None
            wait = max(SWAP_WAIT_SECONDS * jitter, floor)
            self._swap_seconds_left -= wait
            return wait
        if failure.action is not Action.RETRY:
            return None
        self.transient_count += 1
        if self.transient_count >= TRANSIENT_ATTEMPTS:
            return None
        longest = FIRST_WAIT_SECONDS * 2 ** (self.transient_count - 1)
        return max(min(longest, LONGEST_WAIT_SECONDS) * jitter, floor)
