"""One replica and its engine, in this process: what it says while it loads."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent.beside.engine_replica import EngineReplica
from agent.beside.following import Following
from agent.engines.declared import DeclaredServer
from agent.engines.reloading import ReloadingEngine
from agent.engines.transformers_serve import TransformersServe
from agent.fleet.log import FleetLog
from agent.fleet.report import AgentReport
from agent.loading.bucket import BucketError, SnapshotBucket
from agent.loading.disk import Load
from hotload.clients.store.store import Store
from hotload.identity import SnapshotKind
from hotload.publish.readiness import SETTLED_STAGES
from tests.agent.tiny_engine import TinyEngine, digests, serve, tiny_engine
from tests.waiting import until

pytestmark = pytest.mark.server


class SlowBucket(SnapshotBucket):
    """A bucket that sends nothing until it may."""

    def __init__(self, url: str) -> None:
        super().__init__(url, {})
        self.asked, self.may_send = threading.Event(), threading.Event()

    def download(self, identity: str, file: str, target: Path) -> None:
        self.asked.set()
        self.may_send.wait(60)
        super().download(identity, file, target)


@pytest.fixture
def engine(place: Any) -> Iterator[TinyEngine]:
    with tiny_engine() as running:
        running.restart(place.publisher.base)
        yield running


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as running:
        yield running


def replica_of(
    place: Any,
    engine: TinyEngine,
    threads: Executor,
    *,
    bucket: SnapshotBucket | None = None,
    kind: ReloadingEngine | None = None,
    has_base: bool = True,
) -> EngineReplica:
    """Make the replica `one` beside an engine; made again, it is one that was started again."""
    call = 'POST /reload {"path": "{directory}", "name": "{identity}"}'
    return EngineReplica(
        "one",
        place.root / "one",
        bucket or SnapshotBucket(str(place.publisher.bucket), {}),
        threads,
        kind or DeclaredServer(engine.url, call, "GET /info weight_version"),
        engine_kind="command",
        base=place.publisher.base if has_base else None,
    )


FULL_A = Load("a", SnapshotKind.FULL, None)
DELTA_B = Load("b", SnapshotKind.DELTA, "a")


async def look(replica: EngineReplica, *chain: Load) -> AgentReport:
    """Look once, as an agent does that follows the log; what it then says."""
    replica.catch_up(chain)
    await replica.look_at_engine()
    return replica.report()


async def end(replica: EngineReplica) -> AgentReport:
    """Wait for what a replica is at; what it then says."""

    async def is_quiet() -> bool:
        return not replica.is_busy

    await until(is_quiet)
    return replica.report()


async def serve_it(replica: EngineReplica, *chain: Load) -> None:
    """Look until the last of a chain is served, and sealed."""

    async def is_served() -> bool:
        report = await look(replica, *chain)
        is_there = report.readiness and report.current == chain[-1].identity
        return is_there and not replica.is_busy

    await until(is_served)


async def test_an_engine_that_goes_during_a_download_is_not_ready(
    place: Any, engine: TinyEngine, threads: Executor
) -> None:
    bucket = SlowBucket(str(place.publisher.bucket))
    replica = replica_of(place, engine, threads, bucket=bucket)
    await replica.come_up()
    await replica.look_at_engine()
    assert replica.report().readiness
    place.publisher.full("a")
    replica.catch_up([FULL_A])
    assert await asyncio.to_thread(bucket.asked.wait, 60)
    engine.refuses = {"/info"}
    await replica.look_at_engine()
    assert not replica.report().readiness
    engine.refuses = set()
    await replica.look_at_engine()
    assert (replica.report().readiness, replica.report().stage) == (True, "downloading")
    bucket.may_send.set()
    await serve_it(replica, FULL_A)
    assert engine.serves == digests(place.publisher.checkpoint("a"))


async def test_an_engine_that_refused_is_told_again_after_a_while(
    place: Any, engine: TinyEngine, threads: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been started anew, and names itself as before."""
    replica = replica_of(place, engine, threads)
    await replica.come_up()
    place.publisher.full("a")
    await serve_it(replica, FULL_A)

    async def is_refused() -> bool:
        await replica.look_at_engine()
        return "500" in replica.report().error

    engine.version, engine.refuses = "default", {"/reload"}
    await until(is_refused)
    reloads = [path for path, _ in engine.calls].count("/reload")
    for _ in range(5):
        await replica.look_at_engine()
    assert [path for path, _ in engine.calls].count("/reload") == reloads
    engine.refuses = set()
    monkeypatch.setattr("agent.beside.engine_replica.TELL_AGAIN_SECONDS", 0.0)
    await serve_it(replica, FULL_A)
    assert engine.serves == digests(place.publisher.checkpoint("a"))


