"""How a run goes on after it was killed.

Theory of operation. What a step does before its record counts only once the record is there, and
what comes after it, acknowledging and publishing, changes nothing where it is done. So where a run
stands follows from its records, and from whether the version that it samples lies here still:
RESUMPTION says what is then done with the trainer, and `docs/resume.md` shows it. Nothing is
remembered, so a run that is killed while it resumes plans again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hotload.errors import IdentityConflictError, StoreError
from hotload.records import Record
from hotload.training.settings import StateRef
from hotload.training.step_record import WAY_ON, RunFacts, StepRecord
from hotload.training.windows import Cursor, TrainingWindow, Windows


class Export(StrEnum):
    """What there is of the version that the newest record names; version 0 before there is one."""

    NEW = "nothing is recorded"
    MADE_AGAIN = "its step comes after the newest state"
    GONE = "it does not lie here as recorded"
    HERE = "it lies here as recorded"


class Leg(StrEnum):
    """How far the trainer is brought at once: the newest state up to there is loaded, if it has not
    come so far, and the recorded steps after that state are made again from their groups."""

    EXPORT = "to the step that exported it, and it is exported again"
    END = "to the last step"


# Steps that are made again may come to other bits than were published, so they export again. Where
# the newest state is of the exporting step or a later one, nothing of the version changes.
RESUMPTION: Mapping[Export, tuple[Leg, ...]] = {
    Export.NEW: (Leg.EXPORT,),
    Export.MADE_AGAIN: (Leg.EXPORT, Leg.END),
    Export.GONE: (Leg.EXPORT, Leg.END),
    Export.HERE: (Leg.END,),
}


@dataclass(frozen=True, slots=True)
class ResumeLeg:
    """What brings the trainer to a recorded step.

    Args:
        begins: whether it takes what the run began with; a trainer that was just made has the start
            weights.
        state: what to load; None where it goes on from where it is.
        replayed: recorded steps to make again from their stored groups, in order.
        exports: whether the version is then exported again.
    """

    begins: bool
    state: StateRef | None
    replayed: tuple[StepRecord, ...]
    exports: bool


def plan_resume(
    records: Sequence[StepRecord], *, is_here: bool, lost: Collection[int] = ()
) -> list[ResumeLeg]:
    """Decide how a trainer that was just made comes to where the newest record left it.

    Args:
        records: every step of the run, in order.
        is_here: whether the version that was exported last lies here as it was recorded.
        lost: steps whose state is removed or of no use.

    Raises:
        StoreError: a record is missing, or follows another than the one before it.
    """
    _check_lineage(records)
    exported = exported_step(records)
    legs: list[ResumeLeg] = []
    made: int | None = None
    for leg in RESUMPTION[_find_export(records, is_here, lost)]:
        goal = exported if leg is Leg.EXPORT else len(records)
        saved = newest_state(records[:goal], lost)
        loads = saved > (made or 0)
        legs.append(
            ResumeLeg(
                begins=made is None and not loads,
                state=records[saved - 1].state if loads else None,
                replayed=tuple(one for one in records[max(saved, made or 0) : goal] if one.groups),
                exports=leg is Leg.EXPORT,
            )
        )
        made = goal
    return legs


def exported_step(records: Sequence[StepRecord]) -> int:
    """Find the newest step that exported a version; 0 where none did."""
    return max((one.step for one in records if one.checkpoint is not None), default=0)


def is_made_again(records: Sequence[StepRecord], lost: Collection[int] = ()) -> bool:
    """Tell whether the step that exported last comes after the newest state."""
    return exported_step(records) > newest_state(records, lost)


def newest_state(records: Sequence[StepRecord], lost: Collection[int] = ()) -> int:
    """Find the newest step whose state is there; 0 where none is.

    Args:
        lost: steps whose state is removed or of no use.
    """
    saved = (one.step for one in records if one.state is not None and one.step not in lost)
    return max(saved, default=0)


def _find_export(records: Sequence[StepRecord], is_here: bool, lost: Collection[int]) -> Export:
    if not records:
        return Export.NEW
    if is_made_again(records, lost):
        return Export.MADE_AGAIN
    return Export.HERE if is_here else Export.GONE


def _check_lineage(records: Sequence[StepRecord]) -> None:
    parent: StepRecord | None = None
    for step, record in enumerate(records, start=1):
        where = f"record of step {record.step} of {record.run_id}"
        if record.step != step or (parent and record.run_id != parent.run_id):
            found = f"expected that of step {step}: one is missing or astray"
            raise StoreError(where, f"{found}; {WAY_ON}")
        if parent is not None and record.parent_sha256 != parent.sha256:
            found = f"{str(record.parent_sha256)[:12]}…, expected {parent.sha256[:12]}…"
            found = f"follows another record of step {parent.step} ({found})"
            raise StoreError(where, f"{found}; {WAY_ON}")
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

    A window that has begun keeps its size, whatever is declared since. One without a usable group
    left no record: it is found empty again.
    """
    if not records:
        return RunPosition.at(0, Cursor(), windows, problem_count)
    last = records[-1]
    version, exported = last.sampled_version, last.checkpoint
    if exported is not None:  # none does within a window
        return RunPosition.at(exported.policy_version, last.cursor, windows, problem_count)
    window = windows.next_window(last.window_began, problem_count, size=last.window_size)
    if window is not None and not last.cursor.is_over(window):
        return RunPosition(version, window, last.window_began, last.cursor)
    return RunPosition.at(version + 1, last.cursor, windows, problem_count)


def check_same_run(run_id: str, recorded: RunFacts, declared: RunFacts) -> None:
    """Refuse to go on with a run that is declared otherwise than it was begun.

    Raises:
        IdentityConflictError: names every fact that differs. A branch, a new run_id that begins
            from a state of this one, is not held to them.
    """
    is_told = recorded.base_sha256 is not None
    differing = [
        f"{name}: recorded {_shown(before)}, declared {_shown(now)}"
        for (name, before), (_, now) in zip(recorded, declared, strict=True)
        if before != now and not (is_told and name == "base_model")
    ]
    if differing:
        remedy = "Declare it as recorded, or begin another run_id from init_from_checkpoint"
        reason = f"{'; '.join(differing)}. {remedy}"
        raise IdentityConflictError(run_id, reason)


def _shown(value: object) -> str:
    text = value.model_dump_json(exclude_none=True) if isinstance(value, Record) else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
