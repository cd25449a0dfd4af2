"""How a run goes on after it was killed.

Theory of operation. One step goes through `StepState`s in the order of their durability; what came
before the step record counts only once the record is there, so a kill before it leads back to the
leased groups, and a kill after it changes nothing. STEP_TRANSITIONS says both; `docs/resume.md` is
drawn from it. `plan_resume` reads where a run stands from its records and from what became of the
last one, nothing remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from hotload.errors import IdentityConflictError, StoreError
from hotload.records import Record
from hotload.training.settings import StateRef
from hotload.training.step_record import ExportedCheckpoint, RunFacts, StepRecord
from hotload.training.windows import Cursor, TrainingWindow, Windows


class StepState(StrEnum):
    """How far one step has come."""

    LEASED = "leased"
    """Groups are leased; gradients exist in the trainer's memory alone."""
    SAVED = "saved"
    EXPORTED = "exported"
    RECORDED = "recorded"
    ACKNOWLEDGED = "acknowledged"
    PUBLISHING = "publishing"
    """Its cycle has begun, and may be sampling."""
    DONE = "done"


class StepEvent(StrEnum):
    """What can happen to a step."""

    SAVE_STATE = "save_state"
    EXPORT = "export"
    RECORD = "record"
    ACKNOWLEDGE = "acknowledge"
    PUBLISH = "publish"
    FINISH = "finish"
    """Its cycle ended, or it exported nothing and there is none."""
    KILLED = "killed"


STEP_TRANSITIONS: Mapping[tuple[StepState, StepEvent], StepState] = {
    (StepState.LEASED, StepEvent.SAVE_STATE): StepState.SAVED,
    (StepState.LEASED, StepEvent.EXPORT): StepState.EXPORTED,
    (StepState.LEASED, StepEvent.RECORD): StepState.RECORDED,
    (StepState.LEASED, StepEvent.KILLED): StepState.LEASED,
    (StepState.SAVED, StepEvent.EXPORT): StepState.EXPORTED,
    (StepState.SAVED, StepEvent.RECORD): StepState.RECORDED,
    (StepState.SAVED, StepEvent.KILLED): StepState.LEASED,
    (StepState.EXPORTED, StepEvent.RECORD): StepState.RECORDED,
    (StepState.EXPORTED, StepEvent.KILLED): StepState.LEASED,
    (StepState.RECORDED, StepEvent.ACKNOWLEDGE): StepState.ACKNOWLEDGED,
    (StepState.RECORDED, StepEvent.KILLED): StepState.RECORDED,
    (StepState.ACKNOWLEDGED, StepEvent.PUBLISH): StepState.PUBLISHING,
    (StepState.ACKNOWLEDGED, StepEvent.FINISH): StepState.DONE,
    (StepState.ACKNOWLEDGED, StepEvent.KILLED): StepState.ACKNOWLEDGED,
    (StepState.PUBLISHING, StepEvent.FINISH): StepState.DONE,
    (StepState.PUBLISHING, StepEvent.KILLED): StepState.PUBLISHING,
    (StepState.DONE, StepEvent.KILLED): StepState.DONE,
}


# What is still owed to the newest recorded step, by the state a kill left it in. A step without a
# record is owed nothing: it is made again from its groups.
RESUMPTION: Mapping[StepState, tuple[StepEvent, ...]] = {
    StepState.LEASED: (),
    StepState.RECORDED: (StepEvent.ACKNOWLEDGE, StepEvent.PUBLISH),
    StepState.ACKNOWLEDGED: (StepEvent.PUBLISH,),
    StepState.PUBLISHING: (StepEvent.PUBLISH,),
    StepState.DONE: (),
}


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """What a run does before it goes on with its next step.

    Args:
        next_step: the number of the step to make, once all below is done.
        state: what to load; `None` for the weights that the run began with.
        replayed: recorded steps to make again from their stored groups, in order.
        acknowledges: whose groups are acknowledged first, although they may be already.
        publishes: what is then published, or goes on being.
    """

    next_step: int
    state: StateRef | None = None
    replayed: tuple[StepRecord, ...] = ()
    acknowledges: StepRecord | None = None
    publishes: ExportedCheckpoint | None = None


