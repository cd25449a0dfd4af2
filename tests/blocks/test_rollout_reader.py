"""Groups delivered while a cycle samples: each to one consumer, again after a death, never after an
acknowledgement."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hotload.clients.handoff import Delivery, RolloutReader
from hotload.clients.handoff.directory import version_before
from hotload.clients.store import Store
from hotload.clients.store.records import record_line
from hotload.dataset.claims import claims_path
from hotload.dataset.parquet import render_rollouts
from hotload.dataset.rollout_plan import PARTS, PartNotes, RolloutPart
from hotload.dataset.table import Rollouts, rollouts_frame
from hotload.dataset.trainer_batch import make_batch
from hotload.errors import LeaseLostError, StoreError, StoreUnavailableError
from hotload.identity import NamedVersion
from hotload.rollout.counts import GroupCounts, count_groups
from hotload.rollout.trajectory import ScoredGroup
from tests.blocks.conftest import S3, make_store
from tests.factories import rollout_manifest, scored_group, segment, trajectory

IDENTITY = "run-000003-0123abcd"
SHA = "0" * 64
SIZE = 2


def scored(problem_id: str) -> ScoredGroup:
    return scored_group(
        *(
            trajectory(segment((5, 6 + number)), number=number, problem_id=problem_id)
            for number in range(SIZE)
        )
    )


@dataclass
class Clock:
    """Moves when it is told to."""

    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class Cycle:
    """A cycle that hands back: parts first, then a manifest that names them."""

    store: Store
    directory: str = f"_hotload/rollouts/{IDENTITY}"
    parts: list[RolloutPart] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    async def write(self, *problem_ids: str) -> None:
        groups = [scored(problem) for problem in problem_ids]
        frame = rollouts_frame(groups, run_id="run", policy_version=3)
        data = render_rollouts(frame, digest=SHA)
        file = f"part-{len(self.parts):05d}.parquet"
        await self.store.put_bytes(data, f"{self.directory}/{file}")
        digest = hashlib.sha256(data).hexdigest()
        notes = PartNotes(**dict(count_groups(groups, GroupCounts(), run_id="run")))
        self.parts.append(notes.part(file=file, size_bytes=len(data), sha256=digest, digest=SHA))
        await self.tell(is_complete=False)

    async def tell(self, *, is_complete: bool) -> None:
        self.clock.pass_seconds(1)
        manifest = rollout_manifest(
            IDENTITY, self.parts, is_complete=is_complete, created_at=self.clock()
        )
        await self.store.put_bytes(manifest.render(), f"{self.directory}/manifest.json")


@pytest.fixture(params=["file", "memory", S3])
def store(request: pytest.FixtureRequest) -> Store:
    return make_store(request.param, request)


@dataclass(frozen=True, eq=False)
class Watched(Store):
    """A store that knows what is listed, and so when a reader has looked again."""

    listings: Counter[str] = field(default_factory=Counter)
    listed: asyncio.Event = field(default_factory=asyncio.Event)

    async def names(self, prefix: str) -> list[str]:
        self.listings[prefix] += 1
        self.listed.set()
        return await super().names(prefix)

    async def polled(self, place: str) -> None:
        """Whoever lists `place` at every look has begun one, and begun the next after it."""
        enough = self.listings[place] + 2
        while self.listings[place] < enough:
            self.listed.clear()
            await self.listed.wait()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(url=f"file://{tmp_path}")


async def stays_waiting(
    waiting: asyncio.Future[Delivery | None], store: Watched, place: str = PARTS
) -> None:
    polled = asyncio.ensure_future(store.polled(place))
    either: set[asyncio.Future[Any]] = {waiting, polled}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    polled.cancel()
    assert not waiting.done(), waiting


def reader(store: Store, consumer: str = "a", **changes: Any) -> RolloutReader:
    arguments = {"groups_per_batch": 2, "poll_seconds": 0.001} | changes
    return RolloutReader(store, "run", arguments.pop("version", 3), consumer=consumer, **arguments)


async def read_all(one: RolloutReader) -> list[tuple[str, ...]]:
    found = []
    async for delivery in one:
        found.append(delivery.problem_ids)
        await one.acknowledge(delivery)
    return found


def flat(found: Iterable[tuple[str, ...]]) -> list[str]:
    return [problem for problems in found for problem in problems]


async def test_batches_span_parts_and_are_read_while_the_cycle_samples(
    store: Store,
) -> None:
    cycle = Cycle(store)
    async with reader(store) as one:
        waiting = asyncio.ensure_future(one.next())
        await cycle.write("a", "b", "c")
        first = await waiting
        assert first is not None
        assert first.problem_ids == ("a", "b")
        assert first.frame["problem_id"].to_list() == ["a", "a", "b", "b"]
        assert len(make_batch(first.frame)) == 4
        await one.acknowledge(first)
        waiting = asyncio.ensure_future(one.next())
        await cycle.write("d", "e")
        second = await waiting
        assert second is not None
        assert second.problem_ids == ("c", "d")
        await cycle.tell(is_complete=True)
        last = await one.next()
        assert last is not None
        assert last.problem_ids == ("e",)
        assert await one.next() is None  # all of them delivered, some not acknowledged
        await one.acknowledge(last)
        await one.acknowledge(second)
        await one.acknowledge(second)
    assert await reader(store, "b").next() is None


async def test_a_consumer_that_died_gets_its_groups_again_and_no_acknowledged_one(
    store: Store,
) -> None:
    cycle, clock = Cycle(store), Clock()
    await cycle.write("a", "b", "c", "d")
    await cycle.write("e", "f")
    await cycle.tell(is_complete=True)
    dead = reader(store, clock=clock, lease_seconds=60)
    used = await dead.next()
    assert used is not None
    await dead.acknowledge(used)
    lost = await dead.next()
    assert lost is not None
    assert lost.problem_ids == ("c", "d")

    heir = reader(store, "a", clock=clock, lease_seconds=60)
    assert (await heir.next() or used).problem_ids == ("e", "f")  # the free part alone
    clock.pass_seconds(61)
    assert await read_all(heir) == [("c", "d")]
    with pytest.raises(LeaseLostError, match=r"held by 'a': groups of part-00000"):
        await dead.acknowledge(lost)
    await dead.acknowledge(used)


CONSUMER = """
import asyncio, sys
from hotload.clients.handoff import RolloutReader, Store

