"""The child process that samples some parts of a rollout:
`python -m hotload.sampling.processes.worker`.

It opens the rollout of its parts as a cycle's own process does. What is judged over all processes
it reports to its coordinator: files, for the manifest; rows and requests, for the breaker; what a
person is to see. It ends when its coordinator does, in the middle of whatever it samples.
"""

import asyncio
import logging
import os
import pickle
import threading
from typing import Any, BinaryIO

from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import RolloutPart
from hotload.errors import HotLoadError
from hotload.options import Concurrency
from hotload.rollout.breaker import Breaker
from hotload.rollout.failures import Failure
from hotload.rollout.window import Attempt, Window
from hotload.sampling.part_carrier import CarriedPart, RolloutState, Together
from hotload.sampling.processes.messages import pack_message
from hotload.sampling.processes.work import SamplingWork
from hotload.sampling.rollout import Rollout, SampledService, open_rollout
from hotload.sampling.stamp import Stamp

_Calls = asyncio.Queue[tuple[int, str, tuple[Any, ...]] | None]

logger = logging.getLogger(__name__)


class _Sender:
    """Sends messages to the coordinator, from any thread."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink, self._lock = sink, threading.Lock()

    def __call__(self, kind: str, *values: Any) -> None:
        message = pack_message((kind, *values))
        with self._lock:
            self._sink.write(message)
            self._sink.flush()

    def fail(self, number: int, error: Exception) -> None:
        """Send the error that a call met; one of somebody else's may not survive the way."""
        if not isinstance(error, HotLoadError):
            logger.error("%s", error, exc_info=error)
            error = RuntimeError(f"{type(error).__name__}: {error}")
        self("error", number, error)


class _ReportingTogether(Together):
    """Reports to the coordinator, which writes the manifest, what there is of these parts."""

    def __init__(self, work: SamplingWork, send: _Sender) -> None:
        super().__init__(work.plan, work.store)
        self._send = send
        self._counts: dict[int, int] = {}

    async def tell(self) -> None:
        for writer in self.writers:
            number, count = writer.part.number, len(writer.parts)
            if writer.is_read and self._counts.get(number) != count:
                self._counts[number] = count
                self._send("files", number, tuple(writer.parts), writer.found, writer.extracts)

    def say(self, state: RolloutState) -> None:
        self._send("state", state)


class _Notes:
    """Reports to the coordinator what has ended: all of one moment in one message."""

    def __init__(self, send: _Sender) -> None:
        self._send = send
        self._notes: list[tuple[str, tuple[Any, ...]]] = []

    def add(self, kind: str, *noted: Any) -> None:
        if not self._notes:
            asyncio.get_running_loop().call_soon(self._pass_on)
        self._notes.append((kind, noted))

    def _pass_on(self) -> None:
        notes, self._notes = self._notes, []
        self._send("notes", notes)


class _ReportingBreaker(Breaker):
    """Reports what ended; the coordinator opens it."""

    def __init__(self, notes: _Notes, *, is_open: bool) -> None:
        super().__init__()
        self.is_open, self._notes = is_open, notes

    def note(self, *, is_failure: bool) -> None:
        self._notes.add("row", is_failure)

    def note_request(self, failure: Failure | None, *, met_swap: bool) -> None:
        self._notes.add("request", failure, met_swap)


class _ReportingWindow(Window):
    """Reports how attempts ended; the coordinator says how many slots there are."""

    def __init__(self, notes: _Notes, spec: Concurrency, slots: int) -> None:
        self.slots, self._notes = slots, notes
        super().__init__(spec)

    @property
    def size(self) -> int:
        return self.slots

    @property
    def widest(self) -> int:
        return max(super().size, self._spec.max_window)

    def release(self, attempt: Attempt, now: float) -> None:
        self._notes.add("attempt", attempt, self.in_flight)
        self.abandon()

    def note_exhaustion(self) -> None:
        self._notes.add("exhaustion")


class _ReportingHandler(logging.Handler):
    """Hands what is logged here to the coordinator, whose log a person reads."""

    def __init__(self, send: _Sender) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", record.levelno, self.format(record))


class _Answers:
    """Answers the calls of the coordinator, each by the method of its name."""

    def __init__(
        self, work: SamplingWork, rollout: Rollout, breaker: Breaker, window: _ReportingWindow
    ) -> None:
        self._numbers = [part.number for part in work.plan.parts]
        self._rollout, self._breaker, self._window = rollout, breaker, window

    async def carry_part(self, number: int) -> CarriedPart:
        return await self._rollout.carry_part(number)

    # A process in the place of a lost one samples again what that one had not written.

    async def write_part(self, number: int) -> tuple[RolloutPart, ...]:
        await self._rollout.carry_part(number)
        return await self._rollout.write_part(number)

    async def keep_unanswered(self) -> None:
        await overlap(self._rollout.carry_part(number) for number in self._numbers)
        await self._rollout.keep_unanswered()

    async def take_stamp(self, stamp: Stamp) -> None:
        self._rollout.take_stamp(stamp)

    async def have_slots(self, slots: int) -> None:
        self._window.slots = slots
        self._rollout.let_in()

    async def open_breaker(self) -> None:
        self._breaker.is_open = True


async def _work(work: SamplingWork, source: BinaryIO, send: _Sender) -> None:
    calls: _Calls = asyncio.Queue()
    reading = (source, calls, asyncio.get_running_loop())
    threading.Thread(target=_read_calls, args=reading, daemon=True).start()
    notes = _Notes(send)
    breaker = _ReportingBreaker(notes, is_open=work.is_breaker_open)
    window = _ReportingWindow(notes, work.spec.sampling.concurrency, work.slots)
    try:
        async with open_rollout(
            work.spec,
            work.plan,
            SampledService(work.client, work.plan.identity),
            work.store,
            logger,
            together=_ReportingTogether(work, send),
            breaker=breaker,
            window=window,
        ) as rollout:
            rollout.take_stamp(work.stamp)
            send("answer", 0, None)
            await _answer_all(_Answers(work, rollout, breaker, window), calls, send)
    except Exception as error:  # noqa: BLE001 - the coordinator is who raises it
        send.fail(0, error)


def _read_calls(source: BinaryIO, calls: _Calls, loop: asyncio.AbstractEventLoop) -> None:
    try:
        while True:
            loop.call_soon_threadsafe(calls.put_nowait, pickle.load(source))
    finally:  # the coordinator is gone: what goes on being sampled would be nobody's
        os._exit(1)


async def _answer_all(answers: _Answers, calls: _Calls, send: _Sender) -> None:
    """Answer calls side by side until there are no more; what is under way then is given up."""

    async def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answered = await getattr(answers, method)(*arguments)
        except Exception as error:  # noqa: BLE001 - as above
            send.fail(number, error)
        else:
            send("answer", number, answered)

    under_way: set[asyncio.Task[None]] = set()
    while (call := await calls.get()) is not None:
        task = asyncio.create_task(answer(*call))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    for task in under_way:
        task.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)


def main() -> None:
    """Read the work, and answer calls about it."""
    source, send = os.fdopen(os.dup(0), "rb"), _Sender(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    logging.basicConfig(handlers=[_ReportingHandler(send)])
    logger.setLevel(logging.INFO)
    asyncio.run(_work(pickle.load(source), source, send))


if __name__ == "__main__":
    main()
