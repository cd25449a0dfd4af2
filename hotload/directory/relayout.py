"""A checkpoint directory written again in the layout a service wants.

`hotload.checkpoint.relayout_plan` decides; this carries it out.

The source is only read. Everything is written into a directory beside the destination, read back,
compared with the source byte for byte, and only then given its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from hotload.checkpoint import relayout_plan
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.relayout_plan import LeftOut, Plan, PlannedShard, Selection
from hotload.checkpoint.rules import check_full, refuse_errors
from hotload.checkpoint.safetensors import TensorInfo, name_obstacle
from hotload.delta.frame import PIECE_BYTES
from hotload.delta.libzstd import ByteArray
from hotload.delta.ordered_threads import ByteProgress
from hotload.directory.files import copy_file, new_directory, replacing_file, write_atomic
from hotload.directory.shards import (
    DOCUMENT_LIMIT_BYTES,
    TRAINER_FILE,
    OpenShard,
    open_shard,
    read_checkpoint,
)
from hotload.errors import Finding, InvalidCheckpointError

Step = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Relayout:
    """What was done: files written, what stayed behind and why, warnings of the layout check."""

    shard_count: int
    tensor_count: int
    size_bytes: int
    side_files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    dropped_heads: tuple[str, ...]
    dropped_metadata: tuple[str, ...]
    warnings: tuple[Finding, ...]


def relayout_directory(
    source: Path, out: Path, *, progress: ByteProgress | None = None
) -> Relayout:
    """Write the checkpoint in `source` again at `out`, one layer a file, with index and spec.

    Links to files are followed, so a model in a download cache will do. Sub-directories, the
    trainer's own files and weights in other formats stay behind. `progress` hears of bytes done and
    bytes in all; every byte counts twice, written and read back.

    Raises:
        InvalidCheckpointError: the source is no full checkpoint, or breaks a rule that moving
        tensors cannot mend; see `relayout_plan.plan_relayout`.
        OSError: `out` is there and not empty, or lies in the source.
    """
    files, hidden = _files(source)
    selection = relayout_plan.select_files(files, _document(source, INDEX_FILE, files))
    with ExitStack() as stack:
        shards = {file: stack.enter_context(open_shard(source / file)) for file in selection.shards}
        plan = relayout_plan.plan_relayout(
            [shard.header for shard in shards.values()],
            _document(source, CONFIG_FILE, files),
            _document(source, INDEX_FILE, files),
        )
        warnings = _compare_heads(plan, shards)
        warnings += _write(source, selection, plan, shards, out, progress)
    return Relayout(
        shard_count=len(plan.shards),
        tensor_count=sum(len(shard.header.tensors) for shard in plan.shards),
        size_bytes=sum(shard.header.size_bytes for shard in plan.shards),
        side_files=selection.side_files,
        left_out=(*selection.left_out, *hidden),
        dropped_heads=tuple(tied.head[1].name for tied in plan.tied_heads),
        dropped_metadata=plan.dropped_metadata,
        warnings=warnings,
    )


def _files(source: Path) -> tuple[list[str], list[LeftOut]]:
    """Names of the files that count, and what does not with the reason."""
    files: list[str] = []
    left_out: list[LeftOut] = []
    if not source.is_dir():
        _refuse("missing_directory", str(source), "no such directory", "a checkpoint directory")
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            left_out.append(LeftOut(path.name, "its name begins with a dot"))
        elif TRAINER_FILE.fullmatch(path.name):
            left_out.append(LeftOut(path.name, "the trainer's own"))
        elif path.is_dir():
            left_out.append(LeftOut(path.name, "a directory"))
        elif reason := name_obstacle(path.name):
            _refuse("file_name", reason, "the name", "a plain file name")
        elif not path.is_file():
            _refuse("not_a_file", path.name, "a device, or a link to nothing", "files only")
        else:
            files.append(path.name)
    return files, left_out


def _document(source: Path, name: str, files: list[str]) -> bytes | None:
    if name not in files:
        return None
    with (source / name).open("rb") as file:
        data = file.read(DOCUMENT_LIMIT_BYTES + 1)
    if len(data) > DOCUMENT_LIMIT_BYTES:
        _refuse("document_size", name, "more bytes", f"at most {DOCUMENT_LIMIT_BYTES}")
    return data


def _compare_heads(plan: Plan, shards: Mapping[str, OpenShard]) -> tuple[Finding, ...]:
    """The warnings about heads; those that have to be copies of the embeddings are."""
    findings = []
    for tied in (*plan.tied_heads, *plan.untold_heads):
        file, head = tied.head
        is_copy = any(
            _is_equal(shards[file], head, shards[other], embeddings)
            for other, embeddings in tied.embeddings
        )
        findings.append(
            relayout_plan.head_warning(tied, is_copy=is_copy, is_told=tied in plan.tied_heads)
        )
    return refuse_errors(finding for finding in findings if finding)


def _write(
    source: Path,
    selection: Selection,
    plan: Plan,
    shards: Mapping[str, OpenShard],
    out: Path,
    progress: ByteProgress | None,
) -> tuple[Finding, ...]:
    """Write the plan, check what was written, give it its name; the warnings of the check."""
    done, total = (
        0,
        2 * sum(shard.header.size_bytes - shard.header.data_start for shard in plan.shards),
    )

    def step(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress:
            progress(done, total)

    with new_directory(out, source) as directory:
        for planned in plan.shards:
            _write_shard(planned, shards, directory, step)
        for file in selection.side_files:
            copy_file(source / file, directory / file)
        write_atomic(directory / INDEX_FILE, plan.index)
        write_atomic(directory / SPEC_FILE, plan.spec)
        warnings = refuse_errors(check_full(read_checkpoint(directory)))
        for planned in plan.shards:
            _compare_shard(planned, shards, directory, step)
    return warnings


def _write_shard(
    planned: PlannedShard, shards: Mapping[str, OpenShard], directory: Path, step: Step
) -> None:
    with replacing_file(directory / planned.header.file) as out:
        out.write_at(0, planned.head)
        for name, tensor in zip(planned.sources, planned.header.tensors, strict=True):
            shard = shards[name]
            at = planned.header.data_start + tensor.start
            for piece in _pieces(shard, shard.header.by_name[tensor.name]):
                out.write_at(at, piece.data)
                at += len(piece)
                step(len(piece))


def _compare_shard(
    planned: PlannedShard, shards: Mapping[str, OpenShard], directory: Path, step: Step
) -> None:
    with open_shard(directory / planned.header.file) as written:
        if written.header != planned.header:
            _refuse_written(planned.header.file, None, "another header than was written")
        for name, tensor in zip(planned.sources, planned.header.tensors, strict=True):
            original = shards[name].header.by_name[tensor.name]
            if not _is_equal(shards[name], original, written, tensor):
                _refuse_written(planned.header.file, tensor.name, "other bytes than were written")
            step(tensor.size_bytes)


def _is_equal(one: OpenShard, tensor: TensorInfo, other: OpenShard, twin: TensorInfo) -> bool:
    pairs = zip(_pieces(one, tensor), _pieces(other, twin), strict=True)
    return all(np.array_equal(first, second) for first, second in pairs)


def _pieces(shard: OpenShard, tensor: TensorInfo) -> Iterator[ByteArray]:
    """The bytes of a tensor; each piece is overwritten when the next is asked for."""
    buffer = np.empty(min(PIECE_BYTES, tensor.size_bytes), np.uint8)
    start, end = shard.header.data_start + tensor.start, shard.header.data_start + tensor.end
    for at in range(start, end, PIECE_BYTES):
        piece = buffer[: end - at]
        shard.read_into(at, piece.data)
        yield piece


def _refuse(rule: str, file: str, found: str, expected: str) -> NoReturn:
    raise InvalidCheckpointError((Finding(rule, file, None, found, expected),))


def _refuse_written(file: str, tensor: str | None, found: str) -> NoReturn:
    expected = "what was written; look at the disk"
    raise InvalidCheckpointError(
        (Finding("read_back", file, tensor, found, expected, who="operator"),)
    )