def plan_resume(records: Sequence[StepRecord], last_state: StepState | None = None) -> ResumePlan:
    """Decide what a run does first when it is started again.

    The same facts give the same plan, so a run that is killed while it resumes plans again.

    Args:
        records: every step of the run, in order.
        last_state: how far the last of them has come, by the claims on its groups and its cycle;
            `None` without records.

    Raises:
        StoreError: a record is missing, or follows another than the one before it.
        ValueError: the last state is none that a recorded step can be in.
    """
    _check_lineage(records)
    if not records:
        return ResumePlan(next_step=1)
    last = records[-1]
    found = STEP_TRANSITIONS[last_state, StepEvent.KILLED] if last_state else None
    if found is None or found is StepState.LEASED:
        raise ValueError(f"step {last.step} has a record, so it cannot be {last_state}")
    with_state = [record for record in records if record.state is not None]
    owed = RESUMPTION[found]
    return ResumePlan(
        next_step=last.step + 1,
        state=with_state[-1].state if with_state else None,
        replayed=tuple(records[with_state[-1].step if with_state else 0 :]),
        acknowledges=last if StepEvent.ACKNOWLEDGE in owed else None,
        publishes=last.checkpoint if StepEvent.PUBLISH in owed else None,
    )


def _check_lineage(records: Sequence[StepRecord]) -> None:
    parent: StepRecord | None = None
    for step, record in enumerate(records, start=1):
        where = f"record of step {record.step} of {record.run_id}"
        if record.step != step or (parent and record.run_id != parent.run_id):
            raise StoreError(where, f"expected that of step {step}: one is missing or astray")
        if parent is not None and record.parent_sha256 != parent.sha256:
            found = f"{str(record.parent_sha256)[:12]}…, expected {parent.sha256[:12]}…"
            raise StoreError(where, f"follows another record of step {parent.step} ({found})")
        parent = record


@dataclass(frozen=True, slots=True)
class RunPosition:
    """Where a run stands in its problems.

    Args:
        version: the policy version whose cycle samples the window.
        window: what is sampled next, or goes on being; None when all epochs are over.
        began: what was done when the window began.
        cursor: what is done, of this window too.
    """

    version: int
    window: TrainingWindow | None
    began: Cursor
    cursor: Cursor

    @classmethod
    def at(cls, version: int, done: Cursor, windows: Windows, problem_count: int) -> RunPosition:
        """Stand at the beginning of the window that comes after what is done."""
        window = windows.next_window(done, problem_count)
        began = done if window is None else done.in_epoch(window.epoch)
        return cls(version, window, began, began)

    @property
    def end(self) -> Cursor:
        """What is done once the window is over, whatever was trained of it."""
        assert self.window is not None
        return self.cursor.done(self.window.positions)


def find_position(
    records: Sequence[StepRecord], windows: Windows, problem_count: int
) -> RunPosition:
    """Find where a run stands, from its records alone.

    A window without a usable group left no record: it is found empty again.
    """
    if not records:
        return RunPosition.at(0, Cursor(), windows, problem_count)
    last = records[-1]
    here = RunPosition.at(last.sampled_version, last.window_began, windows, problem_count)
    if here.window is not None and not last.cursor.is_over(here.window):
        return replace(here, cursor=last.cursor)
    exported = last.checkpoint
    version = here.version + 1 if exported is None else exported.policy_version
    return RunPosition.at(version, last.cursor, windows, problem_count)


def check_same_run(run_id: str, recorded: RunFacts, declared: RunFacts) -> None:
    """Refuse to go on with a run that is declared otherwise than it was begun.

    Raises:
        IdentityConflictError: names every fact that differs. A branch, a new run_id that begins
            from a state of this one, is not held to them.
    """
    differing = [
        f"{name}: recorded {_shown(before)}, declared {_shown(now)}"
        for (name, before), (_, now) in zip(recorded, declared, strict=True)
        if before != now
    ]
    if differing:
        remedy = "Declare it as recorded, or begin another run_id from init_from_checkpoint"
        reason = f"{'; '.join(differing)}. {remedy}"
        raise IdentityConflictError(run_id, reason)


def _shown(value: object) -> str:
    text = value.model_dump_json(exclude_none=True) if isinstance(value, Record) else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def replayed_checkpoint(
    recorded: ExportedCheckpoint, content_sha256: str, *, next_version: int
) -> ExportedCheckpoint:
    """Name what a replayed step exported: the same version if it has the same bits.

    Other bits (kernels of a GPU) get the next free version: one version never has two contents.
    """
    if content_sha256 == recorded.content_sha256:
        return recorded
    return ExportedCheckpoint(
        policy_version=next_version,
        content_sha256=content_sha256,
        resumed_from=recorded.policy_version,
    )
