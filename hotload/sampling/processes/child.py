"""A sampling process as its coordinator sees it: started, called, lost, ended."""

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any, Self

from hotload.sampling.processes.messages import read_message

END_SECONDS = 60.0

Take = Callable[[str, tuple[Any, ...]], None]


class ProcessLostError(Exception):
    """A sampling process ended before it answered; the text says how."""


class SamplingProcess:
    """One process, from its start to its end. It answers calls in any order."""

    def __init__(self, child: asyncio.subprocess.Process, take: Take) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._child, self._stdin, self._stdout = child, child.stdin, child.stdout
        self._take = take
        self.lost: ProcessLostError | None = None
        """How it ended, once it has."""
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, take: Take) -> Self:
        """Start a process, and have `take` told what it says unasked.

        It has our environment; what its blocks hold comes with its work, over a pipe. A Ctrl-C is
        not for it: who gets that one ends it.
        """
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hotload.sampling.processes.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            start_new_session=True,
        )
        return cls(child, take)

    async def begin(self, work: object) -> None:
        """Hand it its work, and wait until it can sample.

        Raises:
            ProcessLostError: it ended.
            RewardError, RolloutFunctionError, ServiceRefusedError: as `open_rollout`.
        """
        await self._answer(next(self._numbers), work)

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Return the answer to a call.

        Raises:
            ProcessLostError: it ended.
            HotLoadError: as the method there.
        """
        number = next(self._numbers)
        return await self._answer(number, (number, method, arguments))

    def tell(self, method: str, *arguments: Any) -> None:
        """Make a call whose answer nobody waits for."""
        self._send((next(self._numbers), method, arguments))

    async def _answer(self, number: int, message: object) -> Any:
        if self.lost is not None:
            raise self.lost
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            return await answer
        finally:
            del self._waiting[number]

    def _send(self, message: object) -> None:
        if self.lost is None:
            self._stdin.write(pickle.dumps(message))

    async def _listen(self) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                while True:
                    kind, *values = await read_message(self._stdout)
                    if kind in ("answer", "error"):
                        self._settle(*values, is_error=kind == "error")
                    else:
                        self._take(kind, tuple(values))
        finally:  # whatever it was: nobody waits for ever
            self._kill()  # it may have closed its output alone
            code = await self._child.wait()
            self.lost = ProcessLostError(f"signal {-code}" if code < 0 else f"exit code {code}")
            for number in list(self._waiting):
                self._settle(number, self.lost, is_error=True)

    def _settle(self, number: int, value: Any, *, is_error: bool) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return
        if is_error:
            answer.set_exception(value)
        else:
            answer.set_result(value)

    def _kill(self) -> None:
        if self.lost is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Have it give up what is under way and write what has ended; after a minute it is killed,
        with all it started."""
        try:
            self._send(None)
            await asyncio.wait([self._listening], timeout=END_SECONDS)
        finally:
            self._kill()
            self._stdin.close()
            await asyncio.wait([self._listening])
