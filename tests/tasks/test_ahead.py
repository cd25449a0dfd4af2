"""Where an asynchronous run stands by its records: what is open, what is sampled next."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hotload.clients.store import Store
from hotload.clients.store.records import write_publication
from hotload.identity import SnapshotKind
from hotload.publish.publication import Publication, ServedSnapshot
from hotload.publish.snapshot import CheckpointContent
from hotload.rollout.problem_rows import parse_problems
from hotload.rollout.trajectory import Problem
from hotload.sampling.problem_files import read_rows
from hotload.spec import CycleSpec
from hotload.trainers.declaration import AsyncTrainingSpec
from hotload.training.step_record import (
    ExportedCheckpoint,
    StepRecord,
    TrainedGroups,
)
from hotload.training.windows import Cursor, OpenWindow
from tasks.training.ahead import AheadRun
from tests.factories import step_record

SHA = "0" * 64
PROBLEMS = tuple(Problem(f"p{n}", f"{n}", answer="") for n in range(12))


def window(version: int, first: int, count: int) -> OpenWindow:
    return OpenWindow(policy_version=version, epoch=0, first=first, count=count)


def record(*windows: OpenWindow, exported: int, cursor: int, trained: str = "p0") -> StepRecord:
    version = windows[0].policy_version
    group = TrainedGroups(part_sha256=SHA, problem_ids=(trained,), sampled_version=version)
    return step_record(
        state=None,
        checkpoint=ExportedCheckpoint(policy_version=exported, content_sha256=SHA),
        sampled_version=version,
        window_began=windows[0].began,
        window_size=windows[0].count,
        groups=(group,),
        cursor=Cursor(done_before=cursor),
        open_windows=windows,
    )


def run_of(tmp_path: Path, *records: StepRecord, **training: Any) -> AheadRun:
    spec = AsyncTrainingSpec.model_validate(
        {
            "cycle": {
                "run_id": "run",
                "work_dir": str(tmp_path),
                "problems": {"dataset": "/d"},
            },
            "trainer": {"name": "a:b"},
            "windows": {"prompt_groups_per_step": 2, "shuffle": False},
            **training,
        }
    )
    with ThreadPoolExecutor(1) as calls:
        return AheadRun(spec, Store(tmp_path.as_uri()), PROBLEMS, records, calls)


def begun(run: AheadRun) -> list[OpenWindow]:
    """The windows whose cycles are to begin, in order."""
    queue = run._to_begin
    return [one for one in (queue.get_nowait() for _ in range(queue.qsize())) if one is not None]


async def test_the_first_version_samples_for_every_step_that_it_may_be_ahead(
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path)
    run.open_windows()
    assert begun(run) == [window(0, 0, 4)]


async def test_all_open_windows_go_on_and_nothing_that_was_opened_is_opened_again(
    tmp_path: Path,
) -> None:
    """Of version 2's window all is trained while one of version 1's is still sampled."""
    run = run_of(tmp_path, record(window(1, 2, 2), window(3, 6, 2), exported=3, cursor=8))
    run.exported_version = 3
    run.open_windows()
    assert begun(run) == [window(1, 2, 2), window(3, 6, 2)]
    # One of version 1's is recorded as trained, so three are live.
    assert run.groups.live_count == 3
    assert run._open_next(4)
    assert begun(run) == [window(4, 8, 4)]
    # Near the end of a run a version samples nothing, and an old window may be the last to end.
    run = run_of(tmp_path, record(window(1, 2, 2), exported=3, cursor=8))
    run.open_windows()
    assert begun(run) == [window(1, 2, 2)]
    assert run._open_next(4)
    assert begun(run) == [window(4, 8, 4)]


async def test_a_version_that_a_replay_spent_is_sampled_under_another(tmp_path: Path) -> None:
    run = run_of(tmp_path, record(window(1, 2, 2), window(2, 4, 2), exported=2, cursor=6))
    run.go_on_as(5)
    run.exported_version = 5
    run.open_windows()
    assert begun(run) == [window(1, 2, 2), window(5, 4, 2)]


async def test_a_version_waits_for_cycles_that_it_would_be_too_far_ahead_of(
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path)
    first, second = window(0, 0, 4), window(1, 4, 2)
    for one in (first, second):
        run.begin_cycle(one)
    await run.until_near(1)
    waiting = asyncio.create_task(run.until_near(2))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.01)
    run.end_cycle(second)  # a later one has ended, the first is still under way
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.01)
    run.end_cycle(first)
    await waiting


def two_open(tmp_path: Path) -> AheadRun:
    """A run with a window of version 1 and one of version 2, which was exported last."""
    last = record(window(1, 2, 2), window(2, 4, 2), exported=2, cursor=6)
    return run_of(tmp_path, record(window(1, 2, 2), exported=1, cursor=4), last)


async def cycles_of(run: AheadRun) -> list[CycleSpec]:
    """The cycles of all open windows, begun at once."""
    run.open_windows()
    windows = begun(run)
    for one in windows:
        run.begin_cycle(one)
    return list(await asyncio.gather(*map(run.declare_cycle, windows)))


def weights(run: AheadRun, cycle: CycleSpec) -> tuple[int, int]:
    """The version whose export a cycle has, and whether it may be published."""
    places = {str(run.spec.checkpoint_of(version)): version for version in range(4)}
    return places[cycle.checkpoint], cycle.cadence.weight_sync_interval


async def test_the_cycles_of_all_open_windows_go_on_with_their_own_exports(tmp_path: Path) -> None:
    run = two_open(tmp_path)
    for version in (0, 1, 2):
        run.spec.checkpoint_of(version).mkdir(parents=True)
    for number in range(3000):
        (run.spec.checkpoint_of(0) / f"{number}").touch()
    # Both begin at once, and neither trips over what the other removes.
    older, newest = await cycles_of(run)
    assert [weights(run, one) for one in (older, newest)] == [(1, 1), (2, 1)]
    assert not run.spec.checkpoint_of(0).exists()
    problems = parse_problems(read_rows(newest.problems.dataset, {}), source="window")
    assert [one.id for one in problems] == ["p4", "p5"]


async def test_a_version_that_is_published_needs_no_export_and_meets_no_other(
    tmp_path: Path,
) -> None:
    """Its export was removed when the next one was published; its cycle samples still."""
    run = two_open(tmp_path)
    run.spec.checkpoint_of(2).mkdir(parents=True)
    served = ServedSnapshot(
        identity="run-000001-0123abcd",
        policy_version=1,
        kind=SnapshotKind.FULL,
        previous=None,
        reason="the first",
        size_bytes=0,
        content_size_bytes=0,
        replica_count=2,
    )
    content = CheckpointContent(kind=SnapshotKind.FULL, shards=(), side_files=())
    publication = Publication(content=content, snapshot=served)
    await write_publication(run.store, "run-000001", publication)
    older, newest = await cycles_of(run)
    assert [weights(run, one) for one in (older, newest)] == [(1, 1), (2, 1)]


async def test_a_version_that_is_neither_here_nor_published_is_left_out(tmp_path: Path) -> None:
    run = two_open(tmp_path)
    run.spec.checkpoint_of(2).mkdir(parents=True)
    older, newest = await cycles_of(run)
    assert older.policy_version == 1
    assert [weights(run, one) for one in (older, newest)] == [(2, 0), (2, 1)]
