"""Sampling processes: a rollout of several is the rollout of one, also where one of them, or their
coordinator, is killed."""

import asyncio
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.logging import disable_run_logger

from hotload.clients.store import Store
from hotload.errors import RewardError, RolloutsFailedError, StoreError
from hotload.sampling.part_carrier import Together
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.processes import coordinator
from hotload.sampling.processes.child import ProcessLostError
from hotload.sampling.processes.coordinator import RolloutProcesses, open_processes
from hotload.sampling.rollout import SampledService
from hotload.sampling.stamp import Stamp
from hotload.spec import CycleSpec
from tests.blocks.scripted_inference import IDENTITY, KEY, NO_IDS, client, saying
from tests.scripted_server import Reply, Request, ScriptedServer, never
from tests.signals import signals_are_heard
from tests.tasks.bench import Bench, carry_all, playing, replying, right_and_wrong
from tests.waiting import until

pytestmark = pytest.mark.slow  # a process takes about a second to begin

ROOT = Path(__file__).parents[2]
LOGGER = logging.getLogger("tests.sampling_processes")
NEXT, LATER = "run-000004-0badf00d", "run-000005-0badf00d"
TWO_SLOTS = {"mode": "fixed", "initial_window": 2}


@asynccontextmanager
async def processes(
    bench: Bench, spec: CycleSpec, reply: Reply, store: Store | None = None
) -> AsyncIterator[tuple[RolloutProcesses, ScriptedServer]]:
    """A rollout in two processes of half the parts each."""
    plan = await plan_rollouts(spec, IDENTITY)
    store = store or bench.store
    with disable_run_logger():
        async with (
            ScriptedServer(reply).running() as server,
            open_processes(
                spec,
                plan,
                SampledService(client(server.port), IDENTITY),
                store,
                LOGGER,
                numbers=range(len(plan.parts)),
                together=Together(plan, store, LOGGER),
                count=2,
            ) as rollout,
        ):
            yield rollout, server


def pids(rollout: RolloutProcesses) -> list[int]:
    return [place._process._child.pid for place in rollout._places if place._process]


def number_of(asked: Request) -> int:
    return int(asked.prompt.rpartition(" ")[2])


def asked_by_problem(server: ScriptedServer) -> Counter[int]:
    return Counter(map(number_of, server.requests))


MOMENTS = {"replica", "latency_seconds"}


async def told_rows(bench: Bench, manifest: Any) -> list[dict[str, Any]]:
    """The rows, without what differs from run to run."""
    rows = await bench.rows(manifest)
    return [{name: row[name] for name in row if name not in MOMENTS} for row in rows]


