"""Part files: two runs of one cycle at once never write over each other's."""

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from hotload.clients.store import Store
from hotload.dataset.rollout_plan import RolloutPart, RolloutPlan
from hotload.rollout.counts import GroupCounts
from hotload.rollout.group_rules import SettledGroup
from hotload.rollout.trajectory import ScoredGroup
from hotload.sampling.part_files import read_parts, write_part
from hotload.sampling.problems import plan_rollouts
from tests.factories import cycle_spec, provenance, scored_group, trajectory

IDENTITY = "run-000003-0badf00d"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(url=f"file://{tmp_path}/store")


@pytest.fixture
async def plan(tmp_path: Path) -> RolloutPlan:
    dataset = tmp_path / "problems.jsonl"
    dataset.write_text("".join(json.dumps({"id": n, "prompt": "x"}) + "\n" for n in range(4)))
    spec = cycle_spec(work_dir=str(tmp_path), problems={"dataset": str(dataset)})
    return await plan_rollouts(spec, IDENTITY)


def group(problem_id: str, text: str, identity: str = IDENTITY) -> ScoredGroup:
    sample = trajectory(problem_id=problem_id, provenance=provenance(identity), text=text)
    return scored_group(sample, rewards=(1.0,))


async def write(
    store: Store, plan: RolloutPlan, *groups: ScoredGroup, piece: int = 0
) -> RolloutPart:
    settled = [SettledGroup(group, GroupCounts(), is_dropped=False) for group in groups]
    return (await write_part(store, plan, plan.parts[0], piece, settled)).part


async def sha256(store: Store, path: str) -> str:
    return hashlib.sha256(await store.read_bytes(path, limit_bytes=1 << 20)).hexdigest()


async def test_runs_at_once_take_files_of_their_own(store: Store, plan: RolloutPlan) -> None:
    runs = (write(store, plan, group(str(n), f"run {n}")) for n in range(4))
    written = await asyncio.gather(*runs)
    files = [f"part-00000-{n:02d}.parquet" for n in range(4)]
    assert sorted(part.file for part in written) == files
    for part in written:
        assert await sha256(store, plan.path(part.file)) == part.sha256
    found = await read_parts(store, plan, plan.parts[0], files, {})
    assert sorted((each.part for each in found), key=lambda part: part.file) == sorted(
        written, key=lambda part: part.file
    )


async def test_an_answer_that_was_lost_makes_no_second_file(
    store: Store, plan: RolloutPlan
) -> None:
    first = await write(store, plan, group("0", "x"))
    assert await write(store, plan, group("0", "x")) == first
    assert await store.names(plan.directory) == [first.file]


async def test_what_is_not_ours_is_left_as_it_is(store: Store, plan: RolloutPlan) -> None:
    await store.put_bytes(b"of an earlier plan", plan.path("part-00000-00.parquet"))
    part = await write(store, plan, group("0", "ours"))
    assert part.file == "part-00000-01.parquet"
    left = await store.read_bytes(plan.path("part-00000-00.parquet"), limit_bytes=64)
    assert left == b"of an earlier plan"
