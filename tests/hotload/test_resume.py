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
    STEP_TRANSITIONS,
    StepEvent,
    StepState,
    check_same_run,
    find_position,
    plan_resume,
    replayed_checkpoint,
)
from hotload.training.settings import StateRef
from hotload.training.step_record import (
    STEP_RECORD_LIMIT_BYTES,
    ExportedCheckpoint,
    RunFacts,
    StepRecord,
    TrainedGroups,
)
from hotload.training.windows import Cursor, Windows

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
FACTS = RunFacts(
    base_model="tiny", dataset_sha256=A, group_size=4, seed=0, loss=PolicyLoss(policy_loss="dapo")
)


def record(step: int, parent: StepRecord | None, **changed: Any) -> StepRecord:
    given_ = {
        "run_id": "grpo7",
        "step": step,
        "parent_sha256": parent and parent.sha256,
        "facts": FACTS,
        "state": StateRef(path=f"states/{step}", sha256=B),
        "checkpoint": ExportedCheckpoint(policy_version=step, content_sha256=C),
        "sampled_version": step - 1,
        "window_began": Cursor(done_before=2 * step - 2),
        "groups": (TrainedGroups(part_sha256=A, problem_ids=("p1", "p0")),),
        "cursor": Cursor(done_before=2 * step),
        "learning_rate": 1e-5,
        "divisor_mode": "num_loss_tokens",
        "divisor": 812,
        "micro_batches": (3, 5),
        "trainer": {"name": "torch", "is_deterministic": True},
        "figures": {"loss": 0.0, "grad_norm": 1.25},
    }
    return StepRecord(**(given_ | changed))


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
    own = record(1, None, facts=FACTS.model_copy(update={"loss": "mine:loss"}))
    assert StepRecord.parse(own.render(), path="x") == own


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
    with pytest.raises(StoreError, match=found):
        StepRecord.parse(data, path="steps/1")


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 0},
        {"step": 2},
        {"parent_sha256": A},
        {"run_id": "a/b"},
        {"groups": ()},
        {"groups": (TrainedGroups.model_construct(part_sha256=A, problem_ids=()),)},
        {"micro_batches": ()},
        {"micro_batches": (0,)},
        {"learning_rate": math.nan},
        {"learning_rate": 0},
        {"divisor": math.inf},
        {"figures": {"loss": math.nan}},
        {"divisor_mode": "num_tokens"},
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


# The table.


def test_a_kill_before_the_record_leads_back_and_one_after_it_changes_nothing() -> None:
    killed = {
        before: after
        for (before, event), after in STEP_TRANSITIONS.items()
        if event is StepEvent.KILLED
    }
    early = {StepState.LEASED, StepState.SAVED, StepState.EXPORTED}
    assert {before for before, after in killed.items() if after is StepState.LEASED} == early
    assert all(after is before for before, after in killed.items() if before not in early)
    assert set(killed) == set(StepState)
    assert set(RESUMPTION) == set(killed.values())


def test_nothing_is_acknowledged_or_published_before_its_record() -> None:
    for event in (StepEvent.ACKNOWLEDGE, StepEvent.PUBLISH):
        sources = {before for (before, each), _ in STEP_TRANSITIONS.items() if each is event}
        assert not sources & {StepState.LEASED, StepState.SAVED, StepState.EXPORTED}


def test_what_is_owed_leads_to_the_end() -> None:
    for found, owed in RESUMPTION.items():
        state = found
        for event in owed:
            # A cycle that goes on is started again.
            state = STEP_TRANSITIONS.get((state, event), state)
        if found is not StepState.LEASED:
            assert state in (StepState.PUBLISHING, StepState.DONE)


# The decision.


def test_a_new_run_begins_at_step_1() -> None:
    plan = plan_resume([])
    assert (plan.next_step, plan.state, plan.replayed) == (1, None, ())


@pytest.mark.parametrize(
    ("last_state", "acknowledges", "publishes"),
    [
        (StepState.RECORDED, True, True),
        (StepState.ACKNOWLEDGED, False, True),
        (StepState.PUBLISHING, False, True),
        (StepState.DONE, False, False),
    ],
)
def test_what_the_last_record_is_owed(
    last_state: StepState, acknowledges: bool, publishes: bool
) -> None:
    records = records_of(3)
    plan = plan_resume(records, last_state)
    assert (plan.next_step, plan.replayed) == (4, ())
    assert plan.state == records[-1].state
    assert plan.acknowledges == (records[-1] if acknowledges else None)
    assert plan.publishes == (records[-1].checkpoint if publishes else None)
    assert plan_resume(records, last_state) == plan


