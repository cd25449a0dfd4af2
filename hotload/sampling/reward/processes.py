"""Run a user's own reward in processes that can be ended.

A plain function has a process to itself while it is called; of an async one many calls are under
way in one process. When a process dies, or hangs, with several calls in it, each of them is made
again alone: so the one that brought it down is found, and costs no other sample its reward.
docs/decisions/0014-reward-processes.md says why no library's pool does this.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import pickle
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

from hotload.clients.redaction import redact
from hotload.errors import RewardError
from hotload.options import RewardSpec
from hotload.publish.doors.api_dialect import API_DIALECTS
from hotload.reward.outcome import RewardOutcome, Score, Unscored
from hotload.rollout.failures import Cause
from hotload.rollout.trajectory import Problem, Trajectory
from hotload.sampling.reward.calls import score_by_calls
from hotload.sampling.reward.user_errors import secret_values

logger = logging.getLogger(__name__)

PROCESS_COUNT = min(8, max(2, os.cpu_count() or 2))
CALLS_PER_ASYNC_PROCESS = 32
START_TIMEOUT_SECONDS = 120.0
ASYNC_GRACE_SECONDS = 1.0
END_TIMEOUT_SECONDS = 5.0
LAST_WORDS_SECONDS = 1.0
REPLY_LIMIT_BYTES = 16 << 20
PRINT_PIECE_BYTES = 64 << 10
PRINT_LIMIT_BYTES_PER_CALL = 4 << 10
PRINT_LIMIT_BYTES = 1 << 20
SERVICE_KEYS = {dialect.key_variable for dialect in API_DIALECTS.values()}
# Keys to the weights, the store and the server; a judge's has another name, or is asked for.
WITHHELD_PREFIXES = (
    "AWS_",
    "AZURE_",
    "CLOUDSDK_",
    "COREWEAVE_",
    "FIREWORKS_",
    "FSSPEC_",
    "GOOGLE_",
    "HOTLOAD_",
    "PREFECT_API_",
)


def reward_environment(reward: RewardSpec, own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a reward's process: all of ours but the service's and the cloud's
    variables that the spec does not ask for.

    Raises:
        RewardError: one it asks for is not set, or is a service's key: what a reward says is
            stored.
    """
    for name in reward.environment:
        if name in SERVICE_KEYS:
            raise RewardError(reward.name, f"`environment`: {name} is never handed on")
        if name not in own:
            raise RewardError(reward.name, f"`environment`: {name} is not set here")
    return {
        name: value
        for name, value in own.items()
        if name in reward.environment or not name.startswith(WITHHELD_PREFIXES)
    }


_KEPT: ContextVar[defaultdict[str, list["RewardProcesses"]] | None] = ContextVar(
    "_KEPT", default=None
)


@asynccontextmanager
async def keep_reward_processes() -> AsyncIterator[None]:
    """Keep processes that a scorer has ended with for the next one of the same reward: a start
    costs about half a second. They end with the outermost of these.
    """
    if _KEPT.get() is not None:
        yield
        return
    kept: defaultdict[str, list[RewardProcesses]] = defaultdict(list)
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)
        for each in [one for idle in kept.values() for one in idle]:
            await each.end()


