"""A reward that a service gives over HTTP. All attempts of one call share its time limit; this is
the only place that repeats one.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from hotload.clients.inference.transport import NO_ANSWER, HttpTransport
from hotload.errors import RewardError
from hotload.http_status import StatusMeaning, meaning_of
from hotload.options import RewardSpec
from hotload.reward.http_service import (
    parse_rewards,
    read_reward_service,
    request_body,
)
from hotload.reward.outcome import RewardOutcome, Unscored
from hotload.rollout.failures import Action, Cause, Failure, RetryBudget, failure_of_status
from hotload.rollout.retry_after import retry_after_seconds
from hotload.rollout.trajectory import Problem, Trajectory
from hotload.sampling.reward.calls import score_by_calls

CALLS_AT_ONCE = 64
CONNECT_TIMEOUT_SECONDS = 10.0
ANSWER_LIMIT_BYTES = 1 << 20


class RemoteReward:
    """Judges by asking a service: once a group where the spec says so, else once a sample."""

    def __init__(
        self,
        reward: RewardSpec,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._spec = reward
        self._sleep = sleep
        self._uniform = uniform
        self._slots = asyncio.Semaphore(CALLS_AT_ONCE)
        self._transport: HttpTransport | None = None

    async def start(self) -> None:
        """Read what is declared and the key; the service itself is not asked.

        Raises:
            RewardError: an argument is wrong, or the key's variable holds none.
        """
        self._service = read_reward_service(self._spec)
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if name := self._service.key_variable:
            key = os.environ.get(name, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                raise RewardError(self._spec.name, f"`key_variable`: {name} holds no key")
            headers["Authorization"] = f"Bearer {key}"
        parts = urlsplit(self._service.url)
        self._path = parts.path or "/"
        self._transport = HttpTransport(
            f"{parts.scheme}://{parts.netloc}",
            headers,
            connect_timeout_seconds=CONNECT_TIMEOUT_SECONDS,
            read_timeout_seconds=None,  # the call's own limit is what ends a read
            connections=CALLS_AT_ONCE,
        )

    async def stop(self) -> None:
        """Close the connections."""
        if self._transport is not None:
            await self._transport.close()

    async def score_samples(
        self, problem: Problem, samples: Sequence[Trajectory]
    ) -> list[RewardOutcome]:
        """Return an outcome for each sample: by one call, or by one call each.

        Raises:
            RewardError: the service refuses the key: it would refuse every sample.
        """
        return await score_by_calls(self._spec, self._call, problem, samples)

    async def _call(self, problem: Problem, samples: Sequence[Trajectory]) -> list[RewardOutcome]:
        body = request_body(problem, samples, self._service.arguments)
        budget = RetryBudget(0.0, self._uniform)
        limit = self._spec.timeout_seconds
        clock = asyncio.get_running_loop().time
        last = ""
        async with self._slots:
            ends_at = clock() + limit
            try:
                async with asyncio.timeout_at(ends_at):
                    while True:
                        answer = await self._attempt(body)
                        if isinstance(answer, bytes):
                            return parse_rewards(answer, len(samples))
                        last = answer.detail
                        if _is_refused(answer):
                            raise RewardError(self._spec.name, self._refused(last))
                        wait = budget.wait_seconds(answer)
                        if wait is None or clock() + wait >= ends_at:
                            return [Unscored(_cause(answer), last)] * len(samples)
                        await self._sleep(wait)
            except TimeoutError:
                late = f"no reward within {limit:g} s" + (f", after {last}" if last else "")
                return [Unscored(Cause.REWARD_TIMEOUT, late)] * len(samples)

    def _refused(self, status: str) -> str:
        name = self._service.key_variable
        what = f"the key in {name}, or its account" if name else "the service's `key_variable`"
        return f"its service answered {status}: mend {what}, then run the cycle again"

    async def _attempt(self, body: bytes) -> bytes | Failure:
        """Return the body of a good answer. Of another only the status is kept: it may repeat the
        key, or the answer it was asked about.
        """
        assert self._transport is not None, "start() comes first"
        try:
            async with await self._transport.post(self._path, body) as response:
                if response.status != 200:
                    headers = response.headers
                    return failure_of_status(
                        response.status,
                        "",
                        f"HTTP {response.status}",
                        retry_after_seconds(headers.get("retry-after"), headers.get("date")),
                    )
                data = bytearray()
                async for piece in response.content.iter_any():
                    data += piece
                    if len(data) > ANSWER_LIMIT_BYTES:
                        reason = f"an answer of more than {ANSWER_LIMIT_BYTES} bytes"
                        return Failure(Action.FAIL_SAMPLE, Cause.MALFORMED, 200, reason)
                return bytes(data)
        except NO_ANSWER as error:
            return Failure(Action.RETRY, Cause.CONNECTION, None, type(error).__name__)


def _is_refused(failure: Failure) -> bool:
    """No key, no money, no rights: not the sample's doing, and nothing that passes by itself."""
    code = failure.status_code
    return code is not None and meaning_of(code) is StatusMeaning.NO_ACCESS


def _cause(failure: Failure) -> Cause:
    if failure.action is Action.FAIL_SAMPLE:
        return Cause.REWARD_REFUSED
    return Cause.REWARD_UNAVAILABLE