@pytest.mark.parametrize("tells_version", [True, False])
async def test_an_engine_without_a_name_that_refuses_is_not_told_at_every_look(
    place: Any, engine: TinyEngine, threads: Executor, tells_version: bool
) -> None:
    kind = None if tells_version else TransformersServe(engine.url)
    replica = replica_of(place, engine, threads, kind=kind)
    await replica.come_up()
    place.publisher.full("a")
    await serve_it(replica, FULL_A)
    engine.restart(replica.link)
    engine.refuses = {"/reload", "/load_model"}
    again = replica_of(place, engine, threads, kind=kind)
    await again.come_up()
    told = len(engine.calls)
    for _ in range(5):
        await again.look_at_engine()
        await end(again)
    assert not again.report().readiness
    assert sum(path in engine.refuses for path, _ in engine.calls[told:]) == 1
    engine.refuses.add("/info")  # gone for a moment: it may be another one then
    engine.refuses.add("/health")
    await again.look_at_engine()
    engine.refuses = set()
    await serve_it(again, FULL_A)


class MortalEngine(TinyEngine):
    """An engine that dies of `deaths` reloads, each answered with `status`. Then it is gone, or as
    soon as it has answered so many `last_words`, refusing to reload meanwhile."""

    def __init__(self, deaths: int, status: int = 500, last_words: int = 0) -> None:
        super().__init__()
        self.deaths, self.died = deaths, threading.Event()
        self.status, self.last_words, self.words_left = status, last_words, 0

    def start(self, directory: Path) -> None:
        """Start it on a directory, as its supervisor does."""
        self.restart(directory)
        self.died.clear()
        self.server = serve(self, int(self.url.rpartition(":")[2] or 0) if self.url else 0)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.02])
        self.thread.start()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        is_dying = self.words_left > 0
        if not is_dying and not (path == "/reload" and self.deaths):
            return super().answer(method, path, body)
        if is_dying:
            self.words_left -= 1
        else:
            self.deaths, self.words_left = self.deaths - 1, self.last_words
        if not self.words_left:
            self.stop()
            self.died.set()
        if path == "/reload":
            return self.status, {"error": "EngineCore encountered an issue"}
        return super().answer(method, path, body)

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.socket.close()


@pytest.mark.parametrize(
    ("status", "last_words"), [(500, 0), (200, 0), (500, 5)], ids=["at once", "after it", "slowly"]
)
@pytest.mark.parametrize(("deaths", "ends"), [(1, "completed"), (2, "error")])
async def test_an_engine_that_dies_in_a_reload_gets_a_second_try(
    place: Any, threads: Executor, deaths: int, ends: str, status: int, last_words: int
) -> None:
    """A death by chance costs the fleet no full snapshot, weights that kill it do."""
    engine = MortalEngine(deaths, status, last_words)
    engine.start(place.publisher.base)
    place.publisher.full("a")
    replica = replica_of(place, engine, threads)
    await replica.come_up()
    seen = set()

    async def is_at_the_end() -> bool:
        report = await look(replica, FULL_A)
        seen.add(report.stage)
        if engine.died.is_set() and report.stage != "downloading":  # its agent has heard of it
            assert not report.readiness
            engine.start(replica.link)
        return report.stage in ("completed", "error") and report.readiness

    await until(is_at_the_end)
    engine.stop()
    assert replica.report().stage == ends
    assert ("error" in seen) == (ends == "error")
    served = place.publisher.checkpoint("a") if ends == "completed" else place.publisher.base
    assert engine.serves == digests(served)