class RewardProcesses:
    """Scores by one declared reward that is imported in processes of its own."""

    @classmethod
    def of(cls, reward: RewardSpec) -> "RewardProcesses":
        """Take those that are kept of this reward, or make others."""
        kept = _KEPT.get()
        idle = None if kept is None else kept[reward.model_dump_json()]
        return idle.pop() if idle else cls(reward)

    def __init__(self, reward: RewardSpec) -> None:
        self._spec = reward
        self._prints = _Prints(reward.name)
        self._slots = [_Slot(reward, self._prints) for _ in range(PROCESS_COUNT)]
        # The last one given back is taken first, so that no more are started than are needed.
        self._free: asyncio.LifoQueue[_Slot] = asyncio.LifoQueue()
        self._apart = _Slot(reward, self._prints)
        self._one_at_a_time = asyncio.Lock()

    async def start(self) -> None:
        """Import the reward in a first process.

        Raises:
            RewardError: it cannot be used.
        """
        first = await self._slots[0].process()
        self._free = asyncio.LifoQueue()
        for slot in reversed(self._slots):
            for _ in range(CALLS_PER_ASYNC_PROCESS if first.is_async else 1):
                self._free.put_nowait(slot)

    async def score_samples(
        self, problem: Problem, samples: Sequence[Trajectory]
    ) -> list[RewardOutcome]:
        """Return an outcome for each sample: by one call, or by one call each."""
        return await score_by_calls(self._spec, self._call, problem, samples)

    async def _call(self, problem: Problem, samples: Sequence[Trajectory]) -> list[RewardOutcome]:
        slot = await self._free.get()
        try:
            answer = await slot.call(problem, samples)
        finally:
            self._free.put_nowait(slot)
        if isinstance(answer, _Lost) and answer.was_shared:
            async with self._one_at_a_time:
                answer = await self._apart.call(problem, samples)
        return [answer.unscored] * len(samples) if isinstance(answer, _Lost) else answer

    async def stop(self) -> None:
        """Keep the processes where that is asked for, or end them."""
        if (kept := _KEPT.get()) is None:
            await self.end()
            return
        self._prints.conclude()
        kept[self._spec.model_dump_json()].append(self)

    async def end(self) -> None:
        """End the processes, whatever they do."""
        for slot in (*self._slots, self._apart):
            await slot.clear()
        self._prints.conclude()


