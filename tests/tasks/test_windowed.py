"""Where a run whose windows take turns stands by its records."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hotload.clients.store import Store
from hotload.rollout.counts import GroupCounts
from hotload.rollout.trajectory import Problem
from hotload.trainers.declaration import TrainingSpec
from hotload.training.step_record import (
    ExportedCheckpoint,
    StepRecord,
    TrainedGroups,
)
from hotload.training.windows import Cursor
from tasks.training.run import WindowedRun, open_run
from tests.factories import step_record

SHA = "0" * 64
PROBLEMS = tuple(Problem(f"p{n}", f"{n}", answer="") for n in range(6))


def record(
    parent: StepRecord | None, version: int, began: int, problem: int, **changed: Any
) -> StepRecord:
    """A step of one problem in a window of two."""
    given = {
        "state": None,
        "checkpoint": None,
        "sampled_version": version,
        "window_began": Cursor(done_before=began),
        "window_size": 2,
        "groups": (TrainedGroups(part_sha256=SHA, problem_ids=(f"p{problem}",)),),
        "cursor": Cursor(done_before=began).done([problem]),
    }
    return step_record(parent, **(given | changed))


def run_of(tmp_path: Path, *records: StepRecord, **windows: Any) -> WindowedRun:
    spec = TrainingSpec.model_validate(
        {
            "cycle": {"run_id": "run", "work_dir": str(tmp_path), "problems": {"dataset": "/d"}},
            "trainer": {"name": "a:b"},
            "windows": {
                "prompt_groups_per_step": 1,
                "weight_sync_interval": 2,
                "shuffle": False,
                **windows,
            },
        }
    )
    with ThreadPoolExecutor(1) as calls:
        return WindowedRun(spec, Store(tmp_path.as_uri()), PROBLEMS, list(records), calls)


def three_steps() -> list[StepRecord]:
    """A window of two steps, which exported version 1, and the first step of the next one."""
    first = record(None, 0, 0, 0)
    exported = ExportedCheckpoint(policy_version=1, content_sha256=SHA)
    second = record(first, 0, 0, 1, checkpoint=exported, cursor=Cursor(done_before=2))
    return [first, second, record(second, 1, 2, 3)]


def test_a_version_that_is_spent_within_a_window_trains_no_problem_twice(tmp_path: Path) -> None:
    run = run_of(tmp_path, *three_steps())
    assert run.exported_version == run.at.version == 1
    assert run.at.window is not None
    assert run.at.window.positions == (2, 3)
    run.go_on_as(2)
    assert run.exported_version == run.at.version == 2
    assert run.at.window.positions == (2, 4)
    assert not {"p0", "p1", "p3"} & {PROBLEMS[place].id for place in run.at.window.positions}
    # What is recorded now says the same to whoever starts it next.
    records = [*run.records, record(run.records[-1], 2, 2, 2, cursor=run.at.cursor.done([2]))]
    began = {"window_began": run.at.began, "window_size": 2}
    records[-1] = records[-1].model_copy(update=began)
    again = run_of(tmp_path, *records)
    assert (again.at.version, again.at.window) == (2, run.at.window)


def test_a_run_of_another_interval_goes_on(tmp_path: Path) -> None:
    for interval in (0, 1, 3):
        within = run_of(tmp_path, *three_steps(), weight_sync_interval=interval)
        assert within.at.window is not None
        assert (within.at.version, within.at.window.positions) == (1, (2, 3))
        over = run_of(tmp_path, *three_steps()[:2], weight_sync_interval=interval)
        assert over.at.window is not None
        assert (over.at.version, over.at.window.positions[0]) == (1, 2)
        cycle = over.spec.cycle_of(over.at.version, over.exported_version)
        assert cycle.checkpoint == str(over.spec.checkpoint_of(1))


def test_what_closes_a_run_exports_under_a_version_that_nothing_has_used(tmp_path: Path) -> None:
    """An epoch that taught something, one that did not, and nothing was published since the
    start."""
    first = record(None, 0, 0, 0, cursor=Cursor(done_before=6), window_size=6)
    run = run_of(tmp_path, first, weight_sync_interval=0, epochs=2)
    assert (run.at.version, run.exported_version) == (1, 0)
    run.leave_window(GroupCounts())
    assert run.at.window is None
    place = run.closing_place()
    assert (place.exports_as, place.is_end) == (2, True)
    closing = record(
        first,
        place.sampled_version,
        0,
        0,
        groups=(),
        learning_rate=0,
        cursor=place.cursor,
        checkpoint=ExportedCheckpoint(policy_version=2, content_sha256=SHA),
    )
    run.add(closing)
    assert (run.at.window, run.exported_version) == (None, 2)
    # More epochs go on from there.
    more = run_of(tmp_path, first, closing, weight_sync_interval=0, epochs=3)
    assert more.at.window is not None
    assert (more.at.version, more.at.window.epoch) == (2, 2)


def test_the_order_of_an_epoch_is_worked_out_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, shuffle=True)
    groups = [run.groups_from(version, 0) for version in (0, 1)]
    assert groups[0].positions is groups[1].positions is run.order(0).positions
    assert [one.id for one in run.order(0).problems] == list(run.order(0).positions)
    zero = run.order(0)
    run.order(1)
    assert run.order(0) is zero  # a window of it may be open
    run.order(2)
    assert set(run._epochs) == {1, 2}


async def test_a_learning_rate_without_a_course_is_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    problems = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{n}", "prompt": f"{n}", "answer": ""} for n in range(8)]
    problems.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    spec = TrainingSpec.model_validate(
        {
            "cycle": {
                "run_id": "run",
                "work_dir": str(tmp_path),
                "problems": {"dataset": str(problems)},
            },
            "trainer": {"name": "nowhere:nothing"},
            "windows": {"prompt_groups_per_step": 1},
            "schedule": {"lr_scheduler": "cosine", "warmup_steps": 10},
        }
    )
    with ThreadPoolExecutor(1) as calls:
        opening = open_run.fn(spec, Store(tmp_path.as_uri()), calls, WindowedRun)
        with pytest.raises(ValueError, match="a warm-up of 10 steps leaves none of 8"):
            await opening