@pytest.mark.parametrize("is_gone", [False, True], ids=["it answers again", "it is gone"])
async def test_an_engine_that_fails_a_question_before_a_load_costs_no_full(
    place: Any, threads: Executor, is_gone: bool
) -> None:
    engine = MortalEngine(0)
    engine.start(place.publisher.base)
    replica = replica_of(place, engine, threads)
    await replica.come_up()
    place.publisher.full("a")
    engine.refuses, engine.refusals_left = {"/info"}, 1
    if is_gone:
        engine.words_left = 1  # this answer is its last
    replica.catch_up([FULL_A])
    report = await end(replica)
    assert (report.stage, report.target) == ("pending" if is_gone else "completed", "a")
    if is_gone:
        engine.start(place.publisher.base)
        await serve_it(replica, FULL_A)
    engine.stop()
    assert engine.serves == digests(place.publisher.checkpoint("a"))


async def test_an_engine_that_dies_of_its_first_snapshot_gets_a_second_try(
    place: Any, threads: Executor
) -> None:
    """Also where no base model was named that it could go back to."""
    engine = MortalEngine(1)
    engine.start(place.publisher.base)
    place.publisher.full("a")
    replica = replica_of(place, engine, threads, has_base=False)
    await replica.come_up()
    await look(replica, FULL_A)
    report = await end(replica)
    assert (report.stage, report.target, report.readiness) == ("pending", "a", False)
    engine.start(place.publisher.base)
    await serve_it(replica, FULL_A)
    engine.stop()


