"""What waits to be written, counted while the store writes and other groups end."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from blocks.checkpoint_store import CheckpointStore
from hotload.dataset.rollout_plan import PartPlan, RolloutPlan
from hotload.errors import StoreUnavailableError
from hotload.rollout.group_rules import Tally, Verdict
from hotload.rollout.trajectory import Problem
from hotload.sampling.part_writer import FULL_TOKENS, PartWriter, Settled
from hotload.spec import Groups
from tests.factories import scored_group, segment, trajectory

IDENTITY = "run-000003-0badf00d"
PROBLEMS = tuple(Problem(str(number), "x") for number in range(2))
DIGEST = "0" * 64
PLAN = RolloutPlan(
    "run",
    IDENTITY,
    3,
    f"_hotload/rollouts/{IDENTITY}",
    (PartPlan(0, PROBLEMS, DIGEST),),
    DIGEST,
    1,
)


class Store(CheckpointStore):
    """A store that writes as soon as it may."""

    _block_type_slug = "store-that-waits"

    async def create_bytes(self, data: bytes, path: str) -> bool:
        begun.set()
        await may_end.wait()
        return await super().create_bytes(data, path)


begun, may_end = asyncio.Event(), asyncio.Event()


def settled(problem: Problem, text: str = "a", *, is_dropped: bool = False) -> Settled:
    """A group of one sample that fills a file."""
    sample = trajectory(segment((2,), prompt=(7,) * FULL_TOKENS), problem_id=problem.id, text=text)
    group = scored_group(
        sample, problem=problem, rewards=(1.0,), mark="uniform" if is_dropped else None
    )
    counts = Tally().counts(Verdict(group, is_dropped), Groups(), is_refill=False)
    return Settled(group, counts, is_dropped)


async def test_groups_that_end_during_a_write_still_count(tmp_path: Path) -> None:
    writer = PartWriter(Store(url=f"file://{tmp_path}"), PLAN, PLAN.parts[0])
    writer.take(settled(PROBLEMS[0]))
    writing = asyncio.create_task(writer.write())
    await begun.wait()
    writer.take(settled(PROBLEMS[1]))
    may_end.set()
    assert await writing
    assert writer.is_full
    assert await writer.make_room()
    assert writer.waits_seconds == 0
    assert [each.group_count for each in writer.parts] == [1, 1]


async def test_of_what_two_runs_wrote_the_file_that_a_reader_may_have_counts(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(url=f"file://{tmp_path}")
    for text in ("one run", "another"):
        writer = PartWriter(store, PLAN, PLAN.parts[0])
        writer.take(settled(PROBLEMS[0], text))
        await writer.write()
    names = await store.names(PLAN.directory)
    assert names == ["part-00000-00.parquet", "part-00000-01.parquet"]
    for told, kept in ((frozenset(), names[0]), (frozenset(names[1:]), names[1])):
        resumed = PartWriter(store, PLAN, PLAN.parts[0])
        await resumed.find(names, told)
        assert [part.file for part in resumed.parts] == [kept]


class Forgetful(CheckpointStore):
    """A store that wrote the first file, and the answer to that was lost."""

    _block_type_slug = "forgetful-store"

    has_forgotten: bool = False

    async def create_bytes(self, data: bytes, path: str) -> bool:
        is_new = await super().create_bytes(data, path)
        if not self.has_forgotten:
            self.has_forgotten = True
            raise StoreUnavailableError(path, "no answer")
        return is_new


async def test_a_group_is_in_one_file_though_the_store_s_answer_was_lost(tmp_path: Path) -> None:
    store = Forgetful(url=f"file://{tmp_path}")
    writer = PartWriter(store, PLAN, PLAN.parts[0])
    writer.take(settled(PROBLEMS[0], is_dropped=True))
    with pytest.raises(StoreUnavailableError):
        await writer.write()
    writer.take(settled(PROBLEMS[1]))
    assert await writer.write()
    assert not await writer.write()
    names = await store.names(PLAN.directory)
    assert names == [part.file for part in writer.parts]
    assert [len(part.groups.dropped_groups) for part in writer.parts] == [1, 0]


async def test_a_dropped_group_that_two_files_have_counts_once(tmp_path: Path) -> None:
    """Two runs at once dropped it, and each sampled another row beside."""
    part = replace(PLAN.parts[0], reserve=(Problem("r0", "x"), Problem("r1", "x")))
    plan = replace(PLAN, parts=(part,))
    store = CheckpointStore(url=f"file://{tmp_path}")
    for other in (PROBLEMS[1], part.reserve[0]):
        writer = PartWriter(store, plan, part)
        writer.take(settled(PROBLEMS[0], is_dropped=True))
        writer.take(settled(other))
        await writer.write()
    names = await store.names(plan.directory)
    for told, kept, left in (
        (frozenset(), names[0], "r0"),
        (frozenset(names[1:]), names[1], PROBLEMS[1].id),
    ):
        resumed = PartWriter(store, plan, part)
        await resumed.find(names, told)
        assert [each.file for each in resumed.parts] == [kept]
        assert [problem.id for problem in resumed.progress.to_do()] == [left]
