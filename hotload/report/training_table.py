"""The steps of a training run as Markdown, for a person who looks at it in Prefect's UI."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from hotload.quantities import number
from hotload.training.step_record import Promotion, StepRecord

NOT_THERE = "–"
# Reward, k3 and gradient first: a loss of 0 is right where the policy is its anchor.
COLUMNS = {
    "rollout/raw_reward": ("reward", ""),
    "train/inference_k3": ("k3", "nats"),
    "train/grad_norm": ("gradient norm", ""),
    "train/entropy": ("entropy", "nats"),
    "async/version_offset_max": ("lag", "steps"),
    "perf/train_wait_time": ("trainer waited", "s"),
    "perf/sampler_wait_time": ("sampler waited", "s"),
    "train/loss": ("loss", ""),
}
"""Figures by their name in a step record: what they are called, and their unit."""
HEADINGS = tuple(f"{name}, {unit}" if unit else name for name, unit in COLUMNS.values())


def render_training(records: Sequence[StepRecord]) -> str:
    """Render the steps, newest first: one row each."""
    headings = ("step", "sampled from", "groups", *HEADINGS, "exported as")
    rows = [headings, ("---",) * len(headings), *map(_cells, reversed(records))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_rows(
    records: Sequence[StepRecord],
    promotions: Sequence[Promotion],
    kept: Mapping[int, str],
    removed: Collection[int],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """List the steps of a run for a terminal: headings, and a row each, with what it left and the
    names that were given.

    Args:
        kept: why the state of a step stays, as `hotload.training.kept_states` decides.
        removed: steps whose state is removed.
    """
    names: dict[int, list[str]] = {}
    for one in promotions:
        names.setdefault(one.policy_version, []).append(one.name)
    rows = []
    for record in records:
        version = state = why = NOT_THERE
        if (exported := record.checkpoint) is not None:
            given = ", ".join(names.get(exported.policy_version, ()))
            version = f"{exported.policy_version}" + (f" ({given})" if given else "")
        if record.state is not None:
            is_gone = record.step in removed
            state = "removed" if is_gone else record.state.path
            why = NOT_THERE if is_gone else kept.get(record.step, "goes")
        figures = (_figure(record, key) for key in COLUMNS)
        rows.append((str(record.step), *figures, version, state, why))
    return ("step", *HEADINGS, "version", "state", "why it stays"), rows


def step_line(record: StepRecord) -> str:
    """Say in one line what a step came to."""
    shown = (
        f"{name} {_figure(record, key)} {unit if key in record.figures else ''}".rstrip()
        for key, (name, unit) in COLUMNS.items()
    )
    return f"step {record.step}: {', '.join(shown)}"


def _cells(record: StepRecord) -> tuple[str, ...]:
    groups = sum(len(part.problem_ids) for part in record.groups)
    exported = "" if record.checkpoint is None else str(record.checkpoint.policy_version)
    figures = (_figure(record, key) for key in COLUMNS)
    return (str(record.step), str(record.sampled_version), str(groups), *figures, exported)


def _figure(record: StepRecord, key: str) -> str:
    return number(record.figures[key]) if key in record.figures else NOT_THERE
