"""One serving copy: its own bytes, its stage, its swap (protocol §5, §9, §21)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from emulator.control.clock import Clock
from emulator.control.faults import Faults
from emulator.control.settings import EmulatorConfig
from emulator.engine.engine import Engine
from emulator.failures import RefusedError
from emulator.replicas.adapters import FAILED, LOADING, AdapterSlots, ServedWeights
from emulator.replicas.arrival import Disk, Load
from emulator.replicas.bucket import MissingObjectError, SnapshotBucket
from emulator.replicas.prompt_cache import PromptCache
from emulator.replicas.validation import BaseModel
from hotload.errors import ChainBrokenError, DeltaError, InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.publish.readiness import BASE_WEIGHTS

LOOKS = 3  # a file that is not visible is looked for so often
SPREAD = 0.5  # replica i takes 1 + i/2 times as long for each state
Result = TypeVar("Result")


@dataclass(frozen=True)
class Surroundings:
    """What all replicas of a service share."""

    config: EmulatorConfig
    clock: Clock
    faults: Faults
    bucket: SnapshotBucket
    engine: Engine
    base: BaseModel
    base_weights: Any
    work_dir: Path
    threads: Executor
    on_served: Callable[[str, str], None]
    on_failed: Callable[[str, str, str], None]


class Replica:
    """A replica; `load` and `restart` change what it serves. Lives in the event loop."""

    def __init__(self, index: int, around: Surroundings) -> None:
        self.name, self._around = f"replica-{index}", around
        self._index, self._slowness = index, 1 + SPREAD * index
        hinted = around.work_dir / "hinted"
        self._disk = Disk(
            around.work_dir / self.name, hinted, around.bucket, around.faults, self.name
        )
        self.readiness = True
        self.current: str | None = None
        self.stage, self.target = "idle", ""
        self.adapters = AdapterSlots(around.config.adapter_slots)
        self._plain = around.base_weights
        self.prompt_cache = PromptCache()
        self.in_flight = 0
        self.is_down = False
        self.starts = 0
        self.loading: str | None = None
        self.applications: list[dict[str, Any]] = []
        self._held: Path | None = None
        self._is_torn = False
        self._task: asyncio.Task[None] | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._drained = asyncio.Event()

    @property
    def served(self) -> ServedWeights:
        """What answers where no adapter is named: the newest, else the weights without any."""
        newest = self.adapters.newest
        if newest is not None:
            return replace(newest, prompt_cache=self.prompt_cache)
        return ServedWeights(self.current, self._plain, self.prompt_cache)

    def serving(self, adapter: str | None) -> ServedWeights:
        """Find what answers a request.

        Raises:
            RefusedError: 404, the adapter that it names is not loaded.
        """
        if adapter is None:
            return self.served
        found = self.adapters.find(adapter)
        if found is None:
            raise RefusedError(404, f"adapter {adapter!r} is not loaded")
        return found

    def load(self, load: Load) -> None:
        """Begin to load, after whatever this replica does now."""
        self.loading = load.identity
        self._begin(partial(self._load, load))

    def refuse(self, load: Load, reason: str) -> None:
        """Show an error for a load that was never begun."""
        self._fail(load, DeltaError(load.identity, reason))

    def restart(self, loads: list[Load], *, on_base: bool) -> None:
        """Go down at once, drop everything, come back with `loads` replayed, or on base weights."""
        self.stop()
        self.starts += 1
        self._plain = self._around.base_weights
        self.readiness, self.is_down = False, True
        self.current, self.loading, self._held = None, None, None
        self.adapters.clear()
        self._is_torn = False
        self.stage, self.target = "pending", ""
        self.prompt_cache = PromptCache()
        self.gate.set()
        self._begin(partial(self._come_back, [] if on_base else loads))

    def reset(self) -> None:
        """Serve base weights from now on, as after a ledger reset; running requests go on."""
        self.stop()
        self._plain, self.current, self.loading = self._around.base_weights, None, None
        self._held, self._is_torn = None, False
        self.adapters.clear()
        self.stage, self.target, self.readiness, self.is_down = "idle", "", True, False
        self.prompt_cache.swap("all")
        self.gate.set()

    def unload(self, adapter: str) -> None:
        """Free the slot of an adapter; requests that named none go on without it."""
        if self.adapters.remove(adapter):
            self.prompt_cache.swap("all")

    def stop(self) -> None:
        """Cancel what is loading; what begins next waits for its thread."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def leave(self) -> None:
        """Count a request as ended here."""
        self.in_flight -= 1
        if not self.in_flight:
            self._drained.set()

    def render(self) -> dict[str, Any]:
        """Show the replica as an entry of `replicas` (protocol §5)."""
        state: dict[str, Any] = {"stage": self.stage}
        if self.target:
            state["target_snapshot_identity"] = self.target
        shown: dict[str, Any] = {
            "readiness": self.readiness,
            "current_snapshot_identity": self.current,
            "loading_state": state,
        }
        if self.adapters.statuses:
            listed = self.adapters.statuses.items()
            shown["loaded_adapters"] = [{"identity": i, "status": s} for i, s in listed]
        return shown

    def _begin(self, work: Callable[[], Awaitable[None]]) -> None:
        before = self._task

        async def after() -> None:
            with self._around.clock.busy():
                if before is not None and not before.done():
                    with self._around.clock.resting():
                        await asyncio.wait([before])
                await work()

        self._task = asyncio.create_task(after())

    async def _load(self, load: Load) -> None:
        faults = self._around.faults
        self.stage, self.target = "pending", load.identity
        if load.kind is SnapshotKind.LORA:
            self.adapters.statuses[load.identity] = LOADING
        try:
            await self._state()
            if faults.take("restart_to_base", replica=self.name, identity=load.identity):
                self._log(load, "error", "restarted")
                self._around.on_failed(self.name, load.identity, "restarted")
                self.restart([], on_base=True)
                return
            self.stage = "downloading"
            await self._lag(load.identity)
            await self._state()
            arrived = await self._arrive(load)
            weights = await self._weights(load, arrived)
            kept = await self._keep(load, arrived, "applied")
            await self._swap(weights, load, kept)
        except Exception as error:  # noqa: BLE001 - a replica outlives whatever it has to load
            self._fail(load, error)
        else:
            self._around.on_served(self.name, load.identity)
        self.loading = None

    async def _come_back(self, loads: list[Load]) -> None:
        await self._in_thread(self._disk.forget_others)
        await self._state()
        served: Load | None = None
        try:
            for load in loads:
                self.stage, self.target = "downloading", load.identity
                await self._state()
                arrived = await self._arrive(load)
                weights = await self._weights(load, arrived)
                kept = await self._keep(load, arrived, "replayed")
                self._serve(load, weights, kept)
                served = load
            self.stage = "completed" if loads else "idle"
        except Exception as error:  # noqa: BLE001 - it then serves what it got so far
            self._fail(load, error)
        self.readiness, self.is_down = True, False
        if served is not None:
            self._around.on_served(self.name, served.identity)

    async def _arrive(self, load: Load) -> Path:
        """The checkpoint or adapter as a directory of this replica's own, not yet kept.

        A delta that cannot be merged leaves the base torn: later deltas fail until a full arrives.
        """
        config = self._around.config
        if load.identity == config.base_identity:
            return await self._in_thread(self._disk.copy, load, config.base_model)
        for look in range(LOOKS):
            try:
                arrived = await self._in_thread(self._disk.fetch, load)
                break
            except MissingObjectError:
                if look + 1 == LOOKS:
                    raise
                await self._state()
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

    async def _weights(self, load: Load, arrived: Path) -> Any:
        if load.kind is not SnapshotKind.LORA:
            return await self._in_thread(self._around.engine.load, arrived, None)
        under = self._held or self._around.base.directory
        return await self._in_thread(self._around.engine.load, under, arrived)

    async def _keep(self, load: Load, arrived: Path, result: str) -> Path:
        kept = await self._in_thread(self._disk.keep, load, arrived)
        beside: list[Path | None] = []
        if load.kind is SnapshotKind.LORA:
            beside = [self._held, *self.adapters.directories]
        else:
            self._held, self._is_torn = kept, False
        await self._in_thread(self._disk.forget_others, kept, *beside)
        self._log(load, result, None)
        return kept

    async def _swap(self, weights: Any, load: Load, kept: Path) -> None:
        """Change weights, unready; ASYNC pauses requests, SYNC drains them (protocol §9)."""
        clock = self._around.clock
        self.readiness = False
        self.gate.clear()
        while self._around.config.transition == "SYNC" and self.in_flight:
            self._drained.clear()
            with clock.resting():
                await self._drained.wait()
        await self._state()
        fault = self._around.faults.take("slow_swap", replica=self.name, identity=load.identity)
        await clock.sleep(float(fault["seconds"]) if fault else 0.0)
        self._serve(load, weights, kept)
        self.stage, self.readiness = "completed", True
        self.gate.set()

    def _serve(self, load: Load, weights: Any, kept: Path) -> None:
        if load.kind is SnapshotKind.LORA:
            self.adapters.put(load.identity, kept, weights)
        else:
            self.current, self._plain = load.identity, weights
            self.adapters.clear()
        self.prompt_cache.swap(load.reset_prompt_cache)

    async def _lag(self, identity: str) -> None:
        faults, where = self._around.faults, {"replica": self.name, "identity": identity}
        while True:
            fault = faults.peek("lagging_replica", **where)
            if fault is not None and fault["seconds"] is not None:
                faults.take("lagging_replica", **where)
                return await self._around.clock.sleep(float(fault["seconds"]))
            if fault is None and not (self._index and faults.peek("first_ready_only", **where)):
                return None
            faults.changed.clear()
            with self._around.clock.resting():
                await faults.changed.wait()

    async def _state(self) -> None:
        seconds = self._around.config.seconds_per_state * self._slowness
        await self._around.clock.sleep(seconds)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        running = asyncio.get_running_loop().run_in_executor(self._around.threads, work, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread cannot be stopped; what begins next must not meet it in the same directory.
            await asyncio.wait([running])
            raise

    def _fail(self, load: Load, error: Exception) -> None:
        detail = f"{type(error).__name__}: {error}"[:500]
        self.stage, self.target = "error", load.identity
        if load.kind is SnapshotKind.LORA:
            self.adapters.statuses[load.identity] = FAILED
        self._disk.discard(load)
        self._log(load, "error", detail)
        self._around.on_failed(self.name, load.identity, detail)

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
