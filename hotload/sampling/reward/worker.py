"""The child process in which a user's reward runs: `python -m hotload.sampling.reward.worker`.

Its standard input brings pickles of (number, call); a line of JSON answers each on its standard
output. The reward's own prints go to standard error. It ends when its parent does, also in the
middle of a reward that hangs.
"""

import asyncio
import contextlib
import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any, BinaryIO

from hotload.errors import RewardError
from hotload.reward.outcome import (
    RewardFunction,
    RewardOutcome,
    Unscored,
    check_arguments,
    is_async,
    load_reward,
    read_outcome,
    read_outcomes,
)
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import Problem, Trajectory
from hotload.sampling.reward.user_errors import describe_exception, secret_values

OVERTIME_SECONDS = 5.0

Calls = SimpleQueue[tuple[int, Any]]


def _read_calls(source: BinaryIO, calls: Calls) -> None:
    try:
        while True:
            calls.put(pickle.load(source))
    finally:  # the parent is gone, or not understood; a reward that hangs must not outlive it
        os._exit(0)


def _reply(sink: BinaryIO, number: int, **answer: Any) -> None:
    with contextlib.suppress(Exception):  # it may be the reward's own by now
        sys.stdout.flush()  # so that what is printed for one sample is counted with it
    sink.write(json.dumps({"call": number, **answer}).encode() + b"\n")
    sink.flush()


@dataclass(frozen=True, slots=True)
class _RewardCaller:
    """Calls the reward as the spec says."""

    reward: RewardFunction
    arguments: dict[str, Any]
    per_group: bool
    timeout_seconds: float
    secrets: Sequence[str] = field(repr=False)

    def call(self, problem: Problem, samples: Sequence[Trajectory]) -> object:
        """Return what the function returns, to be awaited where it is async."""
        return self.reward(problem, samples if self.per_group else samples[0], **self.arguments)

    def read(self, value: object, samples: Sequence[Trajectory]) -> list[RewardOutcome]:
        """Read an outcome for each sample."""
        return read_outcomes(value, len(samples)) if self.per_group else [read_outcome(value)]

    def raised(self, error: BaseException, samples: Sequence[Trajectory]) -> list[RewardOutcome]:
        """Return the outcomes of a call that raised."""
        detail = describe_exception(error, self.secrets)
        return [Unscored(Cause.REWARD_RAISED, detail)] * len(samples)


def _answer_each(caller: _RewardCaller, calls: Calls, sink: BinaryIO) -> None:
    """Answer one call after the other."""
    while True:
        number, (problem, samples) = calls.get()
        # Should the parent be gone while compiled code lets no other thread run, this ends us.
        signal.setitimer(signal.ITIMER_REAL, caller.timeout_seconds + OVERTIME_SECONDS)
        try:
            outcomes = caller.read(caller.call(problem, samples), samples)
        except BaseException as error:  # noqa: BLE001 - also a reward that calls sys.exit
            outcomes = caller.raised(error, samples)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(sink, number, outcomes=[asdict(outcome) for outcome in outcomes])


async def _answer_all(caller: _RewardCaller, calls: Calls, sink: BinaryIO) -> None:
    """Answer all calls as they come, many at once."""
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[None]] = set()

    async def answer(number: int, problem: Problem, samples: Sequence[Trajectory]) -> None:
        limit = asyncio.timeout(caller.timeout_seconds)
        try:
            async with limit:
                value = caller.call(problem, samples)
                if hasattr(value, "__await__"):
                    value = await value
                outcomes = caller.read(value, samples)
        except BaseException as error:  # noqa: BLE001 - as above
            outcomes = caller.raised(error, samples)
            if limit.expired():
                late = f"no reward within {caller.timeout_seconds:g} s"
                outcomes = [Unscored(Cause.REWARD_TIMEOUT, late)] * len(samples)
        _reply(sink, number, outcomes=[asdict(outcome) for outcome in outcomes])

    def begin(number: int, problem: Problem, samples: Sequence[Trajectory]) -> None:
        task = loop.create_task(answer(number, problem, samples))
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    def pass_on() -> None:
        while True:
            number, (problem, samples) = calls.get()
            loop.call_soon_threadsafe(begin, number, problem, samples)

    threading.Thread(target=pass_on, daemon=True).start()
    await loop.create_future()


def main() -> None:
    """Load the reward named first, say so, then answer calls."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    calls: Calls = SimpleQueue()
    threading.Thread(target=_read_calls, args=(source, calls), daemon=True).start()
    secrets = secret_values(os.environ)
    number, setup = calls.get()
    try:
        reward = load_reward(setup["name"])
        check_arguments(setup["name"], reward, setup["arguments"])
    except RewardError as error:
        _reply(sink, number, refused=error.reason)
        return
    caller = _RewardCaller(
        reward, setup["arguments"], setup["per_group"], setup["timeout_seconds"], secrets
    )
    _reply(sink, number, is_async=is_async(reward))
    if is_async(reward):
        asyncio.run(_answer_all(caller, calls, sink))
    else:
        _answer_each(caller, calls, sink)


if __name__ == "__main__":
    main()
