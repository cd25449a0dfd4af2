"""Everything that can go wrong in a cycle. Each kind is an order, drawn by the seed; whether it
strikes is counted where it does.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hotload.clients.store.records import SNAPSHOTS
from hotload.publish.lease import LEASES
from tests.simulation.fleet import Fleet
from tests.simulation.loop import Process
from tests.simulation.network import SERVICE, STORE, WireFault
from tests.simulation.world import RETENTION, World

STEPS = {False: 175, True: 280}
"""About the steps of a cycle that nothing happens to, by whether it is a whole one."""


@dataclass
class Rival:
    """Another process that runs a cycle beside the first, or other work, as `World.run`."""

    version: int
    line: int
    host: str
    delay_seconds: float
    work: str = ""
    surprises: list[tuple[int, Callable[[Process], None]]] = field(default_factory=list)


@dataclass
class Cycle:
    """One version's turn: what is to happen to its processes, and how they are declared; what
    happens to a service happens to `fleet` alone."""

    world: World
    version: int
    line: int = field(init=False)
    fleet: Fleet = field(init=False)
    host: str = "a"
    delay_seconds: float = 0.0
    ahead_seconds: float = 0.0
    surprises: list[tuple[int, Callable[[Process], None]]] = field(default_factory=list)
    rivals: list[Rival] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    before_next_life: list[Callable[[], None]] = field(default_factory=list)
    is_killed_again: bool = False

    def __post_init__(self) -> None:
        self.line, self.fleet = self.world.trainer.line, self.world.fleets[0]

    @property
    def random(self) -> random.Random:
        return self.world.random

    def surprise(
        self, kind: str, happen: Callable[[Process], None], rival: Rival | None = None
    ) -> None:
        """Let something happen to the next process, or to a rival, at one of its steps."""

        def struck(process: Process) -> None:
            self.world.strike(kind)
            happen(process)

        surprises = rival.surprises if rival else self.surprises
        steps = STEPS[self.world.is_whole] * len(self.world.fleets)
        surprises.append((self.random.randint(1, steps), struck))


KINDS: dict[str, Callable[[str, Cycle], None]] = {}


def kind(name: str) -> Callable[[Callable[[str, Cycle], None]], Callable[[str, Cycle], None]]:
    def add(order: Callable[[str, Cycle], None]) -> Callable[[str, Cycle], None]:
        KINDS[name] = order
        return order

    return add


def order(name: str, cycle: Cycle) -> None:
    """Order a fault by its name; of one service if it is about services."""
    cycle.fleet = cycle.random.choice(cycle.world.fleets)
    cycle.world.note(f"ordered: {name}, {cycle.fleet.name}")
    KINDS[name](name, cycle)


# Processes.


@kind("killed")
def _killed(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, Process.kill)


@kind("killed again and again")
def _killed_again(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, Process.kill)
    cycle.is_killed_again = True


@kind("killed, started on another host")
def _moved(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, Process.kill)
    cycle.before_next_life.append(lambda: setattr(cycle, "host", "b"))


@kind("killed, its disk lost")
def _lost(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, Process.kill)
    cycle.before_next_life.append(lambda: cycle.world.lose_work_dir(cycle.host))


def _stop(seconds: float) -> Callable[[Process], None]:
    def stop(process: Process) -> None:
        asyncio.get_running_loop().stop_process(process, seconds)  # type: ignore[attr-defined]

    return stop


@kind("stopped longer than a lease")
def _stopped(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, _stop(cycle.random.uniform(61, 300)))


@kind("stopped for a moment")
def _paused(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, _stop(cycle.random.uniform(1, 59)))


@kind("stopped, another host takes its cycle")
def _overtaken(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, _stop(cycle.random.uniform(70, 200)))
    cycle.rivals.append(Rival(cycle.version, cycle.line, "b", cycle.random.uniform(60, 130)))


@kind("stopped, the next version takes over")
def _outrun(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, _stop(cycle.random.uniform(70, 200)))
    delay = cycle.random.uniform(60, 130)
    cycle.rivals.append(Rival(cycle.version + 1, cycle.line, "b", delay))


def _beside(name: str, cycle: Cycle, version: int, host: str, line: int | None = None) -> None:
    line = cycle.line if line is None else line
    cycle.rivals.append(Rival(version, line, host, cycle.random.uniform(0, 8)))
    cycle.world.strike(name)


@kind("two hosts publish one version")
def _two_hosts(name: str, cycle: Cycle) -> None:
    _beside(name, cycle, cycle.version, "b")


@kind("one host starts a version twice")
def _twice_here(name: str, cycle: Cycle) -> None:
    _beside(name, cycle, cycle.version, cycle.host)


@kind("the next version begins before this one ends")
def _next_version(name: str, cycle: Cycle) -> None:
    _beside(name, cycle, cycle.version + 1, cycle.random.choice("ab"))


@kind("an old version is triggered again")
def _old_version(name: str, cycle: Cycle) -> None:
    version = max(1, cycle.version - cycle.random.randint(1, 3))
    _beside(name, cycle, version, "b", cycle.world.trainer.line_at(version))


def _rollback(cycle: Cycle) -> Rival:
    back_to = max(1, cycle.version - cycle.random.randint(1, 4))
    rival = Rival(cycle.version, cycle.line, "b", cycle.random.uniform(0, 30), str(back_to))
    cycle.rivals.append(rival)
    return rival


@kind("somebody rolls back")
def _rolled_back(name: str, cycle: Cycle) -> None:
    _rollback(cycle)
    cycle.world.strike(name)


@kind("a rollback is killed")
def _rollback_killed(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, Process.kill, _rollback(cycle))


@kind("a rollback is stopped longer than a lease")
def _rollback_stopped(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, _stop(cycle.random.uniform(61, 300)), _rollback(cycle))


def _retention(cycle: Cycle) -> Rival:
    delay = cycle.random.uniform(0, cycle.random.choice((30, 400)))
    rival = Rival(cycle.version, cycle.line, "b", delay, RETENTION)
    cycle.rivals.append(rival)
    return rival


@kind("old snapshots are removed")
def _retained(name: str, cycle: Cycle) -> None:
    _retention(cycle)
    cycle.world.strike(name)


@kind("a removal is killed")
def _removal_killed(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, Process.kill, _retention(cycle))


@kind("a removal is stopped longer than a lease")
def _removal_stopped(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, _stop(cycle.random.uniform(61, 300)), _retention(cycle))


@kind("replicas are probed")
def _probed(name: str, cycle: Cycle) -> None:
    cycle.changes["readiness"] = {**cycle.world.readiness, "probe_sessions": 8}
    cycle.world.strike(name)


@kind("cancelled")
def _cancelled(name: str, cycle: Cycle) -> None:
    cycle.surprise(name, lambda process: process.tasks[0].cancel() and None)


@kind("clock five minutes ahead")
def _ahead(name: str, cycle: Cycle) -> None:
    cycle.ahead_seconds = 300.0
    cycle.world.strike(name)


@kind("clock five minutes behind")
def _behind(name: str, cycle: Cycle) -> None:
    cycle.ahead_seconds = -300.0
    cycle.world.strike(name)


@kind("clock jumps")
def _jumps(name: str, cycle: Cycle) -> None:
    seconds = cycle.random.choice((-1, 1)) * cycle.random.uniform(20, 200)

    def jump(process: Process) -> None:
        process.clock_ahead_seconds += seconds

    cycle.surprise(name, jump)


# The disk and the trainer.


@kind("work directory lost")
def _no_disk(name: str, cycle: Cycle) -> None:
    cycle.world.lose_work_dir(cycle.host)
    cycle.world.strike(name)


@kind("a file of the work directory damaged")
def _damaged_disk(name: str, cycle: Cycle) -> None:
    files = sorted(cycle.world.work_dir(cycle.host).rglob("*.safetensors"))
    if files:
        path = cycle.random.choice(files)
        data = bytearray(path.read_bytes())
        data[cycle.random.randrange(len(data))] ^= 0x10
        path.write_bytes(data)
        cycle.world.strike(name)


@kind("results of finished steps lost")
def _no_results(name: str, cycle: Cycle) -> None:
    def lose(_: Process) -> None:
        for directory in cycle.world.work_dir(cycle.host).glob("*/*/results"):
            shutil.rmtree(directory, ignore_errors=True)

    cycle.surprise(name, lose)


@kind("the trainer changes a checkpoint under way")
def _changed(name: str, cycle: Cycle) -> None:
    def change() -> None:
        cycle.world.trainer.write_again(cycle.line, cycle.version)

    cycle.surprise(name, lambda _: change())
    cycle.before_next_life.append(change)


def _resume(cycle: Cycle) -> Rival:
    """Begin a new line in this turn; returns the cycle of the old one that would have come."""
    trainer, old = cycle.world.trainer, Rival(cycle.version, cycle.line, "b", 0.0)
    cycle.version = max(1, cycle.version - cycle.random.randint(0, 4))
    trainer.resume(cycle.version)
    trainer.step(cycle.version + 1)
    cycle.line = trainer.line
    return old


@kind("a trainer resumes on another line")
def _resumed(name: str, cycle: Cycle) -> None:
    _resume(cycle)
    cycle.world.strike(name)


@kind("a trainer resumes, and the one before goes on")
def _zombie(name: str, cycle: Cycle) -> None:
    old = _resume(cycle)
    old.delay_seconds = cycle.random.uniform(0, 60)
    cycle.rivals.append(old)
    cycle.world.strike(name)


@kind("a trainer resumes while the one before is stopped")
def _stopped_zombie(name: str, cycle: Cycle) -> None:
    old = _resume(cycle)
    cycle.rivals.append(old)
    cycle.delay_seconds = cycle.random.uniform(5, 120)
    cycle.surprise(name, _stop(cycle.random.uniform(61, 300)), old)


@kind("the weights become completely other")
def _other(name: str, cycle: Cycle) -> None:
    cycle.world.trainer.become_other()
    cycle.world.strike(name)


@kind("a full snapshot is asked for")
def _full(name: str, cycle: Cycle) -> None:
    cycle.changes["cadence"] = {"full_every": 6, "force_full": True}
    cycle.world.strike(name)


@kind("the next cycle may publish while this one samples")
def _overlapping(name: str, cycle: Cycle) -> None:
    sampling = {"completions_per_prompt": 2, "max_completion_tokens": 4}
    cycle.changes["sampling"] = {**sampling, "max_head_offpolicy_versions": 1}
    cycle.world.strike(name)


# Replicas, by the emulator's own faults.


def _emulator(name: str, make: Callable[[random.Random], dict[str, Any]]) -> None:
    def happens(kind_name: str, cycle: Cycle) -> None:
        cycle.fleet.order(kind_name, **make(cycle.random))

    KINDS[name] = happens


def _replica(chance: random.Random) -> int:
    return chance.randrange(3)


_emulator(
    "a delta tears", lambda chance: {"fault": "torn_apply", "count": 1, "replica": _replica(chance)}
)
_emulator("every delta tears", lambda _: {"fault": "torn_apply", "count": 9})
_emulator(
    "an object is missing for a replica",
    lambda chance: {
        "fault": "missing_object",
        "count": chance.randint(1, 8),
        "replica": _replica(chance),
    },
)
_emulator(
    "an object is seen late",
    lambda chance: {"fault": "late_object", "count": chance.randint(1, 3)},
)
_emulator(
    "a replica restarts to base instead of loading",
    lambda chance: {"fault": "restart_to_base", "count": 1, "replica": _replica(chance)},
)
_emulator(
    "a replica lags",
    lambda chance: {
        "fault": "lagging_replica",
        "count": 1,
        "seconds": chance.uniform(5, 200),
        "replica": _replica(chance),
    },
)
_emulator(
    "a swap is slow",
    lambda chance: {"fault": "slow_swap", "count": 1, "seconds": chance.uniform(5, 120)},
)
_emulator(
    "the list of replicas is empty",
    lambda chance: {"fault": "empty_replicas", "count": chance.randint(1, 6)},
)
_emulator(
    "an old error is shown",
    lambda chance: {"fault": "stale_error", "count": chance.randint(1, 6), "target": None},
)
_emulator(
    "an unknown stage is shown",
    lambda chance: {"fault": "odd_stage", "count": chance.randint(1, 6), "stage": "warming"},
)
_emulator(
    "somebody resets the ledger before a signal", lambda _: {"fault": "ledger_reset", "count": 1}
)


@kind("a delta is damaged on its way to a replica")
def _corrupt(name: str, cycle: Cycle) -> None:
    # A full carries no checksum (docs/unknown.md): a damaged one would be served unseen.
    fleet, replica, offset = cycle.fleet, _replica(cycle.random), -cycle.random.randint(1, 40)

    def damage(body: dict[str, Any]) -> None:
        if "incremental_snapshot_metadata" in body:
            fleet.order(
                name,
                fault="corrupt_object",
                count=1,
                replica=replica,
                identity=str(body["identity"]),
                offset=offset,
            )

    fleet.on_signal = damage


@kind("only the first replica gets on")
def _first_only(name: str, cycle: Cycle) -> None:
    world, faults = cycle.world, cycle.fleet.service.faults
    fault = faults.add({"fault": "first_ready_only"})
    world.strike(name)
    world.later(cycle.random.uniform(5, 120), lambda: faults.clear(fault.number))


# What happens to a service meanwhile.


def _meanwhile(name: str, act: Callable[[Fleet], bool]) -> None:
    def happens(kind_name: str, cycle: Cycle) -> None:
        world, fleet = cycle.world, cycle.fleet

        def happen() -> None:
            if act(fleet):
                world.strike(kind_name)

        world.later(cycle.random.uniform(0, 15), happen)

    KINDS[name] = happens


def _any_replica(fleet: Fleet) -> Any:
    return fleet.world.random.choice(fleet.replicas)


def _restarts(fleet: Fleet, *, on_base: bool = False) -> bool:
    fleet.service.restart(_any_replica(fleet), on_base=on_base)
    return True


def _all_restart(fleet: Fleet, *, on_base: bool = False) -> bool:
    for replica in fleet.replicas:
        fleet.service.restart(replica, on_base=on_base)
    return True


def _joins(fleet: Fleet) -> bool:
    if len(fleet.replicas) < 5:
        fleet.service.add_replica()
        return True
    return False


def _leaves(fleet: Fleet) -> bool:
    if len(fleet.replicas) > 1:
        fleet.service.remove_replica(_any_replica(fleet))
        return True
    return False


def _resets(fleet: Fleet) -> bool:
    fleet.service.reset()
    return True


def _to_zero(fleet: Fleet, low: float = 2, high: float = 60) -> bool:
    service = fleet.service
    if not service.is_up:
        return False
    service.is_up = False

    def come_back() -> None:
        service.is_up = True
        _all_restart(fleet, on_base=True)

    service.ledger.reset()
    fleet.world.later(fleet.world.random.uniform(low, high), come_back)
    return True


_meanwhile("a replica restarts and replays", _restarts)
_meanwhile("a replica restarts on base weights", partial(_restarts, on_base=True))
_meanwhile("all replicas restart and replay", _all_restart)
_meanwhile("all replicas restart on base weights", partial(_all_restart, on_base=True))
_meanwhile("a replica joins late", _joins)
_meanwhile("a replica leaves", _leaves)
_meanwhile("somebody resets the ledger", _resets)
_meanwhile("the service scales to zero and back", _to_zero)
_meanwhile("the service stays at zero for minutes", partial(_to_zero, low=130, high=300))


def _spawned(name: str, act: Callable[[Fleet], Coroutine[Any, Any, bool]]) -> None:
    def happens(kind_name: str, cycle: Cycle) -> None:
        world, fleet = cycle.world, cycle.fleet

        async def happen() -> None:
            if await act(fleet):
                world.strike(kind_name)

        world.later(cycle.random.uniform(0, 15), lambda: world.network.spawn(happen()))

    KINDS[name] = happens


_spawned("somebody else's snapshot is signalled", Fleet.signal_somebody_elses)
_spawned(
    "somebody else holds the lease",
    lambda fleet: fleet.hold_lease(fleet.world.random.uniform(20, 200)),
)


# Answers of the service.

HTML = "<html><body>Bad gateway</body></html>"


def _answer(name: str, operation: str, **order: Any) -> None:
    _emulator(
        name,
        lambda chance: {
            "fault": "respond",
            "operation": operation,
            "count": chance.randint(1, 4),
            "after": chance.randint(0, 3 if operation == "status" else 0),
            **order,
        },
    )


for _status in (404, 408, 429, 500, 502, 503):
    _answer(f"status answered {_status}", "status", status=_status)
_answer("status answered 401", "status", status=401)
_answer("status answered with HTML", "status", status=200, body=HTML)
_answer("status answered 502 with HTML", "status", status=502, body=HTML)
_answer("status answered with other JSON", "status", status=200, body='{"replicas": 3}')
for _status in (400, 404, 409, 429, 500, 503):
    _answer(f"signal answered {_status}", "signal", status=_status)
for _status in (409, 500, 503):
    _answer(f"signal taken and answered {_status}", "signal", status=_status, accepted=True)
_answer("signal taken and answered with HTML", "signal", status=502, accepted=True, body=HTML)
_answer("description answered 503", "deployment", status=503)
_answer("description answered with HTML", "deployment", status=200, body=HTML)


# Answers to samples; publishing alone asks for one token, and is not answered like this.

INFERENCE: list[str] = []


def _sample(name: str, **order: Any) -> None:
    _emulator(
        name,
        lambda chance: {
            "operation": "inference",
            "count": chance.randint(1, 12),
            "after": chance.randint(0, 4),
            **order,
        },
    )
    INFERENCE.append(name)


for _status in (404, 425, 429, 500, 503):
    _sample(f"sample answered {_status}", fault="respond", status=_status)
_sample("a sample's connection is closed", fault="disconnect")


def _stream(name: str, **order: Any) -> None:
    _emulator(name, lambda chance: {"count": chance.randint(1, 12), **order})
    INFERENCE.append(name)


_stream("a stream ends early", fault="truncate_stream")
_stream("a stream breaks", fault="truncate_stream", abrupt=True)
_stream("a stream carries an error", fault="stream_error")
_stream("a drain takes too long", fault="drain_expiry")


# Wires.


def _wire(
    name: str,
    where: str,
    how: str,
    *operations: str,
    path: str = "",
    seconds: tuple[float, float] = (0.0, 0.0),
    after: int = 3,
    most: int = 3,
    status: int = 503,
) -> None:
    def happens(kind_name: str, cycle: Cycle) -> None:
        chance, fleet = cycle.random, cycle.fleet
        place = fleet.name if where == SERVICE else path
        cycle.world.network.faults.append(
            WireFault(
                kind_name,
                where,
                how,
                operations,
                f"{LEASES}/{fleet.access.service}" if path == LEASES else place,
                left=chance.randint(1, most),
                after=chance.randint(0, after),
                seconds=chance.uniform(*seconds),
                status=status,
            )
        )

    KINDS[name] = happens


_wire("no connection to the service", SERVICE, "unsent")
_wire("a signal's answer is lost", SERVICE, "unanswered", "signal", after=0)
_wire("a status is lost", SERVICE, "unanswered", "status")
_wire("a signal arrives late", SERVICE, "late", "signal", seconds=(20, 200), after=0, most=1)
_wire("a signal's answer comes late", SERVICE, "slow", "signal", seconds=(20, 100), after=0)
_wire("a signal arrives twice", SERVICE, "twice", "signal", seconds=(0.1, 60), after=0)
_wire("a status comes late", SERVICE, "slow", "status", seconds=(10, 60))
_wire("a replica lies", SERVICE, "lie", "status", after=6)

_wire("no connection to the store", STORE, "unsent", after=60, most=6)
_wire("the store's answer is lost", STORE, "unanswered", after=60, most=6)
_wire("the store is busy", STORE, "refused", after=60, most=6)
_wire("the store fails", STORE, "refused", after=60, most=6, status=500)
_wire("the store denies access", STORE, "refused", after=60, most=1, status=403)
_wire("the store is slow", STORE, "slow", seconds=(30, 100), after=60)
_wire("a write arrives late", STORE, "late", "put", "create", seconds=(30, 150), after=20)
_wire("a write arrives twice", STORE, "twice", "put", "create", seconds=(0.1, 150), after=20)
_wire("a lease's answer is lost", STORE, "unanswered", path=LEASES, after=12)
_wire("a lease is written late", STORE, "late", "put", "create", path=LEASES, seconds=(5, 90))
_wire("a lease is written twice", STORE, "twice", "put", "create", path=LEASES, seconds=(1, 90))
_wire("a manifest's answer is lost", STORE, "unanswered", "put", path=SNAPSHOTS, after=0)


@kind("a download is cut short")
def _short(name: str, cycle: Cycle) -> None:
    cycle.world.lose_work_dir(cycle.host)  # or nothing would be downloaded
    left, after = cycle.random.randint(1, 3), cycle.random.randint(0, 2)
    cycle.world.network.faults.append(
        WireFault(name, STORE, "short", ("get",), left=left, after=after)
    )


def _outage(name: str, cycle: Cycle, where: str, path: str) -> None:
    world = cycle.world
    fault = WireFault(name, where, "unsent", path=path, left=0)
    world.network.faults.append(fault)
    world.later(cycle.random.uniform(0, 8), lambda: setattr(fault, "left", 1 << 30))
    world.later(cycle.random.uniform(20, 300), lambda: setattr(fault, "left", -1))


@kind("the store is away for minutes")
def _no_store(name: str, cycle: Cycle) -> None:
    _outage(name, cycle, STORE, "")


@kind("a service is away for minutes")
def _no_service(name: str, cycle: Cycle) -> None:
    _outage(name, cycle, SERVICE, cycle.fleet.name)


# Objects that lie in the store.


def _at_rest(name: str, pick: Callable[[World, list[str]], list[str]], *, remove: bool) -> None:
    def happens(kind_name: str, cycle: Cycle) -> None:
        world = cycle.world

        def happen() -> None:
            paths = pick(world, world.stored())
            if paths:
                world.damage(world.random.choice(paths), remove=remove)
                world.strike(kind_name)

        world.later(cycle.random.uniform(0, 10), happen)

    KINDS[name] = happens


def _shards(world: World, paths: list[str]) -> list[str]:
    return [path for path in paths if path.endswith(".safetensors")]


def _manifests(world: World, paths: list[str]) -> list[str]:
    return [path for path in paths if path.startswith(f"{SNAPSHOTS}/")][-2:]


def _leases(world: World, paths: list[str]) -> list[str]:
    return [path for path in paths if path.startswith(f"{LEASES}/")]


_at_rest("a stored shard is damaged", _shards, remove=False)
_at_rest("a stored shard is gone", _shards, remove=True)
_at_rest("a stored manifest is damaged", _manifests, remove=False)
_at_rest("a stored manifest is gone", _manifests, remove=True)
_at_rest("the lease is damaged", _leases, remove=False)
_at_rest("the lease is gone", _leases, remove=True)
