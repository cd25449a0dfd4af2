"""One serving copy: its own bytes, its stage, its swap (protocol §5, §9, §21)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from agent.failures import RefusedError
from agent.fleet.validation import BaseModel
from agent.loading.disk import Load
from agent.loading.loader import Loader
from emulator.control.clock import Clock
from emulator.control.faults import Faults
from emulator.control.settings import EmulatorConfig
from emulator.engine.engine import Engine
from emulator.replicas.adapters import FAILED, LOADING, AdapterSlots, ServedWeights
from emulator.replicas.faulty import ChangedTensorsDisk, FaultyBucket, FaultyDisk
from emulator.replicas.prompt_cache import PromptCache
from hotload.identity import SnapshotKind

SPREAD = 0.5  # replica i takes 1 + i/2 times as long for each state


@dataclass(frozen=True)
class Surroundings:
    """What all replicas of a service share."""

    config: EmulatorConfig
    clock: Clock
    faults: Faults
    bucket: FaultyBucket
    engine: Engine
    base: BaseModel
    base_weights: Any
    work_dir: Path
    threads: Executor
    on_served: Callable[[str, str], None]
    on_failed: Callable[[str, str, str], None]


class Replica(Loader):
    """A replica; `load` and `restart` change what it serves. Lives in the event loop."""

    _disk: FaultyDisk

    def __init__(self, index: int, around: Surroundings) -> None:
        name = f"replica-{index}"
        hinted = around.work_dir / "hinted"
        disk_of = FaultyDisk if around.config.api.codec == "arc_v2" else ChangedTensorsDisk
        disk = disk_of(around.work_dir / name, hinted, around.bucket, around.faults, name)
        super().__init__(name, disk, around.threads)
        self._around, self._index, self._slowness = around, index, 1 + SPREAD * index
        self.adapters = AdapterSlots(around.config.adapter_slots)
        self._plain = around.base_weights
        self.prompt_cache = PromptCache()
        self.in_flight = 0
        self.is_down = False
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

    def leave(self) -> None:
        """Count a request as ended here."""
        self.in_flight -= 1
        if not self.in_flight:
            self._drained.set()

    def render(self) -> dict[str, Any]:
        """Show the replica as an entry of `replicas`, its adapters included."""
        shown = super().render()
        if self.adapters.statuses:
            listed = self.adapters.statuses.items()
            shown["loaded_adapters"] = [{"identity": i, "status": s} for i, s in listed]
        return shown

    def _working(self) -> AbstractContextManager[None]:
        return self._around.clock.busy()

    def _resting(self) -> AbstractContextManager[None]:
        return self._around.clock.resting()

    def _note_served(self, load: Load) -> None:
        self._around.on_served(self.name, load.identity)

    def _note_failed(self, load: Load, detail: str) -> None:
        if load.kind is SnapshotKind.LORA:
            self.adapters.statuses[load.identity] = FAILED
        self._around.on_failed(self.name, load.identity, detail)

    async def _may_begin(self, load: Load) -> bool:
        if load.kind is SnapshotKind.LORA:
            self.adapters.statuses[load.identity] = LOADING
        await self._pause()
        where = {"replica": self.name, "identity": load.identity}
        if not self._around.faults.take("restart_to_base", **where):
            return True
        self._log(load, "error", "restarted")
        self._around.on_failed(self.name, load.identity, "restarted")
        self.restart([], on_base=True)
        return False

    async def _may_fetch(self, load: Load) -> None:
        await self._lag(load.identity)
        await self._pause()

    async def _come_back(self, loads: list[Load]) -> None:
        await self._in_thread(self._disk.forget_others)
        await self._pause()
        served: Load | None = None
        try:
            for load in loads:
                self.stage, self.target = "downloading", load.identity
                await self._pause()
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
        config = self._around.config
        if load.identity == config.base_identity:
            return await self._in_thread(self._disk.copy, load, config.base_model)
        return await super()._arrive(load)

    async def _weights(self, load: Load, arrived: Path) -> Any:
        if load.kind is not SnapshotKind.LORA:
            return await self._in_thread(self._around.engine.load, arrived, None)
        under = self._held or self._around.base.directory
        return await self._in_thread(self._around.engine.load, under, arrived)

    def _kept_beside(self, load: Load) -> Sequence[Path | None]:
        is_lora = load.kind is SnapshotKind.LORA
        return [self._held, *self.adapters.directories] if is_lora else []

    async def _swap(self, weights: Any, load: Load, kept: Path) -> None:
        """Change weights, unready; ASYNC pauses requests, SYNC drains them (protocol §9)."""
        clock = self._around.clock
        self.readiness = False
        self.gate.clear()
        while self._around.config.transition == "SYNC" and self.in_flight:
            self._drained.clear()
            with clock.resting():
                await self._drained.wait()
        await self._pause()
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

    async def _pause(self) -> None:
        seconds = self._around.config.seconds_per_state * self._slowness
        await self._around.clock.sleep(seconds)
