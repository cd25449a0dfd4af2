"""What waits to be written, counted while the store writes and other groups end."""

import asyncio
from pathlib import Path

from blocks.checkpoint_store import CheckpointStore
from hotload.groups import Tally, Verdict
from hotload.parts import PartPlan, RolloutPlan
from hotload.spec import Groups
from hotload.trajectories import Problem, Provenance, ScoredGroup, Trajectory
from tasks.part_writer import FULL_TOKENS, PartWriter, Settled

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


def settled(problem: Problem, text: str = "a") -> Settled:
    """A group of one sample that fills a file."""
    origin = Provenance(IDENTITY, "r", "s", 1, (IDENTITY,), IDENTITY)
    prompt = (7,) * FULL_TOKENS
    sample = Trajectory(problem.id, 0, 0, origin, 0.1, prompt, (2,), (-0.5,), (True,), text, "stop")
    group = ScoredGroup(problem, (sample,), (1.0,), (0.0,))
    return Settled(group, Tally().counts(Verdict(group), Groups(), is_refill=False), False)


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
