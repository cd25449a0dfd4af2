"""Score: a reward and an advantage for every sample that has an answer.

Built-in rewards run here; a user's own runs in processes of its own, under a time limit, so that
one that hangs, raises, dies or returns nonsense costs one sample, marked, and never a batch.
"""

import asyncio
import contextlib
import json
import os
import pickle
import signal
import struct
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from hotload.advantages import advantages
from hotload.errors import RewardError
from hotload.faults import Cause
from hotload.rewards import BUILT_INS, as_number, check_arguments, load_reward
from hotload.spec import RewardSpec
from hotload.trajectories import Problem, ScoredGroup, Trajectory, TrajectoryGroup
from hotload.wire import fireworks
from tasks.overlap import overlap

WORKER_COUNT = 2
START_TIMEOUT_SECONDS = 120.0
REPLY_LIMIT_BYTES = 64 << 10
LENGTH = struct.Struct(">I")

Scored = tuple[Trajectory, float | None]


class Scorer:
    """Scores groups by one declared reward; made by `open_scorer`."""

    def __init__(self, reward: RewardSpec) -> None:
        self._spec = reward
        self._is_built_in = reward.name in BUILT_INS
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()

    async def start(self) -> None:
        """Look at the reward before anything is sampled.

        Raises:
            RewardError: unknown, not importable, or it cannot take the declared arguments.
        """
        if ":" not in self._spec.name:
            check_arguments(self._spec.name, load_reward(self._spec.name), self._spec.arguments)
            return
        workers = [_Worker(self._spec) for _ in range(WORKER_COUNT)]
        for worker in workers:
            self._idle.put_nowait(worker)
        await workers[0].start()

    async def stop(self) -> None:
        """End the reward's processes."""
        while not self._idle.empty():
            await self._idle.get_nowait().stop()

    async def score(self, groups: Iterable[TrajectoryGroup]) -> tuple[ScoredGroup, ...]:
        """The groups with rewards and advantages; what could not be scored is marked with its
        cause.
        """
        groups = tuple(groups)
        samples = [(group.problem, one) for group in groups for one in group.trajectories_G]
        if self._is_built_in:
            reward = load_reward(self._spec.name)
            scored = [self._call(reward, problem, sample) for problem, sample in samples]
        else:
            scored = await overlap(self._send(problem, sample) for problem, sample in samples)
        remaining = iter(scored)
        return tuple(
            _scored_group(group.problem, [next(remaining) for _ in group.trajectories_G])
            for group in groups
        )

    def _call(self, reward: Any, problem: Problem, sample: Trajectory) -> Scored:
        if sample.failure is not None:
            return sample, None
        try:
            number = as_number(reward(problem, sample, **self._spec.arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, the sample is what failed
            return _marked(sample, Cause.REWARD_RAISED, f"{type(error).__name__}: {error}"), None
        if number is None:
            return _marked(sample, Cause.REWARD_NOT_A_NUMBER, ""), None
        return sample, number

    async def _send(self, problem: Problem, sample: Trajectory) -> Scored:
        if sample.failure is not None:
            return sample, None
        worker = await self._idle.get()
        try:
            reply = await worker.call(problem, sample)
        finally:
            self._idle.put_nowait(worker)
        if isinstance(reply, float):
            return sample, reply
        return _marked(sample, *reply), None


@asynccontextmanager
async def open_scorer(reward: RewardSpec) -> AsyncIterator[Scorer]:
    """A scorer, looked at before use; its processes end with it.

    Raises:
        RewardError: as `Scorer.start`.
    """
    scorer = Scorer(reward)
    try:
        await scorer.start()
        yield scorer
    finally:
        await scorer.stop()


def _marked(sample: Trajectory, cause: Cause, detail: str) -> Trajectory:
    # A reward's own text may hold what no file can: halves of surrogate pairs.
    readable = detail[:200].encode("utf-8", "replace").decode()
    return replace(sample, failure=cause.value, detail=readable)


def _scored_group(problem: Problem, scored_G: list[Scored]) -> ScoredGroup:
    rewards_G = tuple(reward for _, reward in scored_G)
    return ScoredGroup(
        problem, tuple(sample for sample, _ in scored_G), rewards_G, advantages(rewards_G)
    )


class _Worker:
    """One process that runs the reward, started when needed and again after it was ended."""

    def __init__(self, reward: RewardSpec) -> None:
        self._reward = reward
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and have it import the reward.

        Raises:
            RewardError: it cannot, or not within 120 s.
        """
        environment = {
            # What a reward says is stored, so it does not get the service's key.
            **{k: v for k, v in os.environ.items() if k != fireworks.API_KEY_VARIABLE},
            "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
        }
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tasks.reward_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                answer = await self._exchange((self._reward.name, self._reward.arguments))
        except (OSError, EOFError, TimeoutError):
            await self.stop()
            reason = "its process ended, or did not import it in time"
            raise RewardError(self._reward.name, reason) from None
        if "refused" in answer:
            await self.stop()
            raise RewardError(self._reward.name, str(answer["refused"]))

    async def call(self, problem: Problem, sample: Trajectory) -> float | tuple[Cause, str]:
        """The reward as a finite number, or why there is none. Leaves a process only if it
        answered.
        """
        try:
            if self._process is None:
                await self.start()
            async with asyncio.timeout(self._reward.timeout_seconds):
                answer = await self._exchange((problem, sample))
        except TimeoutError:
            await self.stop()
            limit = f"no reward within {self._reward.timeout_seconds:g} s"
            return Cause.REWARD_TIMEOUT, limit
        except (OSError, EOFError, RewardError) as error:
            await self.stop()
            return Cause.REWARD_CRASHED, f"its process ended: {error}"
        except BaseException:
            await self.stop()
            raise
        if "reward" in answer:
            return float(answer["reward"])
        if "raised" in answer:
            return Cause.REWARD_RAISED, str(answer["raised"])
        return Cause.REWARD_NOT_A_NUMBER, str(answer.get("not_a_number"))

    async def _exchange(self, call: object) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError("no process")
        data = pickle.dumps(call)
        process.stdin.write(LENGTH.pack(len(data)) + data)
        await process.stdin.drain()
        (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        if size > REPLY_LIMIT_BYTES:
            raise EOFError("a reply is too long")
        return json.loads(await process.stdout.readexactly(size))

    async def stop(self) -> None:
        """End the process and whatever it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()