async def consume():
    store = Store(url=sys.argv[1])
    reader = RolloutReader(store, "run", 3, consumer="doomed", groups_per_batch=2)
    await reader.acknowledge(await reader.next())
    print(*(await reader.next()).problem_ids, flush=True)
    await asyncio.Event().wait()

asyncio.run(consume())
"""


@pytest.mark.slow
async def test_a_consumer_that_is_killed(file_store: Store) -> None:
    cycle = Cycle(file_store)
    await cycle.write("a", "b", "c", "d")
    await cycle.tell(is_complete=True)
    doomed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CONSUMER, file_store.url, stdout=asyncio.subprocess.PIPE
    )
    assert doomed.stdout is not None
    said = await doomed.stdout.readline()
    doomed.kill()
    await doomed.communicate()
    assert said == b"c d\n"
    later = Clock(datetime.now(UTC) + timedelta(seconds=901))
    assert await read_all(reader(file_store, clock=later)) == [("c", "d")]


async def test_a_late_acknowledgement_counts_while_nobody_took_over(
    file_store: Store,
) -> None:
    cycle, clock = Cycle(file_store), Clock()
    await cycle.write("a", "b")
    await cycle.tell(is_complete=True)
    slow = reader(file_store, clock=clock, lease_seconds=60)
    delivery = await slow.next()
    assert delivery is not None
    clock.pass_seconds(1000)
    await slow.acknowledge(delivery)
    assert await reader(file_store, "b", clock=clock).next() is None


@pytest.mark.parametrize("is_used", [False, True])
async def test_what_another_consumer_had_in_between_is_not_acknowledged(
    file_store: Store, *, is_used: bool
) -> None:
    cycle, clock = Cycle(file_store), Clock()
    await cycle.write("a", "b", "c", "d")
    await cycle.tell(is_complete=True)
    slow = reader(file_store, "slow", clock=clock, lease_seconds=60)
    late = await slow.__anext__()
    assert late.problem_ids == ("a", "b")
    clock.pass_seconds(61)
    async with reader(file_store, "quick", clock=clock, lease_seconds=60) as quick:
        other = await quick.__anext__()
        assert other.problem_ids == ("a", "b")
        if is_used:
            await quick.acknowledge(other)
    again = await slow.__anext__()  # it has a lease of the part again, a later one
    assert again.problem_ids == (("c", "d") if is_used else ("a", "b"))
    with pytest.raises(LeaseLostError, match=r"held by 'quick': groups of part-00000"):
        await slow.acknowledge(late)
    await slow.acknowledge(again)


async def test_a_working_consumer_keeps_its_lease(watched: Watched) -> None:
    cycle, clock = Cycle(watched), Clock()
    await cycle.write("a", "b", "c")
    await cycle.tell(is_complete=True)
    log = claims_path(cycle.directory, cycle.parts[0])
    one = reader(watched, clock=clock, lease_seconds=60, groups_per_batch=1)
    other = reader(watched, "b", clock=clock, lease_seconds=60)
    found = []
    for _ in range(3):
        delivery = await one.next()
        assert delivery is not None
        found.append(delivery.problem_ids)
        clock.pass_seconds(40)
        waiting = asyncio.ensure_future(other.next())
        await stays_waiting(waiting, watched, log)
        waiting.cancel()
        await one.acknowledge(delivery)
    assert flat(found) == ["a", "b", "c"]


@pytest.mark.slow
async def test_a_full_batch_renews_the_leases_behind_it(watched: Watched) -> None:
    cycle, clock = Cycle(watched), Clock()
    await cycle.write("a")
    await cycle.write("b", "c")
    one = reader(watched, clock=clock, lease_seconds=60, groups_per_batch=3)
    first = await one.__anext__()
    assert first.problem_ids == ("a", "b", "c")
    await cycle.write(*(f"x{number}" for number in range(12)))
    cycle.parts.insert(0, cycle.parts.pop())  # before them: a further file of a lower number
    await cycle.tell(is_complete=True)
    for _ in range(4):
        clock.pass_seconds(20)
        await one.__anext__()
    waiting = asyncio.ensure_future(reader(watched, "b", clock=clock).next())
    await stays_waiting(waiting, watched, claims_path(cycle.directory, cycle.parts[-1]))
    waiting.cancel()
    await one.acknowledge(first)


async def test_what_is_given_back_is_free_at_once(file_store: Store) -> None:
    cycle = Cycle(file_store)
    await cycle.write("a", "b", "c")
    await cycle.tell(is_complete=True)
    async with reader(file_store, groups_per_batch=1) as one:
        await one.acknowledge(await one.__anext__())
        await one.__anext__()
    assert flat(await read_all(reader(file_store, "b"))) == ["b", "c"]


@pytest.mark.slow
async def test_each_group_is_used_once_by_several_consumers(store: Store) -> None:
    cycle = Cycle(store)
    problems = [f"p{number}" for number in range(12)]
    for start in range(0, 12, 2):
        await cycle.write(*problems[start : start + 2])
    await cycle.tell(is_complete=True)
    readers = [reader(store, f"c{number}", groups_per_batch=3) for number in range(3)]
    found = await asyncio.gather(*map(read_all, readers))
    assert sorted(flat(flat(each) for each in found)) == sorted(problems)


async def test_a_version_that_was_not_published_lies_below_an_earlier_one(
    file_store: Store,
) -> None:
    other = Cycle(file_store, f"_hotload/rollouts/run-000001-00000000/{4:06d}")
    await other.write("old")
    cycle = Cycle(file_store, f"_hotload/rollouts/{IDENTITY}/{4:06d}")
    await cycle.write("x")
    await cycle.tell(is_complete=True)
    assert await read_all(reader(file_store, version=4)) == [("x",)]


LATER = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("identity", ["run-000003-00000000", "run-000003-fedcba98"])
async def test_a_version_that_is_published_again_supersedes_itself(
    file_store: Store, identity: str
) -> None:
    dead = Cycle(file_store)
    await dead.write("a", "b", "c")
    one = reader(file_store, groups_per_batch=1)
    used, begun = await one.__anext__(), await one.__anext__()
    await one.acknowledge(used, sampled(used, 0.5))

    again = Cycle(file_store, f"{PARTS}/{identity}", clock=Clock(LATER))
    await again.write("a", "b", "c")
    third = await one.__anext__()
    assert third.problem_ids == ("c",)  # neither what was used, nor what this reader has
    assert {path for path, _, _ in third.claims} == {claims_path(again.directory, again.parts[0])}
    await one.acknowledge(begun)
    await one.acknowledge(third, sampled(third, 1.5))
    await again.write("d")
    await again.tell(is_complete=True)
    assert await read_all(one) == [("d",)]
    assert await reader(file_store, "late").next() is None  # and it waits for nobody
    drift = await one.drift()
    assert drift is not None
    assert (drift.token_count, drift.mean_abs) == (8, 1.0)


async def test_what_was_used_before_a_version_was_published_again_is_used(
    file_store: Store,
) -> None:
    async with reader(file_store) as one:
        await Cycle(file_store).write("a", "b")
        await one.acknowledge(await one.__anext__())
    again = Cycle(file_store, f"{PARTS}/run-000003-fedcba98", clock=Clock(LATER))
    await again.write("a", "c", "b")
    await again.write("b2")
    await again.tell(is_complete=True)
    clock = Clock()
    other = reader(file_store, "b", clock=clock, groups_per_batch=1)
    assert (await other.__anext__()).problem_ids == ("c",)
    clock.pass_seconds(901)  # it died: what it found used stays so
    assert flat(await read_all(reader(file_store, "c", clock=clock))) == ["c", "b2"]


async def test_complete_rollouts_are_not_superseded_by_some(file_store: Store) -> None:
    whole = Cycle(file_store)
    await whole.write("a", "b")
    await whole.tell(is_complete=True)
    again = Cycle(file_store, f"{PARTS}/run-000003-00000000", clock=Clock(LATER))
    await again.write("a")
    assert await read_all(reader(file_store)) == [("a", "b")]


async def test_a_version_that_is_published_after_all(file_store: Store) -> None:
    below = Cycle(file_store, f"{PARTS}/{IDENTITY}/000004")
    await below.write("a", "b")
    one = reader(file_store, version=4)
    await one.acknowledge(await one.__anext__())
    own = Cycle(file_store, f"{PARTS}/run-000004-00000000", clock=Clock(LATER))
    await own.write("a", "b", "c")
    await own.tell(is_complete=True)
    assert await read_all(one) == [("c",)]


async def begin_line(store: Store, name: str = "run-000003.1") -> Cycle:
    """A line of the run that has begun, and its first cycle before it has written anything."""
    await record_line(store, name)
    return Cycle(store, f"{PARTS}/{name}-0123abcd", clock=Clock(LATER))


async def test_a_reader_follows_a_new_line(watched: Watched) -> None:
    old = Cycle(watched)
    await old.write("a", "b", "c")
    one = reader(watched, groups_per_batch=1)
    used, begun = await one.__anext__(), await one.__anext__()
    await one.acknowledge(used)

    new = await begin_line(watched)
    waiting = asyncio.ensure_future(one.next())
    await stays_waiting(waiting, watched)  # what is left of the old line is not for it
    await one.acknowledge(begun)
    await new.write("a", "b", "c")
    third = await waiting
    assert third is not None
    assert third.problem_ids == ("a",)  # other weights made it: it comes, used before or not
    await one.acknowledge(third)
    await new.tell(is_complete=True)
    assert await read_all(one) == [("b",), ("c",)]
    assert {path.split("/")[2] for path, _, _ in third.claims} == {"run-000003.1-0123abcd"}
    await one.give_back()
    await old.tell(is_complete=True)
    assert await reader(watched, "late").next() is None
    assert await read_all(reader(watched, "by name", line=0)) == [("c",)]


async def test_a_trainer_of_a_new_line_gets_nothing_of_the_old_one(watched: Watched) -> None:
    old = Cycle(watched)
    await old.write("a")
    await old.tell(is_complete=True)
    waiting = asyncio.ensure_future(reader(watched, line=1).next())
    await stays_waiting(waiting, watched)
    new = await begin_line(watched)
    await stays_waiting(waiting, watched)
    await new.write("x")
    await new.tell(is_complete=True)
    delivery = await waiting
    assert delivery is not None
    assert delivery.problem_ids == ("x",)


async def test_versions_before_a_line_are_those_it_came_from(watched: Watched) -> None:
    for directory in ("run-000002-00000000", "run-000002-00000000/000003", IDENTITY):
        await Cycle(watched, f"{PARTS}/{directory}").write("old")
    await Cycle(watched, f"{PARTS}/run-000004-00000000").write("old")
    await (await begin_line(watched)).write("new")
    await Cycle(watched, f"{PARTS}/run-000003.1-0123abcd/000004.1").write("new")

    async def before(version: int, line: int) -> NamedVersion | None:
        return await version_before(watched, NamedVersion("run", line, version))

    assert await before(3, 1) == ("run", 0, 2)
    assert await before(4, 1) == ("run", 1, 3)
    assert await before(5, 1) == ("run", 1, 4)
    assert await before(5, 0) == ("run", 0, 4)
    for version, problem in ((2, "old"), (3, "new"), (4, "new")):
        delivery = await reader(watched, version=version, groups_per_batch=1).next()
        assert delivery is not None
        assert delivery.problem_ids == (problem,)


async def test_waiting_without_an_end_is_said(watched: Watched) -> None:
    clock = Clock()
    one = reader(watched, clock=clock, patience_seconds=5)
    waiting = asyncio.ensure_future(one.next())
    await stays_waiting(waiting, watched)
    clock.pass_seconds(6)
    with pytest.raises(StoreUnavailableError, match="no group came for 5 s: no cycle of this run"):
        await waiting
    cycle = Cycle(watched)
    await cycle.write("a", "b")
    assert (await one.__anext__()).problem_ids == ("a", "b")


@pytest.mark.slow
async def test_patience_begins_anew_with_every_group(watched: Watched) -> None:
    cycle, clock = Cycle(watched), Clock()
    one = reader(watched, clock=clock, patience_seconds=5, groups_per_batch=8)
    waiting = asyncio.ensure_future(one.next())
    for number in range(4):
        await cycle.write(f"g{number}")
        await stays_waiting(waiting, watched)
        clock.pass_seconds(3)
        await stays_waiting(waiting, watched)
    clock.pass_seconds(3)
    with pytest.raises(StoreUnavailableError, match="for 5 s: the cycle has not written another"):
        await waiting
    await one.give_back()
    async with reader(watched, "quick", clock=clock, lease_seconds=60) as quick:
        await quick.next()
        waiting = asyncio.ensure_future(one.next())
        await stays_waiting(waiting, watched)
        clock.pass_seconds(6)
        with pytest.raises(StoreUnavailableError, match="consumer 'quick' has groups until 2026"):
            await waiting


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("groups_per_batch", 0),
        ("groups_per_batch", 2.5),
        ("lease_seconds", 0),
        ("lease_seconds", float("nan")),
        ("consumer", ""),
        ("line", -1),
        ("line", 1000),
        ("consumer", "x" * 257),
    ],
)
def test_arguments_that_cannot_work(file_store: Store, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        reader(file_store, **{name: value})


async def test_a_part_that_is_not_what_the_manifest_says(file_store: Store) -> None:
    cycle = Cycle(file_store)
    await cycle.write("a", "b")
    path = f"{cycle.directory}/part-00000.parquet"
    data = await file_store.read_bytes(path, limit_bytes=1 << 20)
    await file_store.put_bytes(data[:-1] + b"x", path)
    with pytest.raises(StoreError, match="SHA-256"):
        await reader(file_store).next()


async def test_a_log_that_cannot_be_read(file_store: Store) -> None:
    cycle = Cycle(file_store)
    await cycle.write("a", "b")
    first = reader(file_store)
    await first.next()
    claims = f"{cycle.directory}/claims"
    (log,) = await file_store.names(claims)
    await file_store.put_bytes(b'{"kind": "lease"}', f"{claims}/{log}/000000.json")
    with pytest.raises(StoreError, match="not a claim"):
        await reader(file_store, "b").next()


def sampled(delivery: Delivery, further: float = 0.0) -> list[list[float]]:
    """A trainer's log-probabilities: the sampler's own, moved."""
    return [[each - further for each in row] for row in delivery.frame["sampling_logprobs"]]


async def test_the_drift_of_what_consumers_told(store: Store) -> None:
    cycle = Cycle(store)
    assert await reader(store).drift() is None  # there is no rollout yet
    await cycle.write("a", "b", "c")
    await cycle.write("d", "e")
    first, second = reader(store, groups_per_batch=4), reader(store, "b", groups_per_batch=4)
    delivery = await first.__anext__()
    assert delivery.row_counts == (6, 2)  # of two parts
    assert await first.drift() is None
    await first.acknowledge(delivery, [*sampled(delivery, 0.5)[:7], None])
    found = await second.drift()
    assert found is not None
    assert (found.token_count, found.not_finite_count) == (14, 0)
    assert (found.k1, found.mean_abs, found.max_abs) == (0.5, 0.5, 0.5)

    await first.acknowledge(delivery, sampled(delivery, 9.0))  # again: nothing changes
    await cycle.write("f")
    await cycle.write("g", "h")
    await cycle.tell(is_complete=True)
    other = await second.__anext__()  # "e" is in a part that the first one leases
    assert other.problem_ids == ("f", "g", "h")
    await second.acknowledge(other, sampled(other, -1.5))
    await first.acknowledge(await first.__anext__())  # and told nothing
    found = await first.drift()
    assert found is not None
    assert (found.token_count, found.max_abs) == (26, 1.5)
    assert found.k1 == pytest.approx((14 * 0.5 - 12 * 1.5) / 26)


async def test_log_probabilities_that_do_not_fit_acknowledge_nothing(
    file_store: Store,
) -> None:
    cycle = Cycle(file_store)
    await cycle.write("a")
    await cycle.write("b")
    await cycle.tell(is_complete=True)
    one = reader(file_store)
    delivery = await one.__anext__()
    given = sampled(delivery)
    with pytest.raises(ValueError, match=r"row 3: found shape \(1,\), expected \(2,\)"):
        await one.acknowledge(delivery, [*given[:3], given[3][:1]])
    with pytest.raises(ValueError, match="found 3 rows, expected 4"):
        await one.acknowledge(delivery, given[:3])
    await one.give_back()
    again = await reader(file_store, "b").__anext__()
    assert again.problem_ids == ("a", "b")


async def test_numbers_that_are_none_fail_no_acknowledgement(file_store: Store) -> None:
    cycle = Cycle(file_store)
    await cycle.write("a")
    await cycle.write("b")
    await cycle.tell(is_complete=True)
    one = reader(file_store)
    delivery = await one.__anext__()
    nothing, infinite = [math.nan] * 2, [-math.inf] * 2
    await one.acknowledge(delivery, [nothing, infinite, nothing, sampled(delivery)[3]])
    found = await one.drift()
    assert found is not None
    assert (found.token_count, found.not_finite_count, found.k1) == (2, 6, 0.0)
    assert await reader(file_store, "b").next() is None


async def test_the_version_before_that_has_rollouts(file_store: Store) -> None:
    below = "run-000001-00000000"
    for directory in (below, f"{below}/000002", f"{below}/000003", "other-000004-00000000"):
        await Cycle(file_store, f"_hotload/rollouts/{directory}").write("x")
    await Cycle(file_store, "_hotload/rollouts/run-000007-00000000").write("x")
    versions = [1, 2, 3, 4, 7, 8]
    found = [
        await version_before(file_store, NamedVersion("run", 0, version)) for version in versions
    ]
    assert [one and one.policy_version for one in found] == [None, 1, 2, 3, 3, 7]


def test_without_an_event_loop(file_store: Store) -> None:
    async def hand_back() -> None:
        cycle = Cycle(file_store)
        await cycle.write("a", "b", "c")
        await cycle.tell(is_complete=True)

    asyncio.run(hand_back())
    found = []
    with reader(file_store).blocking() as deliveries:
        for delivery in deliveries:
            found.append(delivery.problem_ids)
            deliveries.acknowledge(delivery, sampled(delivery))
        drift = deliveries.drift()
    assert found == [("a", "b"), ("c",)]
    assert drift is not None
    assert (drift.token_count, drift.max_abs) == (12, 0.0)


def test_the_page_for_trainers_is_true(file_store: Store) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
    table = page[page.index("## A row") : page.index("## A batch")]
    missing = set(Rollouts.to_schema().columns) - set(re.findall(r"`(\w+)`", table))
    assert not missing

    async def hand_back() -> None:
        cycle = Cycle(file_store, "_hotload/rollouts/grpo7-000012-0123abcd")
        await cycle.write("a", "b")
        await cycle.tell(is_complete=True)

    asyncio.run(hand_back())
    code = page.split("```python\n")[1].split("```")[0]
    assert "s3://acme-rl/acme-rollouts" in code
    trained: list[dict[str, Any]] = []
    names = {"train": trained.append, "save": lambda: None}
    # Without torch the page's last call stands for itself.
    code = code.replace("to_tensors(trl_batch(batch))", "trl_batch(batch)")
    exec(code.replace("s3://acme-rl/acme-rollouts", file_store.url), names)
    assert [arrays["completion_ids"].shape for arrays in trained] == [(4, 2)]


def test_the_page_tells_how_a_drift_is_told(
    file_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    async def hand_back() -> None:
        cycle = Cycle(file_store)
        await cycle.write("a", "b", "c")
        await cycle.tell(is_complete=True)

    asyncio.run(hand_back())
    page = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
    code = page.split("## Tell the drift")[1].split("```python\n")[1].split("```")[0]
    names = {
        "make_batch": make_batch,
        "reader": reader(file_store),
        "train": lambda batch: batch.sampling_logprobs - 0.25,
        "save": lambda: None,
    }
    exec(code.replace("to_tensors(trl_batch(batch))", "batch"), names)
    assert "token_count=12" in capsys.readouterr().out