def test_a_step_within_a_window_has_nothing_to_publish() -> None:
    plan = plan_resume(records_of(3, exports=[2]), StepState.ACKNOWLEDGED)
    assert plan.publishes is None


def test_steps_since_the_newest_state_are_made_again() -> None:
    records = records_of(5, saves=[1, 3])
    plan = plan_resume(records, StepState.DONE)
    assert plan.state == records[2].state
    assert plan.replayed == (records[3], records[4])
    assert plan.next_step == 6


@given(st.integers(1, 8), st.sets(st.integers(1, 8)), st.sampled_from(list(RESUMPTION)[1:]))
def test_no_step_is_lost_and_none_is_trained_twice(
    steps: int, saves: set[int], last_state: StepState
) -> None:
    records = records_of(steps, saves=[*saves])
    plan = plan_resume(records, last_state)
    loaded = max((each.step for each in records if each.state), default=0)
    assert plan.state == (records[loaded - 1].state if loaded else None)
    again = [each.step for each in plan.replayed]
    assert [*range(1, loaded + 1), *again, plan.next_step] == list(range(1, steps + 2))


def test_a_run_without_a_state_is_made_again_from_the_start() -> None:
    records = records_of(2, saves=[])
    plan = plan_resume(records, StepState.DONE)
    assert (plan.state, plan.replayed, plan.next_step) == (None, tuple(records), 3)


def test_records_that_do_not_follow_each_other_are_refused() -> None:
    records = records_of(3)
    done = StepState.DONE
    with pytest.raises(StoreError, match="step 3 of grpo7: expected that of step 2"):
        plan_resume([records[0], records[2]], done)
    with pytest.raises(StoreError, match="step 2 of grpo7: expected that of step 1"):
        plan_resume(records[1:], done)
    other = record(1, None, divisor=5)
    with pytest.raises(StoreError, match="follows another record of step 1"):
        plan_resume([other, *records[1:]], done)
    stray = record(2, records[0], run_id="grpo8")
    with pytest.raises(StoreError, match="step 2 of grpo8"):
        plan_resume([records[0], stray], done)


@pytest.mark.parametrize("early", [None, StepState.LEASED, StepState.SAVED, StepState.EXPORTED])
def test_a_recorded_step_cannot_be_before_its_record(early: StepState | None) -> None:
    with pytest.raises(ValueError, match="step 1 has a record"):
        plan_resume(records_of(1), early)


# The same run.


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"base_model": "large"}, "base_model: recorded tiny, declared large"),
        ({"dataset_sha256": B}, "dataset_sha256: recorded aaaa"),
        ({"group_size": 8}, "group_size: recorded 4, declared 8"),
        ({"seed": 1}, "seed: recorded 0, declared 1"),
        ({"loss": PolicyLoss(policy_loss="dapo", eps_clip_high=0.3)}, "loss: recorded .*0.28"),
        ({"loss": "mine:loss"}, "declared mine:loss"),
        ({"seed": 1, "group_size": 8}, "group_size.*; seed"),
    ],
    ids=str,
)
def test_a_run_that_is_declared_otherwise_is_refused(changed: dict[str, Any], found: str) -> None:
    check_same_run("grpo7", FACTS, FACTS.model_copy())
    with pytest.raises(IdentityConflictError, match=rf"(?s)'grpo7'.*{found}.*init_from_checkpoint"):
        check_same_run("grpo7", FACTS, FACTS.model_copy(update=changed))


def test_one_version_never_has_two_contents() -> None:
    recorded = ExportedCheckpoint(policy_version=4, content_sha256=A)
    assert replayed_checkpoint(recorded, A, next_version=6) is recorded
    other = replayed_checkpoint(recorded, B, next_version=6)
    assert other == ExportedCheckpoint(policy_version=6, content_sha256=B, resumed_from=4)


# Where it stands.

PAIRS = Windows(epochs=2, prompt_groups_per_step=1, weight_sync_interval=2, shuffle=False)


def stand(last: dict[str, Any] | None) -> tuple[int, tuple[int, ...] | None, Cursor]:
    records = [] if last is None else [record(1, None, **last)]
    at = find_position(records, PAIRS, 5)
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
