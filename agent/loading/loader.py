"""One replica on its way from snapshot to snapshot (protocol §5, §9).

What is fetched, merged and kept is the same wherever it runs; how weights come into an engine is
for the class that has one.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agent.loading.bucket import MissingObjectError
from agent.loading.disk import Disk, Load
from hotload.errors import ChainBrokenError, DeltaError, InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.publish.readiness import BASE_WEIGHTS

LOOKS = 3  # a file that is not visible is looked for so often
Result = TypeVar("Result")


def replica_entry(
    readiness: bool,
    current: str | None,
    stage: str,
    target: str | None,
    *,
    error: str = "",
    is_final: bool = False,
) -> dict[str, Any]:
    """Make an entry of `replicas` (protocol §5), with our own fields beside an error: its text, and
    whether every other snapshot of these bytes meets it, too."""
    state: dict[str, Any] = {"stage": stage}
    if target:
        state["target_snapshot_identity"] = target
    if error and stage == "error":
        state |= {"error": error, "final": is_final}
    return {
        "readiness": readiness,
        "current_snapshot_identity": current,
        "loading_state": state,
    }


class Loader(ABC):
    """Loads what it is told, one after the other, and says how far it is. Lives in the event loop.

    `current` is what answers, None for base weights; `target` what `stage` is about. A merge that
    failed leaves the held bytes in doubt: deltas are refused until a full snapshot has arrived.
    """

    def __init__(self, name: str, disk: Disk, threads: Executor) -> None:
        self.name, self._disk, self._threads = name, disk, threads
        self.readiness = True
        self.current: str | None = None
        self.stage, self.target = "idle", ""
        self.starts = 0
        self.loading: str | None = None
        self.applications: list[dict[str, Any]] = []
        self._held: Path | None = None
        self._is_torn = False
        self._task: asyncio.Task[None] | None = None

    def load(self, load: Load) -> None:
        """Begin to load, after whatever this replica does now."""
        self.loading = load.identity
        self._begin(partial(self._load, load))

    def refuse(self, load: Load, reason: str) -> None:
        """Show an error for a load that was never begun."""
        self._fail(load, DeltaError(load.identity, reason))

    def stop(self) -> None:
        """Cancel what is loading; what begins next waits for its thread."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def render(self) -> dict[str, Any]:
        """Show the replica as an entry of `replicas` (protocol §5)."""
        return replica_entry(self.readiness, self.current, self.stage, self.target)

    # For the class with an engine.

    async def _pause(self) -> None:
        """Let time pass between two stages, or between two looks for a file."""
        await asyncio.sleep(0)

    async def _may_begin(self, load: Load) -> bool:
        """Tell whether a load goes on that was pending."""
        await self._pause()
        return True

    async def _may_fetch(self, load: Load) -> None:
        """Return once the load may fetch its files."""
        await self._pause()

    @abstractmethod
    async def _weights(self, load: Load, arrived: Path) -> Any:
        """Make of the directory what the swap needs."""

    @abstractmethod
    async def _swap(self, weights: Any, load: Load, kept: Path) -> None:
        """Let the engine answer with what is kept."""

    def _kept_beside(self, load: Load) -> Sequence[Path | None]:
        """Name what stays on disk beside a snapshot that was just kept."""
        return ()

    def _working(self) -> AbstractContextManager[None]:
        """Count the caller as at work."""
        return nullcontext()

    def _resting(self) -> AbstractContextManager[None]:
        """Let the caller, at work, wait for another."""
        return nullcontext()

    def _note_served(self, load: Load) -> None:  # noqa: B027 - not everybody listens
        """Hear that a load is served."""

    def _note_failed(self, load: Load, detail: str) -> None:  # noqa: B027
        """Hear that a load has failed."""

    # What is the same everywhere.

    def _begin(self, work: Callable[[], Awaitable[object]]) -> None:
        before = self._task

        async def after() -> None:
            with self._working():
                if before is not None and not before.done():
                    with self._resting():
                        await asyncio.wait([before])
                await work()

        self._task = asyncio.create_task(after())

    async def _load(self, load: Load) -> None:
        self.stage, self.target = "pending", load.identity
        try:
            if not await self._may_begin(load):
                return
            self.stage = "downloading"
            await self._may_fetch(load)
            arrived = await self._arrive(load)
            weights = await self._weights(load, arrived)
            kept = await self._keep(load, arrived, "applied")
            await self._swap(weights, load, kept)
        except Exception as error:  # noqa: BLE001 - a replica outlives whatever it has to load
            self._fail(load, error)
        else:
            self._note_served(load)
        self.loading = None

    async def _arrive(self, load: Load) -> Path:
        """The checkpoint or adapter as a directory of this replica's own, not yet kept.

        A delta that cannot be merged leaves the base torn: later deltas fail until a full arrives.
        """
        for look in range(LOOKS):
            try:
                arrived = await self._in_thread(self._disk.fetch, load)
                break
            except MissingObjectError:
                if look + 1 == LOOKS:
                    raise
                await self._pause()
        if load.kind is not SnapshotKind.DELTA:
            return arrived
        if self._is_torn:
            raise DeltaError(load.identity, "the base is torn; a full snapshot is needed")
        if self._held is None or self._held.name != load.previous:
            held = self._held.name if self._held else BASE_WEIGHTS
            raise ChainBrokenError(str(load.previous), held)
        try:
            return await self._in_thread(self._disk.merge, load, arrived, self._held)
        except (DeltaError, InvalidCheckpointError, OSError):
            self._is_torn = True
            raise

    async def _keep(self, load: Load, arrived: Path, result: str) -> Path:
        kept = await self._in_thread(self._disk.keep, load, arrived)
        beside = self._kept_beside(load)
        if load.kind is not SnapshotKind.LORA:
            self._held, self._is_torn = kept, False
        await self._in_thread(self._disk.forget_others, kept, *beside)
        self._log(load, result, None)
        return kept

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread cannot be stopped; what begins next must not meet it in the same directory.
            await asyncio.wait([running])
            raise

    def _fail(self, load: Load, error: Exception) -> None:
        detail = f"{type(error).__name__}: {error}"[:500]
        self.stage, self.target = "error", load.identity
        self._disk.discard(load)
        self._log(load, "error", detail)
        self._note_failed(load, detail)

    def _log(self, load: Load, result: str, detail: str | None) -> None:
        self.applications.append(
            {
                "identity": load.identity,
                "kind": load.kind.value,
                "result": result,
                "detail": detail,
                "start": self.starts,
            }
        )
