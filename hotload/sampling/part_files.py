"""Hand back: scored groups as Parquet parts in the store, and the manifest that names them (design,
rule 2).

    _hotload/rollouts/<identity>/
        part-00000-00.parquet …   a chunk of problems in one file or several, each whole or absent
        manifest.json             after what it names; complete when the cycle's rollouts are
"""

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hotload.clients.store.store import Store
from hotload.clock import utc_now
from hotload.dataset.parquet import notes_of, parse_rollouts, render_rollouts
from hotload.dataset.rollout_plan import (
    PartNotes,
    PartPlan,
    RolloutManifest,
    RolloutPart,
    RolloutPlan,
    summarize,
)
from hotload.dataset.sample_extracts import SampleExtract, choose_extracts, merge_extracts
from hotload.dataset.table import rollouts_frame
from hotload.errors import StoreError
from hotload.rollout.counts import GroupCounts, count_groups
from hotload.rollout.group_rules import SettledGroup

PART_LIMIT_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class PartFile:
    """A part file in the store, the problems it settles, and samples of it to show."""

    part: RolloutPart
    problem_ids: frozenset[str]
    dropped_problem_ids: frozenset[str]
    extracts: tuple[SampleExtract, ...]


async def write_part(
    store: Store,
    plan: RolloutPlan,
    part: PartPlan,
    piece: int,
    settled: Sequence[SettledGroup],
) -> PartFile:
    """Write one file of a part, after its rows kept their schema, with its counts.

    No file is ever overwritten: another run of this cycle may have written it, or may rely on it.

    Args:
        piece: the first number to try; where there is a file already, the next free one is taken.
        settled: the groups that have ended, dropped ones among them.

    Raises:
        StoreError: the store refuses.
    """
    written, data = await asyncio.to_thread(_render, plan, part, piece, settled)
    while not await store.create_bytes(data, path := plan.path(written.part.file)):
        is_same = await store.size(path) == len(data)
        if is_same and await store.read_bytes(path, limit_bytes=len(data)) == data:
            break  # ours: the answer to an earlier attempt was lost
        piece += 1
        renamed = written.part.model_copy(update={"file": part.file(piece)})
        written = replace(written, part=renamed)
    return written


def _render(
    plan: RolloutPlan, part: PartPlan, piece: int, settled: Sequence[SettledGroup]
) -> tuple[PartFile, bytes]:
    kept = [one.group for one in settled if not one.is_dropped]
    rules = GroupCounts.total(one.counts for one in settled)
    notes = PartNotes(
        dropped_problem_ids=tuple(one.group.problem.id for one in settled if one.is_dropped),
        extracts=choose_extracts(kept),
        **dict(count_groups(kept, rules, run_id=plan.run_id)),
    )
    frame = rollouts_frame(kept, run_id=plan.run_id, policy_version=plan.policy_version)
    data = render_rollouts(frame, digest=part.digest, notes=notes.model_dump_json())
    problem_ids = frozenset(group.problem.id for group in kept)
    return _part_file(part.file(piece), part.digest, data, notes, problem_ids), data


def _part_file(
    file: str, digest: str, data: bytes, notes: PartNotes, problem_ids: frozenset[str]
) -> PartFile:
    sha256 = hashlib.sha256(data).hexdigest()
    return PartFile(
        notes.part(file=file, size_bytes=len(data), sha256=sha256, digest=digest),
        problem_ids,
        frozenset(notes.dropped_problem_ids),
        notes.extracts,
    )


async def read_parts(
    store: Store,
    plan: RolloutPlan,
    part: PartPlan,
    names: Iterable[str],
    named: Mapping[str, RolloutPart],
) -> list[PartFile]:
    """Read what an earlier run of this cycle wrote of this part, in order; files that asked for
    something else, or are damaged, count as not there.

    Args:
        names: of all files of the rollout.
        named: the manifest's entries, by file: the counts of a file that an earlier version of
            hotload wrote are in there alone.
    """
    found = []
    for piece in part.pieces(names):
        path = plan.path(part.file(piece))
        data = await store.read_bytes(path, limit_bytes=PART_LIMIT_BYTES)
        read = await asyncio.to_thread(_parse, part, piece, data, path, named)
        found += [read] if read else []
    return found


def _parse(
    part: PartPlan, piece: int, data: bytes, path: str, named: Mapping[str, RolloutPart]
) -> PartFile | None:
    try:
        frame, digest = parse_rollouts(data, path=path)
        notes = PartNotes.parse_stored(notes_of(data).encode(), path)
    except StoreError:
        return None  # not a part of ours: it is sampled again, into a file beside it
    if digest != part.digest:
        return None
    problem_ids = frozenset(frame["problem_id"].unique())
    found = _part_file(part.file(piece), digest, data, notes, problem_ids)
    if notes.samples is not None:
        return found
    known = named.get(found.part.file)
    if known is None or known.sha256 != found.part.sha256:
        return None  # no reader has it
    return replace(found, part=known)


def sum_up(
    store: Store,
    plan: RolloutPlan,
    parts: Iterable[RolloutPart],
    seconds: float,
    *,
    is_complete: bool,
    found: Iterable[RolloutPart] = (),
    extracts: Iterable[SampleExtract] = (),
    window_trace: Iterable[tuple[float, int, int]] = (),
) -> RolloutManifest:
    """Make the manifest of part files that lie in the store.

    As long as more may come, it is written and read again and again: it stays small, without the
    statistics of samples, which the files themselves carry for a run that goes on.

    Args:
        seconds: wall time so far, in which all but the `found` ones were made.
        extracts: samples of any of them to show.
    """
    parts = tuple(sorted(parts, key=lambda part: part.file))
    if not is_complete:
        parts = tuple(part.model_copy(update={"samples": None}) for part in parts)
        extracts, window_trace = (), ()
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
            declaration_sha256=plan.digest,
            seconds=seconds,
            found=found,
            window_trace=window_trace,
        ),
        extracts=merge_extracts(extracts),
        created_at=utc_now(),
    )
