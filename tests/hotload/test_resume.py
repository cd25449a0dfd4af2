"""What a step leaves behind, and how a run that was killed anywhere goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hotload.errors import IdentityConflictError, StoreError
from hotload.training.policy_loss import PolicyLoss
from hotload.training.resume import (
    RESUMPTION,
    Export,
    Leg,
    ResumeLeg,
    check_same_run,
    exported_step,
    find_position,
    plan_resume,
)
from hotload.training.settings import StateRef
from hotload.training.step_record import (
    STEP_RECORD_LIMIT_BYTES,
    ExportedCheckpoint,
    StepRecord,
    TrainedGroups,
)
from hotload.training.windows import Cursor, Windows
from tests.factories import run_facts, step_record

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
FACTS = run_facts(dataset_sha256=A, loss=PolicyLoss(policy_loss="dapo"))


def record(step: int, parent: StepRecord | None, **changed: Any) -> StepRecord:
    given_ = {
        "run_id": "grpo7",
        "step": step,
        "facts": FACTS,
        "state": StateRef(path=f"states/{step}", sha256=B),
        "checkpoint": ExportedCheckpoint(policy_version=step, content_sha256=C),
        "window_began": Cursor(done_before=2 * step - 2),
        "window_size": 2,
        "groups": (TrainedGroups(part_sha256=A, problem_ids=("p1", "p0")),),
        "cursor": Cursor(done_before=2 * step),
        "trainer": {"name": "torch", "is_deterministic": True},
        "figures": {"loss": 0.0, "grad_norm": 1.25},
    }
    return step_record(parent, **(given_ | changed))


def records_of(
    steps: int, *, saves: Sequence[int] | None = None, exports: Sequence[int] | None = None
) -> list[StepRecord]:
    """Records of a run; `saves` and `exports` are the steps that did, all if left out."""
    records: list[StepRecord] = []
    for step in range(1, steps + 1):
        changed: dict[str, Any] = {}
        if saves is not None and step not in saves:
            changed["state"] = None
        if exports is not None and step not in exports:
            changed["checkpoint"] = None
        records.append(record(step, records[-1] if records else None, **changed))
    return records


# Records.


def test_a_record_comes_back_as_it_was_written() -> None:
    (first, second) = records_of(2)
    assert StepRecord.parse(second.render(), path="steps/2") == second
    assert second.parent_sha256 == first.sha256
    assert StepRecord.parse(second.render(), path="x").sha256 == second.sha256


def test_a_record_of_a_newer_version_is_refused_as_such() -> None:
    newer = json.loads(record(1, None).render()) | {"schema_number": 2, "dreams": []}
    with pytest.raises(StoreError, match="schema number 2, this program reads 1: resume with"):
        StepRecord.parse(json.dumps(newer).encode(), path="steps/1")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not a step record"),
        (b"{", "not a step record"),
        (b"[" * 100_000, "not a step record"),
        (b"\xff\xfe", "not a step record"),
        (b"[]", "not a step record"),
        (b'{"schema_number": "2"}', "not a step record"),
        (record(1, None).render()[:-40], "not a step record"),
        (b" " * (STEP_RECORD_LIMIT_BYTES + 1), "16777217 bytes, expected at most 16777216"),
    ],
    ids=range(8),
)
def test_what_is_no_record_is_refused(data: bytes, found: str) -> None:
    with pytest.raises(StoreError, match=rf"^steps/1: .*{found}.*whoever keeps the store acts"):
        StepRecord.parse(data, path="steps/1")


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 0},
        {"step": 2},
        {"parent_sha256": A},
        {"run_id": "a/b"},
        {"groups": (TrainedGroups.model_construct(part_sha256=A, problem_ids=()),)},
        {"learning_rate": math.nan},
        {"learning_rate": -1e-9},
        {"figures": {"loss": math.nan}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_is_refused(changed: dict[str, Any]) -> None:
    whole = json.loads(record(1, None).render())
    plain = {
        name: [each.model_dump() for each in value] if name == "groups" else value
        for name, value in changed.items()
    }
    with pytest.raises(ValidationError):
        StepRecord.model_validate(whole | plain)


# The decision.


def test_every_finding_has_its_legs_and_every_run_ends_at_its_last_step() -> None:
    assert set(RESUMPTION) == set(Export)
    for found, legs in RESUMPTION.items():
        assert legs[-1] is (Leg.EXPORT if found is Export.NEW else Leg.END)


def test_a_new_run_begins_and_exports() -> None:
    for is_here in (False, True):
        (leg,) = plan_resume([], is_here=is_here)
        assert leg == ResumeLeg(begins=True, state=None, replayed=(), exports=True)


def test_what_lies_here_stays_where_nothing_before_it_is_made_again() -> None:
    """Steps within a window follow the exporting one: state after it, or at it."""
    for saves in ([2], [2, 3], [4], [1, 4]):
        records = records_of(5, saves=saves, exports=[2])
        (leg,) = plan_resume(records, is_here=True)
        newest = max(saves)
        assert (leg.begins, leg.exports) == (False, False)
        assert leg.state == records[newest - 1].state
        assert leg.replayed == tuple(records[newest:])


def test_a_version_that_is_gone_is_exported_again_and_the_newest_state_loaded_then() -> None:
    records = records_of(5, saves=[1, 4], exports=[3])
    export, end = plan_resume(records, is_here=False)
    assert export == ResumeLeg(False, records[0].state, (records[1], records[2]), exports=True)
    assert end == ResumeLeg(False, records[3].state, (records[4],), exports=False)
    # Of the start weights no step is made.
    records = records_of(3, saves=[3], exports=[])
    export, end = plan_resume(records, is_here=False)
    assert export == ResumeLeg(True, None, (), exports=True)
    assert end == ResumeLeg(False, records[2].state, (), exports=False)


@pytest.mark.parametrize("is_here", [False, True])
def test_a_version_whose_steps_are_made_again_is_exported_again(is_here: bool) -> None:
    records = records_of(4, saves=[1], exports=[1, 3])
    export, end = plan_resume(records, is_here=is_here)
    assert export == ResumeLeg(False, records[0].state, (records[1], records[2]), exports=True)
    assert end == ResumeLeg(False, None, (records[3],), exports=False)


def test_what_a_branch_begins_with_is_needed_only_before_it_has_a_state_of_its_own() -> None:
    records = records_of(3, saves=[2])
    assert not any(leg.begins for leg in plan_resume(records, is_here=True))
    without = records_of(3, saves=[])
    assert [leg.begins for leg in plan_resume(without, is_here=True)] == [True, False]


def test_a_record_that_closes_a_run_is_no_step_to_make_again() -> None:
    records = records_of(2, saves=[], exports=[])
    records.append(record(3, records[-1], groups=(), learning_rate=0, state=None))
    (export, end) = plan_resume(records, is_here=False)
    assert (export.replayed, end.replayed) == (tuple(records[:2]), ())


@given(st.integers(1, 8), st.sets(st.integers(1, 8)), st.sets(st.integers(1, 8)), st.booleans())
def test_no_step_is_lost_and_none_is_made_twice(
    steps: int, saves: set[int], exports: set[int], is_here: bool
) -> None:
    records = records_of(steps, saves=[*saves], exports=[*exports])
    at: int | None = None
    for leg in plan_resume(records, is_here=is_here):
        assert leg.begins == (at is None and leg.state is None)
        at = at or 0
        if leg.state is not None:
            at = next(one.step for one in records if one.state == leg.state)
        for one in leg.replayed:
            assert one.step == at + 1
            at += 1
        if leg.exports:
            assert at == exported_step(records)
    assert at == steps


def test_records_that_do_not_follow_each_other_are_refused() -> None:
    records = records_of(3)
    with pytest.raises(StoreError, match="step 3 of grpo7: expected that of step 2"):
        plan_resume([records[0], records[2]], is_here=True)
    with pytest.raises(StoreError, match="step 2 of grpo7: expected that of step 1"):
        plan_resume(records[1:], is_here=True)
    other = record(1, None, learning_rate=5e-5)
    with pytest.raises(StoreError, match=r"follows another record of step 1.*the store acts"):
        plan_resume([other, *records[1:]], is_here=True)
    stray = record(2, records[0], run_id="grpo8")
    with pytest.raises(StoreError, match="step 2 of grpo8"):
        plan_resume([records[0], stray], is_here=True)


# The same run.


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"base_sha256": B}, "base_sha256: recorded 0000.*, declared bbbb"),
        ({"base_sha256": None}, "base_sha256: recorded 0000.*, declared None"),
        ({"reference": "frozen"}, "reference: recorded None, declared frozen"),
        ({"init_from_checkpoint": "a:3"}, "init_from_checkpoint: recorded None, declared a:3"),
        ({"dataset_sha256": B}, "dataset_sha256: recorded aaaa"),
        ({"group_size": 8}, "group_size: recorded 4, declared 8"),
        ({"seed": 1}, "seed: recorded 0, declared 1"),
        ({"shuffle": False}, "shuffle: recorded True, declared False"),
        ({"loss": PolicyLoss(policy_loss="dapo", eps_clip_high=0.3)}, "loss: recorded .*0.28"),
        ({"seed": 1, "group_size": 8}, "group_size.*; seed"),
    ],
    ids=str,
)
def test_a_run_that_is_declared_otherwise_is_refused(changed: dict[str, Any], found: str) -> None:
    check_same_run("grpo7", FACTS, FACTS.model_copy())
    with pytest.raises(IdentityConflictError, match=rf"(?s)'grpo7'.*{found}.*init_from_checkpoint"):
        check_same_run("grpo7", FACTS, FACTS.model_copy(update=changed))


def test_a_base_model_is_its_weights_and_its_name_where_a_service_keeps_them() -> None:
    moved = {"base_model": "copy"}
    check_same_run("grpo7", FACTS, FACTS.model_copy(update=moved))
    kept = FACTS.model_copy(update={"base_sha256": None})
    with pytest.raises(IdentityConflictError, match="base_model: recorded tiny, declared copy"):
        check_same_run("grpo7", kept, kept.model_copy(update=moved))


# Where it stands.

PAIRS = Windows(epochs=2, prompt_groups_per_step=1, weight_sync_interval=2, shuffle=False)


def stand(
    last: dict[str, Any] | None, windows: Windows = PAIRS
) -> tuple[int, tuple[int, ...] | None, Cursor]:
    records = [] if last is None else [record(1, None, **last)]
    at = find_position(records, windows, 5)
    return at.version, at.window and at.window.positions, at.cursor


def test_a_run_stands_where_its_last_record_says() -> None:
    assert stand(None) == (0, (0, 1), Cursor())
    within = {"sampled_version": 3, "window_began": Cursor(done_before=2), "checkpoint": None}
    third = within | {"cursor": Cursor(done_before=2, done_beyond=(3,))}
    assert stand(third) == (3, (2, 3), third["cursor"])
    # Drawn from the reserve: the window's own two are not done by it.
    drawn = within | {"cursor": Cursor(done_before=3, done_beyond=(4,))}
    assert stand(drawn) == (3, (2, 3), drawn["cursor"])
    over = within | {
        "cursor": Cursor(done_before=4),
        "checkpoint": ExportedCheckpoint(policy_version=9, content_sha256=C),
    }
    assert stand(over) == (9, (4,), Cursor(done_before=4))
    # Nothing exported, as with an interval of 0: the next cycle samples the same weights.
    assert stand(over | {"checkpoint": None}) == (4, (4,), Cursor(done_before=4))


def test_the_end_of_an_epoch_is_not_the_end_of_the_run() -> None:
    last = {"window_began": Cursor(done_before=4), "cursor": Cursor(done_before=5)}
    assert stand(last) == (1, (0, 1), Cursor(epoch=1))
    ended = {
        "window_began": Cursor(epoch=1, done_before=4),
        "cursor": Cursor(epoch=1, done_before=5),
    }
    assert stand(ended)[1] is None
    assert stand(ended | {"cursor": ended["window_began"]})[1] == (4,)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("interval", [0, 1, 2, 3])
def test_a_window_that_has_begun_keeps_its_size(groups: int, interval: int) -> None:
    """Another N, or P, is not another run: it counts from the next window on."""
    other = PAIRS.model_copy(
        update={"prompt_groups_per_step": groups, "weight_sync_interval": interval}
    )
    within = {
        "sampled_version": 3,
        "window_began": Cursor(),
        "checkpoint": None,
        "cursor": Cursor(done_before=1),
    }
    assert stand(within, other) == (3, (0, 1), Cursor(done_before=1))
    exported = ExportedCheckpoint(policy_version=4, content_sha256=C)
    over = within | {"checkpoint": exported, "cursor": Cursor(done_before=2)}
    size = interval * groups or 5
    assert stand(over, other) == (4, (2, 3, 4)[:size], Cursor(done_before=2))