async def test_a_store_that_cannot_be_read_is_told_in_the_report(
    place: Any, engine: TinyEngine, threads: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    url = (place.root / "nowhere").as_uri()
    replica = replica_of(place, engine, threads, bucket=SnapshotBucket(url, {}))
    following = Following(replica, FleetLog(Store(url), "local", "rollouts"), 0.001)
    work = asyncio.create_task(following.follow())

    async def is_told_often() -> bool:
        return len(engine.calls) > 3

    await until(is_told_often)
    assert replica.report().readiness
    assert "does not exist" in replica.report().error
    assert caplog.text.count("does not exist") == 1
    (place.root / "nowhere").mkdir()

    async def is_well() -> bool:
        return not replica.report().error

    await until(is_well)
    work.cancel()


@pytest.mark.parametrize(
    ("chain", "leads_to"), [([FULL_A, DELTA_B], "b"), ([], "base-model")], ids=["a load", "a reset"]
)
async def test_an_agent_that_is_ended_turns_no_link_under_a_reading_engine(
    place: Any, engine: TinyEngine, threads: Executor, chain: list[Load], leads_to: str
) -> None:
    """As one that is killed: whoever comes after it ends that reload first."""
    place.publisher.full("a")
    place.publisher.delta("b", "a")
    replica = replica_of(place, engine, threads)
    await replica.come_up()
    await serve_it(replica, FULL_A)
    engine.asked.clear()
    engine.holds.clear()
    replica.catch_up(chain)
    assert await asyncio.to_thread(engine.asked.wait, 60)  # the first shard is read
    replica.stop()

    async def has_ended_or_turned() -> bool:
        return not replica.is_busy or replica.link.resolve().name != leads_to

    await until(has_ended_or_turned)
    assert replica.link.resolve().name == leads_to
    again = replica_of(place, engine, threads)
    await again.come_up()
    assert replica.link.resolve().name == leads_to
    engine.holds.set()
    expected = {name: digests(place.publisher.checkpoint(name)) for name in ("a", "b")}
    expected["base"] = expected["base-model"] = digests(place.publisher.base)

    async def is_served() -> bool:
        await look(again, *chain)
        return again.report().readiness and engine.serves == expected[leads_to]

    await until(is_served)
    named = [(name, serves) for name, serves in engine.sampled if name is not None]
    assert [name for name, serves in named if serves != expected[name]] == []


async def test_base_weights_that_nobody_named_are_not_served(
    place: Any, engine: TinyEngine, threads: Executor
) -> None:
    """An engine that tells no version serves on what it was told last."""
    kind = TransformersServe(engine.url)
    replica = replica_of(place, engine, threads, kind=kind, has_base=False)
    await replica.come_up()
    place.publisher.full("a")
    await serve_it(replica, FULL_A)

    await look(replica)
    assert "no base model was named" in (await end(replica)).error
    for _ in range(3):
        assert not (await look(replica)).readiness
    again = replica_of(place, engine, threads, kind=kind, has_base=False)
    await again.come_up()
    for _ in range(3):
        assert not (await look(again)).readiness
    assert engine.serves == digests(place.publisher.checkpoint("a"))


class FailingBucket(SnapshotBucket):
    """A bucket that cannot be read for the files of some snapshots."""

    def __init__(self, url: str, *failing: str) -> None:
        super().__init__(url, {})
        self.failing = {*failing}

    def download(self, identity: str, file: str, target: Path) -> None:
        if identity in self.failing:
            raise BucketError(f"{file} cannot be read: TimeoutError")
        super().download(identity, file, target)

    def read(self, identity: str, file: str, start: int = 0, end: int | None = None) -> bytes:
        if file in self.failing:
            raise BucketError(f"{file} cannot be read: TimeoutError")
        return super().read(identity, file, start, end)


@pytest.mark.parametrize("chain", [[FULL_A], []], ids=["withdrawn", "reset"])
async def test_what_is_no_longer_to_be_loaded_is_not_pending(
    place: Any, engine: TinyEngine, threads: Executor, chain: list[Load]
) -> None:
    """Else a service with one replica that never got it would look busy for ever."""
    place.publisher.full("a")
    place.publisher.delta("b", "a")
    bucket = FailingBucket(str(place.publisher.bucket), "b" if chain else "a")
    replica = replica_of(place, engine, threads, bucket=bucket)
    await replica.come_up()
    if chain:
        await serve_it(replica, *chain)
    await look(replica, *([*chain, DELTA_B] if chain else [FULL_A]))
    report = await end(replica)
    assert (report.stage, "TimeoutError" in report.error) == ("pending", True)
    report = await look(replica, *chain)
    assert (report.readiness, report.current) == (True, chain[-1].identity if chain else None)
    assert report.stage in SETTLED_STAGES
    assert not report.error


async def test_a_store_that_fails_in_the_middle_of_a_chain_is_waited_for(
    place: Any, engine: TinyEngine, threads: Executor
) -> None:
    place.publisher.full("a")
    place.publisher.delta("b", "a")
    bucket = FailingBucket(str(place.publisher.bucket), "a")
    replica = replica_of(place, engine, threads, bucket=bucket)
    await replica.come_up()
    await look(replica, FULL_A, DELTA_B)
    report = await end(replica)
    assert (report.stage, report.target) == ("pending", "b")
    assert "a: BucketError" in report.error
    bucket.failing.clear()
    await serve_it(replica, FULL_A, DELTA_B)
    assert engine.serves == digests(place.publisher.checkpoint("b"))


async def test_what_fails_in_the_middle_of_a_chain_is_named_with_its_end(
    place: Any, engine: TinyEngine, threads: Executor
) -> None:
    place.publisher.full("a")
    place.publisher.delta("b", "a")
    shutil.rmtree(place.publisher.bucket / "a")
    replica = replica_of(place, engine, threads)
    await replica.come_up()
    await look(replica, FULL_A, DELTA_B)
    report = await end(replica)
    assert (report.stage, report.target) == ("error", "b")
    assert report.error.startswith("a: MissingObjectError")


async def test_a_record_that_cannot_be_read_now_turns_no_engine_back(
    place: Any, engine: TinyEngine, threads: Executor
) -> None:
    """It is read before the engine is told: a pause of the store costs no reload."""
    place.publisher.full("a")
    place.publisher.delta("b", "a")
    bucket = FailingBucket(str(place.publisher.bucket), "b.json")
    replica = replica_of(place, engine, threads, bucket=bucket)
    await replica.come_up()
    await serve_it(replica, FULL_A)
    await look(replica, FULL_A, DELTA_B)
    assert (await end(replica)).stage == "pending"
    bucket.failing.clear()
    await serve_it(replica, FULL_A, DELTA_B)
    told = [body["name"] for path, body in engine.calls if path == "/reload"]
    assert told == ["a", "b"]
