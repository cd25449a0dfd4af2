"""One serving copy: its own bytes, its stage, its swap (protocol §5, §9, §21)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from emulator.arrival import Disk, Load
from emulator.bucket import Bucket, MissingObjectError
from emulator.clock import Clock
from emulator.engine import Engine
from emulator.faults import Faults
from emulator.prompt_cache import PromptCache
from emulator.settings import EmulatorConfig
from emulator.validation import BaseModel
from hotload.errors import ChainBrokenError, DeltaError, InvalidCheckpointError
from hotload.readiness import BASE_WEIGHTS
from hotload.snapshot import SnapshotKind

LOOKS = 3               # a file that is not visible is looked for so often
SPREAD = 0.5            # replica i takes 1 + i/2 times as long for each state
Result = TypeVar("Result")


@dataclass(frozen=True)
class Surroundings:
    """What all replicas of a service share."""

    config: EmulatorConfig
    clock: Clock
    faults: Faults
    bucket: Bucket
    engine: Engine
    base: BaseModel
    base_weights: Any
    work_dir: Path
    threads: Executor
    on_served: Callable[[str, str], None]
    on_failed: Callable[[str, str, str], None]


class ReplicaGoneError(Exception):
    """The replica restarted under a request."""


class Replica:
    """A replica on base weights; `load` and `restart` change what it serves. Lives in the event loop."""

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
        self.adapters: dict[str, str] = {}
        self.weights = around.base_weights
        self.prompt_cache = PromptCache()
        self.in_flight = 0
        self.is_down = False
        self.starts = 0
        self.loading: str | None = None
        self.applications: list[dict[str, Any]] = []
        self._held: Path | None = None
        self._adapter: Path | None = None
        self._is_torn = False
        self._task: asyncio.Task[None] | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._drained = asyncio.Event()

    @property
    def served(self) -> str | None:
        """The identity answers come from: the adapter's if one is loaded; None on base weights."""
        loaded = [identity for identity, status in self.adapters.items() if status == "loaded"]
        return loaded[-1] if loaded else self.current

    def load(self, load: Load) -> None:
        """Begin to load, after whatever this replica does now."""
        self.loading = load.identity
        self._begin(self._load(load))

    def restart(self, loads: list[Load], *, on_base: bool) -> None:
        """Go down at once, drop everything, come back with `loads` replayed, or on base weights."""
        self.stop()
        self.starts += 1
        self.weights = self._around.base_weights
        self.readiness, self.is_down = False, True
        self.current, self.loading, self.adapters = None, None, {}
        self._held = self._adapter = None
        self._is_torn = False
        self.stage, self.target = "pending", ""
        self.prompt_cache = PromptCache()
        self.gate.set()
        self._begin(self._come_back([] if on_base else loads))

    def reset(self) -> None:
        """Serve base weights from now on, as after a ledger reset; running requests go on."""
        self.stop()
        self.weights, self.current, self.loading = self._around.base_weights, None, None
        self._held = self._adapter = None
        self.adapters, self._is_torn = {}, False
        self.stage, self.target, self.readiness, self.is_down = "idle", "", True, False
        self.prompt_cache.swap("all")
        self.gate.set()

    def stop(self) -> None:
        """Cancel what is loading."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def leave(self) -> None:
        """A request ended here."""
        self.in_flight -= 1
        if not self.in_flight:
            self._drained.set()

    def render(self) -> dict[str, Any]:
        """As an entry of `replicas` (protocol §5)."""
        state: dict[str, Any] = {"stage": self.stage}
        if self.target:
            state["target_snapshot_identity"] = self.target
        shown: dict[str, Any] = {
            "readiness": self.readiness,
            "current_snapshot_identity": self.current,
            "loading_state": state,
        }
        if self.adapters:
            listed = self.adapters.items()
            shown["loaded_adapters"] = [{"identity": i, "status": s} for i, s in listed]
        return shown

    def _begin(self, work: Awaitable[None]) -> None:
        before = self._task

        async def after() -> None:
            with self._around.clock.busy():
                if before is not None and not before.done():
                    with self._around.clock.resting():
                        await asyncio.wait([before])
                await work

        self._task = asyncio.create_task(after())

    async def _load(self, load: Load) -> None:
        faults = self._around.faults
        self.stage, self.target = "pending", load.identity
        if load.kind is SnapshotKind.LORA:
            self.adapters[load.identity] = "loading"
        try:
            await self._state()
            if faults.take("restart_to_base", replica=self.name, identity=load.identity):
                self._task = None
                self.restart([], on_base=True)
                return
            self.stage = "downloading"
            await self._lag(load.identity)
            await self._state()
            await self._arrive(load, is_replay=False)
            weights = await self._weights()
            await self._swap(weights, load)
        except Exception as error:  # noqa: BLE001 - a replica outlives whatever it is told to load
            self._fail(load, error)
        else:
            self._around.on_served(self.name, load.identity)
        finally:
            self.loading = None

    async def _come_back(self, loads: list[Load]) -> None:
        await self._state()
        served: Load | None = None
        try:
            for load in loads:
                self.stage, self.target = "downloading", load.identity
                await self._state()
                await self._arrive(load, is_replay=True)
                served = load
                if load.kind is SnapshotKind.LORA:
                    self.adapters = {load.identity: "loaded"}
                else:
                    self.current, self.adapters = load.identity, {}
            self.stage = "completed" if loads else "idle"
        except Exception as error:  # noqa: BLE001 - it then serves what it got so far
            self._fail(load, error)
        self.weights = await self._weights()
        self.readiness, self.is_down = True, False
        if served is not None:
            self._around.on_served(self.name, served.identity)

    async def _arrive(self, load: Load, *, is_replay: bool) -> None:
        """Hold the snapshot's bytes; on an error the old ones are held on, a delta's base torn."""
        if load.kind is SnapshotKind.DELTA and (self._is_torn or self._held is None):
            raise DeltaError(load.identity, "the base is torn; a full snapshot is needed")
        for look in range(LOOKS):
            try:
                arrived = await self._in_thread(self._disk.fetch, load)
                break
            except MissingObjectError:
                if look + 1 == LOOKS:
                    raise
                await self._state()
        if load.kind is SnapshotKind.DELTA:
            if self._held is None or self._held.name != load.previous:
                held = self._held.name if self._held else BASE_WEIGHTS
                raise ChainBrokenError(str(load.previous), held)
            try:
                arrived = await self._in_thread(self._disk.merge, load, arrived, self._held)
            except (DeltaError, InvalidCheckpointError, OSError):
                self._is_torn = True
                raise
        else:
            # Everything must be readable before the old bytes are let go.
            is_full = load.kind is SnapshotKind.FULL
            directory = arrived if is_full else self._held or self._around.base.directory
            adapter = None if is_full else arrived
            await self._in_thread(self._around.engine.load, directory, adapter)
        kept = await self._in_thread(self._disk.keep, load, arrived)
        if load.kind is SnapshotKind.LORA:
            self._adapter = kept
        else:
            self._held, self._adapter, self._is_torn = kept, None, False
        await self._in_thread(self._disk.forget_others, self._held, self._adapter)
        self._log(load, "replayed" if is_replay else "applied", None)

    async def _weights(self) -> Any:
        if self._held is None and self._adapter is None:
            return self._around.base_weights
        directory = self._held or self._around.base.directory
        return await self._in_thread(self._around.engine.load, directory, self._adapter)

    async def _swap(self, weights: Any, load: Load) -> None:
        """From old weights to new: unready meanwhile; ASYNC pauses requests, SYNC drains them (§9)."""
        clock = self._around.clock
        self.readiness = False
        self.gate.clear()
        try:
            while self._around.config.transition == "SYNC" and self.in_flight:
                self._drained.clear()
                with clock.resting():
                    await self._drained.wait()
            await self._state()
            fault = self._around.faults.take(
                "slow_swap", replica=self.name, identity=load.identity
            )
            await clock.sleep(float(fault["seconds"]) if fault else 0.0)
            self.weights = weights
            if load.kind is SnapshotKind.LORA:
                self.adapters = {load.identity: "loaded"}
            else:
                self.current, self.adapters = load.identity, {}
            self.prompt_cache.swap(load.reset_prompt_cache)
            self.stage = "completed"
        finally:
            self.readiness = True
            self.gate.set()

    async def _lag(self, identity: str) -> None:
        faults, where = self._around.faults, {"replica": self.name, "identity": identity}
        while self._is_held_back(where):
            faults.changed.clear()
            with self._around.clock.resting():
                await faults.changed.wait()
        fault = faults.take("lagging_replica", **where)
        if fault is not None and fault["seconds"] is not None:
            await self._around.clock.sleep(float(fault["seconds"]))

    def _is_held_back(self, where: dict[str, str]) -> bool:
        faults = self._around.faults
        if self._index and faults.shows("first_ready_only", **where):
            return True
        return faults.shows("lagging_replica", seconds=None, **where)

    async def _state(self) -> None:
        seconds = self._around.config.seconds_per_state * self._slowness
        await self._around.clock.sleep(seconds)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._around.threads, work, *arguments)

    def _fail(self, load: Load, error: Exception) -> None:
        detail = f"{type(error).__name__}: {error}"[:500]
        self.stage, self.target = "error", load.identity
        if load.kind is SnapshotKind.LORA:
            self.adapters[load.identity] = "failed"
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