async def test_two_processes_leave_what_one_leaves(bench: Bench, tmp_path: Path) -> None:
    spec = bench.spec(8, problems_per_task=2, concurrency=TWO_SLOTS)
    one, _ = await bench.run(spec, replying(lambda asked: saying("ab")))
    rows = await told_rows(bench, one)
    (tmp_path / "other").mkdir()
    bench.store = Store(url=f"file://{tmp_path}/other")
    at_once = under_way = 0

    async def counted(asked: Request) -> bytes:
        nonlocal at_once, under_way
        under_way += 1
        at_once = max(at_once, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return saying("ab")

    async with processes(bench, spec, counted) as (rollout, server):
        assert [sorted(place.numbers) for place in rollout._places] == [[0, 2], [1, 3]]
        await carry_all(rollout)
        assert rollout.progress().in_flight == 0
        two = rollout.manifest(is_complete=True)
    assert len(server.requests) == 16
    assert at_once <= 2
    assert await told_rows(bench, two) == rows
    assert two.digest == one.digest
    assert two.summary.groups == one.summary.groups
    # The coordinator's word: each file named, and what the window did.
    named = [(part.file, part.group_count) for part in (await bench.published()).parts]
    assert named == [(part.file, part.group_count) for part in two.parts]
    assert two.summary.window_trace
    again, idle = await bench.run(spec, replying(lambda asked: saying("ab")))
    assert (idle.requests, [part.sha256 for part in again.parts]) == (
        [],
        [part.sha256 for part in two.parts],
    )


async def test_a_killed_process_is_started_again_and_samples_what_is_missing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    spec = bench.spec(8, problems_per_task=2, concurrency=TWO_SLOTS)
    rollouts: list[RolloutProcesses] = []
    killed: list[int] = []

    async def part_1_is_written() -> bool:
        names = await bench.store.names(f"_hotload/rollouts/{IDENTITY}")
        return "part-00001-00.parquet" in names

    async def kills_once(asked: Request) -> bytes:
        if number_of(asked) == 6 and not killed:
            killed.append(pids(rollouts[0])[1])
            await until(part_1_is_written)
            os.kill(killed[0], signal.SIGKILL)
        return saying("ab")

    async with processes(bench, spec, kills_once) as (rollout, server):
        rollouts.append(rollout)
        await carry_all(rollout)
        assert killed[0] not in pids(rollout)
        manifest = rollout.manifest(is_complete=True)
    rows = await bench.rows(manifest)
    assert Counter((row["problem_id"], row["sample_number"]) for row in rows) == Counter(
        {(str(problem), sample): 1 for problem in range(8) for sample in range(2)}
    )
    asked = asked_by_problem(server)
    assert {problem: asked[problem] for problem in (0, 1, 2, 3, 4, 5)} == dict.fromkeys(range(6), 2)
    assert asked[6] > 2
    # What the lost one wrote is not what an earlier run did.
    assert manifest.summary.found_sample_count == 0
    assert "it ended with signal 9" in caplog.text


async def test_a_process_that_is_lost_again_and_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "LOSSES", 1)
    spec = bench.spec(2, problems_per_task=1, rollout=playing("dying"))
    with pytest.raises(RolloutsFailedError, match=r"lost 2 times \(exit code 3\)"):
        async with processes(bench, spec, saying("ab")) as (rollout, _):
            await carry_all(rollout)
    assert "hotload.sampling.processes.worker" not in [
        word for one in psutil.Process().children() for word in one.cmdline()
    ]


async def test_nothing_is_started_again_once_the_rollout_has_ended(bench: Bench) -> None:
    spec = bench.spec(2, problems_per_task=1)
    async with processes(bench, spec, never) as (rollout, server):
        carrying = asyncio.create_task(carry_all(rollout))

        async def is_asked() -> bool:
            return bool(server.requests)

        await until(is_asked)
    with pytest.raises(ProcessLostError):
        await carrying
    assert not any(map(psutil.pid_exists, pids(rollout)))


async def test_rows_that_fail_are_counted_over_all_processes(bench: Bench) -> None:
    """Three here and two there open the breaker of both; what is held then is begun no more."""
    spec = bench.spec(20, problems_per_task=5, concurrency=TWO_SLOTS)
    is_open = asyncio.Event()
    seen: Counter[bool] = Counter()

    async def fails(asked: Request) -> bytes:
        is_first = number_of(asked) // 5 % 2 == 0
        seen[is_first] += 1
        if seen[is_first] > (6 if is_first else 4):
            await is_open.wait()
        return NO_IDS

    async with processes(bench, spec, fails) as (rollout, server):
        carrying = asyncio.create_task(carry_all(rollout))

        async def opened() -> bool:
            return rollout.breaker.is_open

        await until(opened)
        assert all(place.work.is_breaker_open for place in rollout._places)
        for place in rollout._places:
            await place.ask("open_breaker")  # both have heard of it
        is_open.set()
        with pytest.raises(RolloutsFailedError, match="breaker_open"):
            await carrying
    assert len(server.requests) < 20
    assert await bench.store.names("_hotload/rollouts") == []


async def test_newer_weights_are_told_to_all_processes(bench: Bench) -> None:
    spec = bench.spec(4, problems_per_task=2, concurrency=TWO_SLOTS, max_head_offpolicy_versions=1)
    is_told = asyncio.Event()

    async def waits(asked: Request) -> bytes:
        if number_of(asked) in (0, 2):
            await is_told.wait()
        return saying("ab")

    async with processes(bench, spec, waits) as (rollout, server):
        carrying = asyncio.create_task(carry_all(rollout))

        async def both_ask() -> bool:
            return {number_of(asked) for asked in server.requests} >= {0, 2}

        await until(both_ask)
        rollout.take_stamp(Stamp(NEXT, 4))
        rollout.take_stamp(Stamp(LATER, 5))
        for place in rollout._places:
            await place.ask("have_slots", 1)  # both have heard of it
        is_told.set()
        await carrying
        rows = await bench.rows(rollout.manifest(is_complete=True))
    # Two versions ahead: what was not begun by then is stale.
    begun = {
        row["problem_id"] for row in rows if row["identity"] == IDENTITY and not row["failure"]
    }
    assert begun == {"0", "2"}
    stale = {row["problem_id"] for row in rows if row["mark"] == "stale"}
    assert stale == {"1", "3"}


