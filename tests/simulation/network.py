"""The wires: what becomes of a call on its way to the store or the service, and of its answer.

The far end works in the world's own context: once a request has left a process, killing that
process does not stop it, and an answer may find nobody.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from tests.simulation.loop import PROCESS, Process

STORE, SERVICE = "store", "service"
QUICK_SECONDS = (0.002, 0.04)


@dataclass
class WireFault:
    """An order: the next `left` calls that match, after `after` of them, fare like this.

    `how`: `unsent` (no connection), `unanswered` (done, the answer is lost), `late` (the request
    arrives `seconds` later), `slow` (the answer does), `twice` (a second copy arrives `seconds`
    later), `refused` (the store says `status`), `short` (half the bytes arrive), `lie` (a replica
    is shown as if it served its target).
    """

    kind: str
    where: str
    how: str
    operations: tuple[str, ...] = ()
    path: str = ""
    left: int = 1
    after: int = 0
    seconds: float = 0.0
    status: int = 503

    def matches(self, where: str, operation: str, path: str) -> bool:
        return (
            self.left > 0
            and self.where == where
            and (not self.operations or operation in self.operations)
            and path.startswith(self.path)
        )


class StatusError(Exception):
    """An answer of a store with a status of its own, in the form that botocore gives it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        code = {503: "SlowDown", 403: "AccessDenied"}.get(status, "InternalError")
        self.response = {
            "Error": {"Code": code},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


class Network:
    """Carries calls, each with its delays from the seed."""

    def __init__(
        self, seed: int, note: Callable[[str], None], struck: Callable[[str], None]
    ) -> None:
        self._random = random.Random(f"network {seed}")
        self._note, self._struck = note, struck
        self.faults: list[WireFault] = []
        self._under_way: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        """Run in the world's own context."""
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard, context=Context())

    async def end(self) -> None:
        """Let nothing arrive any more."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def call(
        self,
        where: str,
        operation: str,
        path: str,
        effect: Callable[[WireFault | None], Awaitable[Any]],
        lost: Callable[[], Exception],
    ) -> Any:
        """Send a call, and return or raise what comes back."""
        process = PROCESS.get()
        if process is not None and process.is_buried:
            raise asyncio.CancelledError
        fault = self._take(where, operation, path)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.spawn(self._carry((process, where, operation, path), effect, fault, answer, lost))
        return await answer

    def _take(self, where: str, operation: str, path: str) -> WireFault | None:
        for fault in self.faults:
            if fault.matches(where, operation, path):
                if fault.after:
                    fault.after -= 1
                    continue
                fault.left -= 1
                self._struck(fault.kind)
                return fault
        return None

    async def _carry(
        self,
        what: tuple[Process | None, str, str, str],
        effect: Callable[[WireFault | None], Awaitable[Any]],
        fault: WireFault | None,
        answer: asyncio.Future[Any],
        lost: Callable[[], Exception],
    ) -> None:
        process, where, operation, path = what
        name = process.name if process else "world"
        how = fault.how if fault else ""
        there, back = self._random.uniform(*QUICK_SECONDS), self._random.uniform(*QUICK_SECONDS)
        there += fault.seconds if fault and how == "late" else 0.0
        back += fault.seconds if fault and how == "slow" else 0.0
        await asyncio.sleep(there)
        result: Any = None
        error: BaseException | None = None
        if fault and how == "unsent":
            error = lost()
        elif fault and how == "refused" and where == STORE:
            error = StatusError(fault.status)
        else:
            try:
                result = await effect(fault)
            except Exception as raised:  # noqa: BLE001 - it travels back
                error = raised
            if fault and how == "twice":
                self.spawn(self._again(effect, fault.seconds))
            if how == "unanswered":
                error = lost()
        said = type(error).__name__ if error else "ok"
        self._note(f"{name} {where} {operation} {path} {how} {said}")
        await asyncio.sleep(back)
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    async def _again(
        self, effect: Callable[[WireFault | None], Awaitable[Any]], seconds: float
    ) -> None:
        await asyncio.sleep(seconds)
        try:
            await effect(None)
        except Exception as error:  # noqa: BLE001 - nobody waits for this answer
            self._note(f"a second copy: {type(error).__name__}")