class _Prints:
    """Passes on what a reward prints, up to a limit, and counts the rest: for 8 samples one wrote
    80 MB into a worker's log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._left = PRINT_LIMIT_BYTES
        self._left_out = 0

    def pass_on(self, piece: bytes, room: int) -> None:
        """Write a piece to standard error as far as there is `room`, for its call and for all."""
        shown = piece[: max(0, min(room, self._left))]
        self._left -= len(shown)
        self._left_out += len(piece) - len(shown)
        with contextlib.suppress(OSError):
            os.write(2, shown)

    def conclude(self) -> None:
        """Log how much was left out, if anything was, and begin anew."""
        self._left = PRINT_LIMIT_BYTES
        if self._left_out:
            logger.warning(
                "reward %r: %d bytes that it printed are left out; shown are at most %d a sample,"
                " and %d of all",
                self._name,
                self._left_out,
                PRINT_LIMIT_BYTES_PER_CALL,
                PRINT_LIMIT_BYTES,
            )
            self._left_out = 0


@dataclass(frozen=True, slots=True)
class _Lost:
    """A call was under way when its process ended, or was ended; shared with others or not."""

    unscored: Unscored
    was_shared: bool = False


class _Slot:
    """A place for one process, which is started when needed and again after it was lost."""

    def __init__(self, reward: RewardSpec, prints: _Prints) -> None:
        self._spec = reward
        self._prints = prints
        self._process: _Process | None = None
        self._starting = asyncio.Lock()

    async def process(self) -> "_Process":
        """Return the process with the reward imported; raises RewardError where it cannot be."""
        async with self._starting:
            if self._process is None or self._process.lost is not None:
                await self.clear()
                self._process = await _Process.start(self._spec, self._prints)
            return self._process

    async def clear(self) -> None:
        """End the process if there is one."""
        process, self._process = self._process, None
        if process is not None:
            await process.end()

    async def call(
        self, problem: Problem, samples: Sequence[Trajectory]
    ) -> list[RewardOutcome] | _Lost:
        """Return what the reward says of the samples within its time limit."""
        try:
            process = await self.process()
        except RewardError as error:
            return _Lost(Unscored(Cause.REWARD_CRASHED, error.reason))
        limit = self._spec.timeout_seconds
        late = Unscored(Cause.REWARD_TIMEOUT, f"no reward within {limit:g} s")
        # An async call keeps its own time, unless another holds up the process.
        grace = ASYNC_GRACE_SECONDS if process.is_async else 0.0
        answer = await process.ask((problem, samples), limit + grace, late)
        if isinstance(answer, _Lost):
            return answer
        return [_read_outcome(outcome, process.secrets) for outcome in answer["outcomes"]]


def _read_outcome(outcome: dict[str, Any], secrets: Sequence[str]) -> RewardOutcome:
    if "reward" in outcome:
        return Score(outcome["reward"], outcome["parts"])
    return Unscored(Cause(outcome["cause"]), redact(outcome["detail"], secrets))


class _Process:
    """One process, from its start to its end. It answers calls in any order."""

    def __init__(
        self, child: asyncio.subprocess.Process, secrets: Sequence[str], prints: _Prints
    ) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        self._child, self._stdin, self._stdout = child, child.stdin, child.stdout
        self.secrets = secrets
        self.is_async = False
        self.lost: _Lost | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any] | _Lost]] = {}
        self._listening = asyncio.create_task(self._listen())
        self._printed_bytes = 0
        self._passing_on = asyncio.create_task(self._pass_on(child.stderr, prints))

    @classmethod
    async def start(cls, reward: RewardSpec, prints: _Prints) -> Self:
        """Start a process that has imported the reward.

        Raises:
            RewardError: it cannot, or not within 120 s.
        """
        environment = reward_environment(reward, os.environ)
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hotload.sampling.reward.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=REPLY_LIMIT_BYTES,
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
            },
            start_new_session=True,
        )
        process = cls(child, secret_values(environment), prints)
        setup = {
            "name": reward.name,
            "arguments": reward.arguments,
            "per_group": reward.per_group,
            "timeout_seconds": reward.timeout_seconds,
        }
        late = Unscored(Cause.REWARD_TIMEOUT, f"not imported within {START_TIMEOUT_SECONDS:g} s")
        try:
            answer = await process.ask(setup, START_TIMEOUT_SECONDS, late)
        except BaseException:
            await process.end()
            raise
        if isinstance(answer, _Lost):
            answer = {"refused": answer.unscored.detail}
        if "refused" in answer:
            await process.end()
            raise RewardError(reward.name, redact(answer["refused"], process.secrets))
        process.is_async = answer["is_async"]
        return process

    async def ask(
        self, call: object, limit_seconds: float, late: Unscored
    ) -> dict[str, Any] | _Lost:
        """Return the answer to one call; `_Lost` when the process ends first, or is ended because
        the call is `late`.
        """
        if self.lost is not None:
            return self.lost
        number = next(self._numbers)
        self._printed_bytes = 0
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(limit_seconds):
                self._stdin.write(pickle.dumps((number, call)))
                with contextlib.suppress(ConnectionError):  # lost: the listener says so
                    await self._stdin.drain()
                return await answer
        except TimeoutError:
            return self.lose(late)
        except BaseException:
            if not self.is_async:  # what is under way can only be ended with the process
                self.lose(late)
            raise
        finally:
            self._waiting.pop(number, None)

    async def _listen(self) -> None:
        # ValueError: a line that is no JSON, or longer than the limit.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            while line := await self._stdout.readline():
                answer = json.loads(line)
                waiting = self._waiting.pop(answer["call"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        how = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                code = await self._child.wait()
                how = f" with signal {-code}" if code < 0 else f" with exit code {code}"
        self.lose(Unscored(Cause.REWARD_CRASHED, f"its process ended{how}"))

    async def _pass_on(self, source: asyncio.StreamReader, prints: _Prints) -> None:
        while piece := await source.read(PRINT_PIECE_BYTES):
            prints.pass_on(piece, PRINT_LIMIT_BYTES_PER_CALL - self._printed_bytes)
            self._printed_bytes += len(piece)

    def lose(self, reason: Unscored) -> _Lost:
        """Kill the process with all it started, and tell the calls that wait for it."""
        if self.lost is None:
            self.lost = _Lost(reason, was_shared=len(self._waiting) > 1)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result(self.lost)
        return self.lost

    async def end(self) -> None:
        """End the process, if it has not ended, and let go of its pipes."""
        self.lose(Unscored(Cause.REWARD_CRASHED, "its process was ended"))
        self._stdin.close()
        self._listening.cancel()
        # Its last words are read to their end, unless a child of its own holds the pipe open.
        await asyncio.wait([self._passing_on], timeout=LAST_WORDS_SECONDS)
        self._passing_on.cancel()
        await asyncio.wait([self._listening, self._passing_on])
        # A child that left the process group may hold the pipes open.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_SECONDS):
                await self._child.wait()