async def test_slots_go_where_there_is_work(bench: Bench) -> None:
    """One slot for two processes: the second gets it once the first has ended."""
    one = {"mode": "fixed", "initial_window": 1}
    spec = bench.spec(2, problems_per_task=1, concurrency=one)
    async with processes(bench, spec, replying(right_and_wrong)) as (rollout, server):
        assert [place.work.slots for place in rollout._places] == [1, 0]
        await carry_all(rollout)
    assert [number_of(asked) for asked in server.requests] == [0, 0, 1, 1]


async def test_what_cannot_be_sampled_is_refused_before_anything_is(bench: Bench) -> None:
    spec = bench.spec(2, problems_per_task=1, reward={"name": "nowhere:nothing"})
    with pytest.raises(RewardError, match="nowhere"):
        async with processes(bench, spec, saying("ab")):
            pass
    with pytest.raises(StoreError, match="no other process"):
        async with processes(bench, spec, saying("ab"), Store(url="memory://bucket")):
            pass


COORDINATOR = """
import asyncio, logging, sys
from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.sampling.part_carrier import Together
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.processes.coordinator import open_processes
from hotload.sampling.rollout import SampledService
from hotload.spec import CycleSpec
from tests.blocks.scripted_inference import IDENTITY, client

async def main(spec, url, port):
    plan, store, log = await plan_rollouts(spec, IDENTITY), Store(url=url), logging.getLogger()
    source, together = SampledService(client(int(port)), IDENTITY), Together(plan, store)
    parts = range(len(plan.parts))
    async with open_processes(
        spec, plan, source, store, log, numbers=parts, together=together, count=2
    ) as rollout:
        await overlap(rollout.carry(number) for number in parts)

asyncio.run(main(CycleSpec.model_validate_json(sys.argv[1]), *sys.argv[2:]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
async def test_no_process_goes_on_without_its_coordinator(
    bench: Bench, how: signal.Signals
) -> None:
    spec = bench.spec(8, problems_per_task=4, concurrency=TWO_SLOTS)
    holds = asyncio.Event()

    async def first_rows(asked: Request) -> bytes:
        if number_of(asked) not in (0, 4):
            await holds.wait()
        return saying("ab")

    async with ScriptedServer(first_rows).running() as server:
        command = [sys.executable, "-c", COORDINATOR, spec.model_dump_json()]
        with signals_are_heard():
            leading = await asyncio.create_subprocess_exec(
                *command,
                bench.store.url,
                str(server.port),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        try:

            async def both_are_held() -> bool:
                assert leading.returncode is None
                return {number_of(asked) for asked in server.requests} >= {1, 5}

            await until(both_are_held)
            children = psutil.Process(leading.pid).children()
            assert len(children) == 2
            sent = len(server.requests)
            leading.send_signal(how)

            async def all_have_ended() -> bool:
                return not any(map(is_alive, children))

            await until(all_have_ended)
            await leading.wait()
        finally:
            with suppress(ProcessLookupError):
                leading.kill()
            await leading.wait()
        assert len(server.requests) == sent
    if how is signal.SIGINT:  # what had ended is in the store, and the manifest names it
        assert [part.group_count for part in (await bench.published()).parts] == [1, 1]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_keys_are_on_no_command_line(bench: Bench) -> None:
    spec = bench.spec(2, problems_per_task=1)
    async with processes(bench, spec, saying("ab")) as (rollout, server):
        shown = [psutil.Process(pid).cmdline() for pid in pids(rollout)]
        environments = [psutil.Process(pid).environ() for pid in pids(rollout)]
        await carry_all(rollout)
    assert all(KEY in asked.headers["authorization"] for asked in server.requests)
    assert KEY not in str(shown)
    assert KEY not in str(environments)
