"""A world of its own: a bucket, fleets, hosts with processes, a trainer, faults from a seed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from prefect import State
from prefect.blocks.core import Block

import flows.cycle
import flows.publish
import flows.retain
import flows.rollback
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from emulator.api.app import create_app
from emulator.control.settings import EmulatorConfig
from hotload import clock
from hotload.clients.access import Access
from hotload.clients.store import publisher_lease
from hotload.clients.store.records import write_report
from hotload.errors import HotLoadError
from hotload.publish.lease import LEASES
from hotload.publish.lease import Process as HostProcess
from hotload.publish.publication import Publication, ServedSnapshot
from hotload.publish.retention import Retention
from hotload.report.cycle_report import CycleReport
from hotload.rollout.counts import RolloutSummary
from hotload.spec import CycleSpec, RetentionSpec
from tasks.publication import OngoingPublication
from tests.simulation.doors import SimulatedBucket, SimulatedStore, forget_objects
from tests.simulation.engine import Replaced, put_steps, replacing
from tests.simulation.fleet import BLOCKS, Fleet
from tests.simulation.inference import SimulatedInference
from tests.simulation.loop import PROCESS, HangError, Process, SimulatedLoop, moment
from tests.simulation.network import Network
from tests.simulation.trainer import Trainer
from tests.simulation.watch import Watch

RETENTION = "retention"
CYCLE_SECONDS_LIMIT = 3600.0
"""Of the world's own time; about ten times what the longest has taken."""
PROBLEMS = [{"id": f"sum-{n}", "prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(3)]


@dataclass(frozen=True)
class Outcome:
    """How a process ended: `done`, `killed`, `cancelled`, or the class of its error."""

    kind: str
    detail: str = ""
    identity: str = ""

    @property
    def is_done(self) -> bool:
        return self.kind == "done"


class World:
    """Everything but the program; two runs of a seed have one trace, and one digest of it."""

    def __init__(self, seed: int, root: Path, *, is_whole: bool, services: int = 1) -> None:
        self.seed, self.root, self.is_whole = seed, root, is_whole
        self.random = random.Random(f"world {seed}")
        self.trace = hashlib.sha256()
        self.lines: list[str] = []
        self.struck: Counter[str] = Counter()
        self.network = Network(seed, self.note, self.strike)
        self.trainer = Trainer(root / "checkpoints", seed)
        self.watch = Watch(self)
        self.bucket_root = f"simulation-{os.getpid()}-{seed}-{int(is_whole)}"
        self.bucket = SimulatedBucket(self, self.bucket_root)
        self.processes: list[Process] = []
        self.longest_seconds = 0.0
        self.fleets = [Fleet(self, block) for block in [*BLOCKS][:services]]
        self._required = self.random.choice(("all", "any", "quorum"))
        self._samples_all = services > 1 and self.random.random() < 0.5
        self._prices = self.random.choice(({}, {"per_gb_egress": 0.1, "per_gb_month": 0.02}))

    @property
    def readiness(self) -> dict[str, Any]:
        """How every cycle waits."""
        return {
            "poll_interval_seconds": 2.0,
            "weight_sync_timeout": 90.0,
            "scale_up_timeout_seconds": 120.0,
            "warmup_after_hotload": self.is_whole,
            "warmup_max_retries": 2,
        }

    @property
    def url(self) -> str:
        return f"memory://{self.bucket_root}"

    @property
    def services_needed(self) -> int:
        """How many services have to serve; of two, more than half are both."""
        return 1 if self._required == "any" else len(self.fleets)

    @property
    def is_time_priced(self) -> bool:
        """Whether a delta may be worth its bytes by the seconds that the last ones took."""
        return not self._prices

    def replicas(self) -> list[Any]:
        """All replicas, of every service."""
        return [replica for fleet in self.fleets for replica in fleet.replicas]

    def note(self, what: str) -> None:
        """Add a line to the trace."""
        line = f"{asyncio.get_running_loop().time():.6f} {what}".replace(self.bucket_root, "bucket")
        self.lines.append(line)
        self.trace.update(line.encode() + b"\n")

    def strike(self, kind: str) -> None:
        """Count a fault that struck."""
        self.struck[kind] += 1
        self.note(f"fault: {kind}")

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Let something happen in the world."""
        asyncio.get_running_loop().call_later(seconds, action, context=Context())

    def stored(self) -> list[str]:
        """Paths of all objects, in order."""
        start = f"/{self.bucket_root}/"
        paths = fsspec.filesystem("memory").store
        return sorted(path[len(start) :] for path in paths if path.startswith(start))

    def stored_bytes(self, path: str) -> bytes | None:
        """Read an object, or find that there is none, in no time."""
        memory, full = fsspec.filesystem("memory"), f"/{self.bucket_root}/{path}"
        return memory.cat_file(full) if full in memory.store else None

    def damage(self, path: str, *, remove: bool) -> None:
        """Remove an object, or change one byte of it, behind everybody's back."""
        memory, full = fsspec.filesystem("memory"), f"/{self.bucket_root}/{path}"
        self.watch.damaged.add(path)
        self.note(f"damaged {path} {remove}")
        if remove:
            del memory.store[full]
            return
        data = bytearray(memory.cat_file(full))
        # A lease with another number in it would be another's, and no program could tell.
        at = 0 if path.startswith(f"{LEASES}/") else self.random.randrange(len(data))
        data[at] ^= 0x04
        memory.pipe_file(full, bytes(data))

    def mend(self) -> None:
        """Do what the program tells an operator to do: remove damaged leases."""
        for path in sorted(self.watch.damaged):
            if path.startswith(f"{LEASES}/"):
                fsspec.filesystem("memory").store.pop(f"/{self.bucket_root}/{path}", None)

    def store(self) -> SimulatedStore:
        return SimulatedStore.over(self.url, self.bucket)

    def work_dir(self, host: str) -> Path:
        """Where a host keeps its own files."""
        return self.root / f"work-{host}"

    def lose_work_dir(self, host: str) -> None:
        shutil.rmtree(self.work_dir(host), ignore_errors=True)

    def process(self, host: str, *, ahead_seconds: float = 0.0) -> Process:
        """Make a process of a host."""
        number = len(self.processes) + 1
        made = Process(f"{host}.{number}", host, number, ahead_seconds, self)
        self.processes.append(made)
        return made

    def spec(
        self, version: int, host: str, *, line: int | None = None, **changes: Any
    ) -> CycleSpec:
        """Declare the cycle of a version, of the trainer's line if no other is named."""
        line = self.trainer.line if line is None else line
        blocks = [fleet.block for fleet in self.fleets]
        declared: dict[str, Any] = {
            "checkpoint": str(self.trainer.directory(line, version)),
            "run_id": "run",
            "line": line,
            "policy_version": version,
            "other_services": blocks[1:],
            "required": self._required,
            "rollout_weights": dict.fromkeys(blocks, 1.0) if self._samples_all else {},
            "prices": self._prices,
            "work_dir": str(self.work_dir(host)),
            "problems": {"dataset": str(self.root / "problems.jsonl")},
            "readiness": self.readiness,
            "sampling": {"completions_per_prompt": 2, "max_completion_tokens": 4},
            "cadence": {"full_every": 6},
            **changes,
        }
        return CycleSpec.model_validate(declared)

    async def run(self, process: Process, spec: CycleSpec, work: str = "") -> Outcome:
        """Run a cycle in a process until it ends or is ended; or other work, a rollback to the
        version that `work` names, or retention."""
        loop, context = asyncio.get_running_loop(), Context()
        context.run(PROCESS.set, process)
        self.note(f"{process.name} begins {spec.name} {work}")
        began = process.began_at = loop.time()
        process.may_go_back = work not in ("", RETENTION)
        task = loop.create_task(self._work(spec, work), context=context)
        task.add_done_callback(lambda _: process.ended.set(), context=Context())
        try:
            async with asyncio.timeout(CYCLE_SECONDS_LIMIT):
                await process.ended.wait()
        except TimeoutError:
            self.watch.violated(f"{process.name} has not ended after {CYCLE_SECONDS_LIMIT:.0f} s")
            process.kill()
        self.longest_seconds = max(self.longest_seconds, loop.time() - began)
        outcome = Outcome("killed") if process.is_dead else self._outcome(process, task)
        process.is_dead = True
        self.note(f"{process.name} ended: {outcome.kind} {outcome.detail[:200]}")
        return outcome

    def _work(self, spec: CycleSpec, work: str) -> Any:
        if work == RETENTION:
            services = [fleet.block for fleet in self.fleets]
            kept = RetentionSpec(
                services=services,
                keep_versions=self.random.choice((1, 2)),
                keep_reports=3,
                grace_hours=1,
                delete=True,
            )
            return flows.retain.retain_what_is_needed(kept)
        if work:
            return flows.rollback.roll_back(spec, work)
        return flows.cycle.checkpoint_to_rollout(spec)

    def _outcome(self, process: Process, task: asyncio.Task[Any]) -> Outcome:
        if task.cancelled():
            return Outcome("cancelled")
        error = task.exception()
        if error is None:
            return self._done(process, task.result())
        if not isinstance(error, HotLoadError) or not str(error):
            self.watch.violated(f"{process.name} ended with {type(error).__name__}: {error}")
        return Outcome(type(error).__name__, str(error))

    def _done(self, process: Process, answer: Any) -> Outcome:
        name = getattr(answer, "name", "Completed") if isinstance(answer, State) else "Completed"
        ended = answer.data if isinstance(answer, State) else answer
        if isinstance(ended, Retention):
            return Outcome("done", name)
        snapshot: ServedSnapshot = getattr(ended, "snapshot", ended)
        if isinstance(ended, CycleReport):
            # These two look at what an earlier run has waited for, without another wait.
            if name not in ("AlreadyServed", "Superseded") and ended.is_published:
                self.watch.claimed(process, ended.services)
            if self.is_whole:
                self.watch.handed_back(ended)
        return Outcome("done", f"{name} {snapshot.kind.value}", snapshot.identity)

    def is_running(self, named: HostProcess) -> bool:
        """Whether a process of a host lives, as that host sees it."""
        return any(one.number == named.pid and not one.is_dead for one in self.processes)


@asynccontextmanager
async def opened(world: World, **settings: Any) -> AsyncIterator[None]:
    """Start a world's fleets; at the end nothing of the world is left."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    world.root.mkdir(parents=True, exist_ok=True)
    world.trainer.write_base(with_tokenizer=world.is_whole)
    rows = "".join(json.dumps(row) + "\n" for row in PROBLEMS)
    (world.root / "problems.jsonl").write_text(rows)
    try:
        async with AsyncExitStack() as stack:
            for fleet in world.fleets:
                app = create_app(_configured(fleet, settings))
                await stack.enter_async_context(app.router.lifespan_context(app))
                fleet.app = app
            loop.after_pass = world.watch.after_pass
            try:
                yield
            finally:
                loop.after_pass = lambda: None
                await loop.bury(world.processes)
                await world.network.end()
    finally:
        forget_objects(world.bucket_root)
        shutil.rmtree(world.root, ignore_errors=True)


def _configured(fleet: Fleet, settings: dict[str, Any]) -> EmulatorConfig:
    world, access = fleet.world, fleet.access
    return EmulatorConfig(
        bucket=world.url,
        base_model=world.trainer.base,
        engine="stub",
        work_dir=world.root / fleet.name,
        api_key=access.api_key,
        account_id=access.account_id,
        model_id=access.model_id,
        deployment_id=access.deployment_id,
        **{"seconds_per_state": 1.0, **settings},
    )


class Moments:
    """Takes the place of `datetime` where the program asks for the moment."""

    @staticmethod
    def now(zone: Any) -> datetime:
        process = PROCESS.get()
        ahead = process.clock_ahead_seconds if process else 0.0
        return moment(ahead).astimezone(zone)


def _my_world() -> World:
    process = PROCESS.get()
    assert process is not None
    return process.world


def _my_fleet(name: str) -> Fleet:
    """Find a service by its block, or by its own name."""
    return next(one for one in _my_world().fleets if name in (one.block, one.access.service))


@dataclass(frozen=True)
class Opened:
    """A block of the world of the process that asks."""

    open: Callable[[], Any]


class Door:
    """Blocks of one kind: each opens, by its name, what leads into that world."""

    def __init__(self, open_it: Callable[[str], Any]) -> None:
        self._open = open_it

    async def load(self, name: str) -> Opened:
        return Opened(partial(self._open, name))


DOORS: dict[type[Block], Door] = {
    HotLoadService: Door(lambda name: _my_fleet(name).client()),
    CheckpointStore: Door(lambda _: _my_world().store()),
    RolloutClient: Door(lambda name: SimulatedInference.into(_my_fleet(name))),
}


def _asking(access: Access) -> SimulatedInference:
    """Open what asks the replicas of a service that is not sampled."""
    return SimulatedInference.into(_my_fleet(access.service))


def _this_process() -> HostProcess:
    process = PROCESS.get()
    assert process is not None
    return HostProcess(host=process.host, pid=process.number, started="0")


async def _no_rollouts(_: CycleSpec, ongoing: OngoingPublication, *__: Any) -> RolloutSummary:
    """Publishing alone: no rollouts."""
    first = (await ongoing.sampled())[0].snapshot
    assert first is not None
    return RolloutSummary(identity=first.identity, group_count=0, sample_count=0)


async def _short_report(
    store: Any, spec: CycleSpec, publication: Publication, rollouts: RolloutSummary, *_: Any
) -> CycleReport:
    """Publishing alone: the report without metrics and pages."""
    report = CycleReport.of(spec, publication, rollouts, 0.0)
    await _write_report(store, report)
    return report


async def _write_report(store: Any, report: CycleReport) -> None:
    for _ in range(8):
        try:
            return await write_report(store, report)
        except HotLoadError:
            await asyncio.sleep(30)
    return await write_report(store, report)


@contextmanager
def simulated(seed: int, *, is_whole: bool) -> Iterator[Replaced]:
    """Put the world where the program meets it: clock, processes, blocks, engine, disk syncs.

    Whole cycles sample and report; otherwise a cycle ends when it has published.
    """
    lease = sys.modules[publisher_lease.__module__]
    with replacing() as replaced:
        put_steps(replaced)
        replaced.put(clock, "datetime", Moments)
        replaced.put(lease, "this_process", _this_process)
        replaced.put(lease, "is_running", lambda named: _my_world().is_running(named))
        replaced.put(os, "fsync", lambda _: None)
        for module in [sys.modules[name] for name in sorted(sys.modules)]:
            if module.__name__.partition(".")[0] == "flows":
                for name, value in sorted(vars(module).items()):
                    if isinstance(value, type) and value in DOORS:
                        replaced.put(module, name, DOORS[value])
        replaced.put(flows.publish, "InferenceClient", _asking)
        if not is_whole:
            replaced.put(flows.cycle, "roll_out_and_score", _no_rollouts)
            replaced.put(flows.cycle, "conclude_cycle", _short_report)
        random.seed(seed)
        yield replaced


def run_in_time_of_its_own(work: Any) -> Any:
    """Run a coroutine on a loop whose clock jumps."""
    loop = SimulatedLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        with suppress(HangError):
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
