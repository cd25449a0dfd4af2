"""An event loop whose time is a number, and processes in it that can be killed and stopped.

The clock jumps to the next timer. What would run in a thread runs in line. A process is a context:
every step of its coroutines asks first whether it still lives, so a kill is one at any await, and
nothing of it runs afterwards, no `finally` either; a stopped one goes on where it was.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""The moment at which every world begins."""
PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class HangError(Exception):
    """Nothing is ready and nothing is scheduled: whoever waits, waits for ever."""


class NumberedTask(asyncio.Task):  # type: ignore[type-arg]
    """A task that sets keep in the order in which tasks were made, not by its address."""

    _numbers = itertools.count()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._number = next(NumberedTask._numbers)
        super().__init__(*arguments, **named)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(eq=False)
class Process:
    """One process of one host; `surprises` are what happens to it, each before its n-th step."""

    name: str
    host: str
    number: int
    clock_ahead_seconds: float = 0.0
    world: Any = None
    may_go_back: bool = False
    """It was told to by a person, who rolls back."""
    is_dead: bool = False
    is_buried: bool = False
    is_stopped: bool = False
    steps: int = 0
    began_at: float = 0.0
    surprises: dict[int, Callable[[Process], None]] = field(default_factory=dict)
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def kill(self) -> None:
        """End it as SIGKILL does."""
        self.is_dead = True
        self.ended.set()


def moment(ahead_seconds: float = 0.0) -> datetime:
    """Return the moment that it is, as a clock shows it that is ahead."""
    return EPOCH + timedelta(seconds=asyncio.get_running_loop().time() + ahead_seconds)


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs what is ready, then lets its clock jump to what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0
        self.after_pass: Callable[[], None] = lambda: None
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._seconds

    def run_in_executor(self, executor: Any, func: Any, *arguments: Any) -> Any:
        """In line; the answer comes with the next pass, as from a thread."""
        future = self.create_future()
        try:
            answer = func(*arguments)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever awaits it
            self.call_soon(_settle, future, None, error)
        else:
            self.call_soon(_settle, future, answer, None)
        return future

    def stop_process(self, process: Process, seconds: float) -> None:
        """Let nothing of it run for a while, as SIGSTOP does."""
        process.is_stopped = True
        self.call_later(seconds, self._go_on, process, context=Context())

    async def bury(self, processes: list[Process]) -> None:
        """End the coroutines of dead processes, none of whose calls goes out any more."""
        for process in processes:
            process.is_buried = process.is_dead = True
            self._go_on(process)
        await asyncio.sleep(0)  # what has not begun begins, or Python complains of its arguments
        for _ in range(50):
            left = [task for process in processes for task in process.tasks if not task.done()]
            if not left:
                return
            for task in left:
                task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)

    def _go_on(self, process: Process) -> None:
        process.is_stopped = False
        self._ready.extend(process.held)  # type: ignore[attr-defined]
        process.held.clear()

    def _make_task(self, loop: Any, coroutine: Any, context: Context | None = None) -> Any:
        task = NumberedTask(coroutine, loop=loop, context=context)
        process = context.get(PROCESS) if context is not None else PROCESS.get()
        if process is not None:
            process.tasks.append(task)
        return task

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise HangError
            self._seconds = max(self._seconds, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._seconds:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled and self._may_run(handle):
                handle._run()
        self.after_pass()

    def _may_run(self, handle: Any) -> bool:
        process: Process | None = handle._context.get(PROCESS)
        if process is None or process.is_buried:
            return True
        if not process.is_dead and not process.is_stopped:
            process.steps += 1
            surprise = process.surprises.pop(process.steps, None)
            if surprise is not None:
                surprise(process)
        if process.is_dead or process.is_stopped:
            process.held.append(handle)
            return False
        return True


def _settle(future: asyncio.Future[Any], answer: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(answer)
    elif isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)
