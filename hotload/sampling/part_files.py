"""Hand back: scored groups as Parquet parts in the store, and the manifest that names them (design,
rule 2).

    _hotload/rollouts/<identity>/
        part-00000-00.parquet …   a chunk of problems in one file or several, each whole or absent
        manifest.json             after what it names; complete when the cycle's rollouts are
"""

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from hotload.clients.handoff.directory import read_manifest
from hotload.clients.store import Store
from hotload.dataset.parquet import notes_of, parse_rollouts, render_rollouts
from hotload.dataset.rollout_plan import (
    PartNotes,
    PartPlan,
    RolloutManifest,
    RolloutPart,
    RolloutPlan,
    summarize,
)
from hotload.dataset.table import part_facts, rollouts_frame
from hotload.errors import StoreError, StoreUnavailableError
from hotload.rollout.trajectory import ScoredGroup

PART_LIMIT_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class FoundPart:
    """A part file that an earlier run of this cycle left, and the problems it settles."""

    part: RolloutPart
    problem_ids: frozenset[str]
    dropped_problem_ids: frozenset[str]


async def write_part(
    store: Store,
    plan: RolloutPlan,
    part: PartPlan,
    piece: int,
    groups: Sequence[ScoredGroup],
    notes: PartNotes,
) -> RolloutPart:
    """Write one file of a part, after its rows kept their schema.

    No file is ever overwritten: another run of this cycle may have written it, or may rely on it.

    Args:
        piece: the first number to try; where there is a file already, the next free one is taken.

    Raises:
        StoreError: the store refuses.
    """
    facts, data = await asyncio.to_thread(_render, plan, part, piece, groups, notes)
    while not await store.create_bytes(data, path := plan.path(facts.file)):
        is_same = await store.size(path) == len(data)
        if is_same and await store.read_bytes(path, limit_bytes=len(data)) == data:
            break  # ours: the answer to an earlier attempt was lost
        piece += 1
        facts = facts.model_copy(update={"file": part.file(piece)})
    return facts


def _render(
    plan: RolloutPlan, part: PartPlan, piece: int, groups: Sequence[ScoredGroup], notes: PartNotes
) -> tuple[RolloutPart, bytes]:
    frame = rollouts_frame(groups, run_id=plan.run_id, policy_version=plan.policy_version)
    data = render_rollouts(frame, digest=part.digest, notes=notes.model_dump_json())
    return _facts(frame, part, piece, data, notes), data


def _facts(
    frame: pl.DataFrame, part: PartPlan, piece: int, data: bytes, notes: PartNotes
) -> RolloutPart:
    facts = part_facts(
        frame,
        file=part.file(piece),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        digest=part.digest,
    )
    return facts.model_copy(update={"groups": notes.groups})


async def read_parts(
    store: Store, plan: RolloutPlan, part: PartPlan, names: Iterable[str]
) -> list[FoundPart]:
    """What an earlier run of this cycle wrote of this part, in order; files that asked for
    something else, or are damaged, count as not there.

    Args:
        names: of all files of the rollout.
    """
    found = []
    for piece in part.pieces(names):
        path = plan.path(part.file(piece))
        data = await store.read_bytes(path, limit_bytes=PART_LIMIT_BYTES)
        read = await asyncio.to_thread(_parse, part, piece, data, path)
        found += [read] if read else []
    return found


def _parse(part: PartPlan, piece: int, data: bytes, path: str) -> FoundPart | None:
    try:
        frame, digest = parse_rollouts(data, path=path)
        notes = PartNotes.parse_stored(notes_of(data).encode(), path)
    except StoreError:
        return None  # not a part of ours: it is sampled again, into a file beside it
    if digest != part.digest:
        return None
    return FoundPart(
        _facts(frame, part, piece, data, notes),
        frozenset(frame["problem_id"].unique()),
        frozenset(notes.dropped_problem_ids),
    )


async def named_files(store: Store, plan: RolloutPlan) -> frozenset[str]:
    """The part files that the rollout's manifest names, if there is one by now.

    Raises:
        StoreError: the store refuses.
    """
    manifest = await usable_manifest(store, plan.directory)
    return frozenset(part.file for part in manifest.parts) if manifest else frozenset()


async def usable_manifest(store: Store, directory: str) -> RolloutManifest | None:
    """The manifest, unless there is none that can be read: one of another schema is written
    over."""
    try:
        return await read_manifest(store, directory)
    except StoreUnavailableError:
        raise
    except StoreError:
        return None


def sum_up(
    store: Store,
    plan: RolloutPlan,
    parts: Iterable[RolloutPart],
    seconds: float,
    *,
    is_complete: bool,
    found: Iterable[RolloutPart] = (),
    window_trace: Iterable[tuple[float, int, int]] = (),
) -> RolloutManifest:
    """The manifest of part files that lie in the store.

    Args:
        seconds: wall time so far, in which all but the `found` ones were made.
    """
    parts = tuple(sorted(parts, key=lambda part: part.file))
    return RolloutManifest(
        identity=plan.identity,
        policy_version=plan.policy_version,
        digest=plan.digest,
        is_complete=is_complete,
        planned_group_count=plan.problem_count,
        parts=parts,
        summary=summarize(
            plan.identity,
            parts,
            parts_uri=f"{store.url}/{plan.directory}",
            seconds=seconds,
            found=found,
            window_trace=window_trace,
        ),
        created_at=datetime.now(UTC),
    )
