"""What waits to be written, counted while the store writes and other groups end."""

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hotload.clients.store import Store
from hotload.dataset.parquet import render_rollouts
from hotload.dataset.rollout_plan import PartPlan, RolloutPart, RolloutPlan
from hotload.dataset.sample_extracts import merge_extracts
from hotload.dataset.table import rollouts_frame
from hotload.errors import StoreUnavailableError
from hotload.options import Groups
from hotload.rollout.counts import RolloutCounts
from hotload.rollout.group_rules import GroupTally, JudgedGroup, SettledGroup
from hotload.rollout.trajectory import Problem
from hotload.sampling.part_writer import FULL_TOKENS, PartWriter
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


class WaitingStore(Store):
    """A store that writes as soon as it may."""

    async def create_bytes(self, data: bytes, path: str) -> bool:
        begun.set()
        await may_end.wait()
        return await super().create_bytes(data, path)


begun, may_end = asyncio.Event(), asyncio.Event()


def settled(problem: Problem, text: str = "a", *, is_dropped: bool = False) -> SettledGroup:
    """A group of one sample that fills a file."""
    sample = trajectory(segment((2,), prompt=(7,) * FULL_TOKENS), problem_id=problem.id, text=text)
    group = scored_group(
        sample, problem=problem, rewards=(1.0,), mark="uniform" if is_dropped else None
    )
    return GroupTally().settle(JudgedGroup(group, is_dropped), Groups(), is_refill=False)


async def test_groups_that_end_during_a_write_still_count(tmp_path: Path) -> None:
    writer = PartWriter(WaitingStore(url=f"file://{tmp_path}"), PLAN, PLAN.parts[0])
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
    store = Store(url=f"file://{tmp_path}")
    written = []
    for text in ("one run", "another"):
        writer = PartWriter(store, PLAN, PLAN.parts[0])
        writer.take(settled(PROBLEMS[0], text))
        await writer.write()
        written += writer.parts
    names = await store.names(PLAN.directory)
    assert names == ["part-00000-00.parquet", "part-00000-01.parquet"]
    for named, kept in (({}, names[0]), ({names[1]: written[1]}, names[1])):
        resumed = PartWriter(store, PLAN, PLAN.parts[0])
        await resumed.find(names, named)
        assert [part.file for part in resumed.parts] == [kept]


@dataclass(frozen=True, eq=False)
class Forgetful(Store):
    """A store that wrote the first file, and the answer to that was lost."""

    forgotten: list[str] = field(default_factory=list)

    async def create_bytes(self, data: bytes, path: str) -> bool:
        is_new = await super().create_bytes(data, path)
        if not self.forgotten:
            self.forgotten.append(path)
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
    store = Store(url=f"file://{tmp_path}")
    written = []
    for other in (PROBLEMS[1], part.reserve[0]):
        writer = PartWriter(store, plan, part)
        writer.take(settled(PROBLEMS[0], is_dropped=True))
        writer.take(settled(other))
        await writer.write()
        written += writer.parts
    names = await store.names(plan.directory)
    for named, kept, left in (
        ({}, names[0], "r0"),
        ({names[1]: written[1]}, names[1], PROBLEMS[1].id),
    ):
        resumed = PartWriter(store, plan, part)
        await resumed.find(names, named)
        assert [each.file for each in resumed.parts] == [kept]
        assert [problem.id for problem in resumed.progress.to_do()] == [left]


async def test_the_counts_that_are_read_back_are_those_that_were_written(tmp_path: Path) -> None:
    """However the groups were split into files, and whoever reads them, they add up to the same."""
    store = Store(url=f"file://{tmp_path}")
    together, first, second = (PartWriter(store, PLAN, PLAN.parts[0]) for _ in range(3))
    groups = [settled(PROBLEMS[0], "ab"), settled(PROBLEMS[1], "x" * 5000)]
    for writer, some in ((first, groups[:1]), (second, groups[1:])):
        for group in some:
            writer.take(group)
        await writer.write()
    resumed = PartWriter(store, PLAN, PLAN.parts[0])
    await resumed.find(await store.names(PLAN.directory), {})
    assert resumed.parts == [*first.parts, *second.parts]
    assert resumed.extracts == merge_extracts((*first.extracts, *second.extracts))
    for group in groups:
        together.take(group)
    await together.write()
    assert RolloutCounts.total(resumed.parts) == RolloutCounts.total(together.parts)
    assert RolloutCounts.total(resumed.parts).samples is not None


async def test_a_file_without_counts_has_those_that_its_manifest_names(tmp_path: Path) -> None:
    """An earlier version of hotload wrote it; without a manifest's entry it is sampled again."""
    store = Store(url=f"file://{tmp_path}")
    group = settled(PROBLEMS[0]).group
    frame = rollouts_frame([group], run_id="run", policy_version=3)
    data = render_rollouts(frame, digest=DIGEST, notes='{"groups": {"raw_samples": 1}}')
    file = PLAN.parts[0].file(0)
    await store.put_bytes(data, PLAN.path(file))
    entry = RolloutPart(
        file=file,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        digest=DIGEST,
        group_count=1,
        sample_count=1,
    )
    damaged = entry.model_copy(update={"sha256": DIGEST})
    for named, expected in (({file: entry}, [entry]), ({file: damaged}, []), ({}, [])):
        resumed = PartWriter(store, PLAN, PLAN.parts[0])
        await resumed.find([file], named)
        assert resumed.parts == expected
        assert len(resumed.progress.to_do()) == 2 - len(expected)
