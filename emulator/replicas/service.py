"""The service: signals in, replicas loading, status out (protocol §4-§8, §21)."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import OrderedDict, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from agent.failures import RefusedError
from agent.fleet.admission import Member, chain_obstacle, inspect_snapshot, is_repeated
from agent.fleet.ledger import Ledger, LedgerEntry
from agent.fleet.service import ReplicaCounts
from agent.fleet.signals import Signal
from agent.fleet.validation import BaseModel, InvalidSnapshotError
from agent.loading.bucket import BucketError, MissingObjectError
from agent.loading.disk import Load
from agent.loading.loader import LOOKS
from emulator.control.clock import Clock
from emulator.control.faults import Faults
from emulator.control.settings import EmulatorConfig
from emulator.engine.engine import Engine
from emulator.engine.stub import StubEngine
from emulator.engine.tokens import Tokens
from emulator.replicas.faulty import FaultyBucket
from emulator.replicas.replica import Replica, Surroundings
from hotload.checkpoint.safetensors import name_obstacle
from hotload.identity import SnapshotKind, check_identity

# Small matrix products hold the interpreter: two threads answered a fifth slower than one. Large
# ones are spread over the cores by the matrix library itself.
COMPUTE_THREADS = 1
SESSION_LIMIT = 50_000
RECORD_LIMIT = 10_000
REQUEST_LIMIT = 100_000


class Service:
    """One service with its replicas. Lives in the event loop; `start` before use, `stop` after."""

    def __init__(self, config: EmulatorConfig) -> None:
        self.config = config
        self.clock = Clock(is_real=config.clock == "real")
        self.faults = Faults(config.faults)
        self.ledger = Ledger(config.adapter_slots)
        self.replicas: list[Replica] = []
        self.is_up = False
        self.hints: list[dict[str, Any]] = []
        self.signals: list[dict[str, Any]] = []
        self.client_bugs: list[str] = []
        self.requests: deque[dict[str, Any]] = deque(maxlen=REQUEST_LIMIT)
        self.compute_threads = ThreadPoolExecutor(COMPUTE_THREADS, "compute")
        self._threads = ThreadPoolExecutor(config.replica_count + 2, "load")
        self._sessions: OrderedDict[str, Replica] = OrderedDict()
        self._next_index = self._turn = 0
        self._background: set[asyncio.Task[None]] = set()
        self._signalling = asyncio.Lock()

    async def start(self) -> None:
        """Load the base model and bring the replicas up, at once or after `startup_seconds`."""
        config = self.config
        if config.work_dir is not None:
            config.work_dir.mkdir(parents=True, exist_ok=True)
        self._work_dir = Path(tempfile.mkdtemp(prefix="emulator-", dir=config.work_dir))
        try:
            engine = make_engine(config)
            base = await asyncio.to_thread(BaseModel.read, config.base, config.base_model)
            self.tokens = await asyncio.to_thread(Tokens.read, config.base_model)
            self.around = Surroundings(
                config=config,
                clock=self.clock,
                faults=self.faults,
                bucket=FaultyBucket(config.bucket, config.bucket_options, self.faults),
                engine=engine,
                base=base,
                base_weights=await asyncio.to_thread(engine.load, config.base_model),
                work_dir=self._work_dir,
                threads=self._threads,
                on_served=self._note_served,
                on_failed=self._note_failed,
            )
        except BaseException:
            shutil.rmtree(self._work_dir, ignore_errors=True)
            raise
        for _ in range(config.replica_count):
            self._add()
        if config.base_identity is not None:
            self._name_base(config.base_identity)
        self.scale_up()

    async def stop(self) -> None:
        """Stop every load and remove what was written."""
        for replica in self.replicas:
            replica.stop()
        for task in self._background:
            task.cancel()
        self.compute_threads.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._work_dir, ignore_errors=True)

    def scale_up(self) -> None:
        """Show no replicas for `startup_seconds`, then all."""
        self.is_up = self.config.startup_seconds <= 0
        if not self.is_up:
            self._in_background(self._appear())

    def status(self) -> dict[str, Any]:
        """Make the body of operation B, as the ordered faults let it be seen."""
        if not self.is_up or self.faults.take("empty_replicas"):
            return {"replicas": []}
        shown = []
        for replica in self.replicas:
            entry = replica.render()
            where = {"replica": replica.name, "identity": replica.target or replica.current}
            if odd := self.faults.take("odd_stage", **where):
                entry["loading_state"]["stage"] = odd["stage"]
            if stale := self.faults.take("stale_error", **where):
                entry["loading_state"] = {"stage": "error"}
                if stale["target"]:
                    entry["loading_state"]["target_snapshot_identity"] = stale["target"]
            shown.append(entry)
        return {"replicas": shown}

    async def signal(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out operation A: check, record, signal every replica.

        Raises:
            RefusedError: the documented refusals.
        """
        knows = not self.config.reject_reset_prompt_cache
        signal = Signal.parse(body, knows_prompt_cache=knows)
        if self.faults.take("ledger_reset", identity=signal.identity):
            self.reset()
        async with self._signalling:
            load = await self._accept(signal)
        if load is not None:
            for replica in self.replicas:
                replica.load(load)
        return {"identity": signal.identity}

    @property
    def context_length(self) -> int | None:
        """Tokens that fit the model."""
        length: int = self.around.base_weights.context_length
        return length

    async def observe(self) -> dict[str, Any]:
        """Carry out operation B."""
        return self.status()

    async def forget(self) -> None:
        """Carry out operation D."""
        self.reset()

    async def entries(self) -> list[dict[str, Any]]:
        """Carry out operation E."""
        return self.ledger.render()

    async def count(self) -> ReplicaCounts:
        """Count the replicas for operation F; none is listed while they start."""
        listed = self.replicas if self.is_up else []
        ready = sum(replica.readiness for replica in listed)
        return ReplicaCounts(len(self.replicas), len(listed), ready)

    async def _accept(self, signal: Signal) -> Load | None:
        """The load to hand to the replicas; None where there is nothing to hand on."""
        identity = signal.identity
        note: dict[str, Any] = {
            "identity": identity,
            "previous": signal.previous,
            "result": "refused",
        }
        self.signals.append(note)
        del self.signals[:-RECORD_LIMIT]
        if is_repeated(self.ledger, signal):
            note["result"] = "repeated"
            return None
        if not self.is_up or not self.replicas:
            self._crash(f"signal of {identity} before any replica was up")
            note["result"] = "crashed"
            return None
        reason = self._chain_error(signal)
        kind = SnapshotKind.FULL if signal.previous is None else SnapshotKind.DELTA
        try:
            if reason is None:
                kind = await self._inspect(signal)
        except (InvalidSnapshotError, MissingObjectError, BucketError) as error:
            raise RefusedError(400, f"snapshot validation failed: {error}") from None
        # The look took a while: another party may have reset or signalled meanwhile.
        reason = reason or self._chain_error(signal)
        if reason is not None and self.config.chain_error != "load_error":
            raise RefusedError(int(self.config.chain_error), reason)
        if kind is SnapshotKind.LORA and signal.previous is not None:
            self._crash(f"delta metadata for the LoRA snapshot {identity}")
            note["result"] = "crashed"
            return None
        load = Load(identity, kind, signal.previous, signal.reset_prompt_cache)
        note["result"] = "accepted"
        self.ledger.add(LedgerEntry(load, self.clock.now()))
        if reason is not None:
            for replica in self.replicas:
                replica.refuse(load, reason)
            return None
        return load

    def _chain_error(self, signal: Signal) -> str | None:
        members = (Member(replica.current, replica.loading) for replica in self.replicas)
        return chain_obstacle(self.ledger, signal, members)

    async def _inspect(self, signal: Signal) -> SnapshotKind:
        around = self.around
        for look in range(LOOKS):
            try:
                inspect = partial(
                    inspect_snapshot,
                    around.bucket,
                    signal,
                    around.base,
                    needs_spec=self.config.api.codec == "arc_v2",
                )
                return await asyncio.get_running_loop().run_in_executor(self._threads, inspect)
            except MissingObjectError:
                if look + 1 == LOOKS:
                    raise
        raise AssertionError("unreachable")

    def adapters(self) -> list[str]:
        """List the adapters that a replica has, or loads, in the order of their loads."""
        shown = (identity for each in self.replicas for identity in each.adapters.statuses)
        return list(dict.fromkeys(shown))

    def unload(self, adapter: str) -> bool:
        """Free an adapter's slot in every replica; whether one had it."""
        if adapter not in self.adapters():
            return False
        self.ledger.unload(adapter)
        for replica in self.replicas:
            replica.unload(adapter)
        return True

    def reload(self, adapter: str) -> bool:
        """Load an adapter again that was signalled before; whether there is one of that name.

        Raises:
            RefusedError: 409, it is loaded.
        """
        entry = self.ledger.get(adapter)
        if entry is None or entry.load.kind is not SnapshotKind.LORA:
            return False
        if adapter in self.adapters():
            raise RefusedError(409, f"adapter {adapter!r} is loaded")
        self.ledger.serve(entry.load)
        for replica in self.replicas:
            replica.load(entry.load)
        return True

    def reset(self) -> None:
        """Carry out operation D: forget every snapshot and serve base weights."""
        self.ledger.reset()
        for replica in self.replicas:
            replica.reset()

    async def hint(self, body: Mapping[str, Any]) -> None:
        """Carry out operation C: record it, and pre-stage the file it names if it is there
        (protocol §6).

        Raises:
            RefusedError: the status that was chosen for hints.
        """
        code = self.config.hint_status_code
        if code != 200:
            raise RefusedError(code, "hints are not taken here")
        note = {"body": body, "prestaged": False}
        self.hints.append(note)
        del self.hints[:-RECORD_LIMIT]
        identity, file = body.get("identity"), body.get("file")
        if not isinstance(identity, str) or not isinstance(file, str) or name_obstacle(file):
            return
        try:
            directory = self._work_dir / "hinted" / check_identity(identity)
            directory.mkdir(parents=True, exist_ok=True)
            download, target = self.around.bucket.download, directory / file
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, download, identity, file, target)
        except (OSError, ValueError):
            return  # a hint is a wish
        note["prestaged"] = True

    def pick(self, session: str | None) -> Replica:
        """Pick the replica that answers: the session's own, else the one with the fewest requests.

        Raises:
            RefusedError: 503 without replicas, 404 while all restart.
        """
        if not self.is_up or not self.replicas:
            raise RefusedError(
                503, "DEPLOYMENT_SCALING_UP: no replicas yet", "DEPLOYMENT_SCALING_UP"
            )
        up = [replica for replica in self.replicas if not replica.is_down]
        if not up:
            raise RefusedError(404, "Model not found, inaccessible, and/or not deployed")
        replica = self._sessions.get(session) if session is not None else None
        if replica is None or replica not in up:
            # One that swaps comes last, ties go round.
            self._turn = (self._turn + 1) % len(up)
            order = up[self._turn :] + up[: self._turn]
            replica = min(order, key=lambda each: (not each.gate.is_set(), each.in_flight))
        if session is None:
            return replica
        self._sessions[session] = replica
        self._sessions.move_to_end(session)
        while len(self._sessions) > SESSION_LIMIT:
            self._sessions.popitem(last=False)
        return replica

    def add_replica(self) -> Replica:
        """Add a late joiner: it replays the chain from the bucket, unready meanwhile."""
        replica = self._add()
        self.restart(replica)
        return replica

    def remove_replica(self, replica: Replica) -> None:
        """Scale down; requests running there end in an error."""
        replica.stop()
        replica.starts += 1
        self.replicas.remove(replica)

    def restart(self, replica: Replica, *, on_base: bool = False) -> None:
        """Restart a replica; it replays the chain, or by fault comes back on base weights."""
        on_base = on_base or bool(self.faults.take("restart_to_base", replica=replica.name))
        replica.restart(self.ledger.chain(), on_base=on_base)

    def replica(self, name: object) -> Replica | None:
        """Find the replica of a name, or of a number."""
        wanted = f"replica-{name}" if isinstance(name, int) else name
        return next((replica for replica in self.replicas if replica.name == wanted), None)

    def _name_base(self, identity: str) -> None:
        """Begin the ledger with the base model, which every replica comes back to."""
        load = Load(identity, SnapshotKind.FULL, None)
        self.ledger.add(LedgerEntry(load, self.clock.now()))
        for replica in self.replicas:
            self.restart(replica)

    def _add(self) -> Replica:
        replica = Replica(self._next_index, self.around)
        self._next_index += 1
        self.replicas.append(replica)
        return replica

    def _crash(self, what: str) -> None:
        self.client_bugs.append(what)
        del self.client_bugs[:-RECORD_LIMIT]
        for replica in self.replicas:
            self.restart(replica)

    def _note_served(self, replica: str, identity: str) -> None:
        entry = self.ledger.get(identity)
        if entry is not None:
            if not entry.ready_at:
                self.ledger.serve(entry.load)
            entry.ready_at[replica] = self.clock.now()
            if len(entry.ready_at) >= len(self.replicas):
                shutil.rmtree(self._work_dir / "hinted" / identity, ignore_errors=True)

    def _note_failed(self, replica: str, identity: str, detail: str) -> None:
        entry = self.ledger.get(identity)
        if entry is not None:
            entry.errors[replica] = detail

    async def _appear(self) -> None:
        with self.clock.busy():
            await self.clock.sleep(self.config.startup_seconds)
            self.is_up = True

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def make_engine(config: EmulatorConfig) -> Engine:
    """Make the engine a configuration names; torch is imported only for its own."""
    if config.engine == "stub":
        return StubEngine()
    if config.engine == "transformers":
        from emulator.engine.torch_engine import TorchEngine

        return TorchEngine()
    from emulator.engine.numpy_engine import NumpyEngine

    return NumpyEngine()
