"""A checkpoint directory in the layout a service wants: viewed as it is published, or rewritten.

`hotload.checkpoint.relayout_plan` decides from headers alone; a view reads tensors where they lie.
A directory with a spec says of itself that it is in the served layout, and a LoRA has no other:
both are published file by file as they are.

What is rewritten is read back and compared byte for byte before it gets its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import numpy as np

from hotload.checkpoint import relayout_plan
from hotload.checkpoint.anatomy import find_parts
from hotload.checkpoint.checkpoint import Checkpoint, LeftOut
from hotload.checkpoint.index_and_spec import SpecDtypeStyle
from hotload.checkpoint.model_config import take_config
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.quantization import describe_quantization
from hotload.checkpoint.relayout_plan import Plan, PlannedShard
from hotload.checkpoint.rules import check_full, refuse_errors
from hotload.checkpoint.safetensors import (
    SHARD_SUFFIX,
    ShardHeader,
    TensorInfo,
    first_names,
    name_obstacle,
    read_json_object,
)
from hotload.checkpoint.side_files import directory_left_out
from hotload.checkpoint.tied_head import TiedHead, check_forms, find_tied_heads, head_finding
from hotload.delta.byte_io import read_bytes
from hotload.delta.frame import PIECE_BYTES
from hotload.delta.libzstd import ByteArray
from hotload.delta.ordered_threads import ByteProgress
from hotload.directory.files import (
    AnyFile,
    ComposedFile,
    Stretch,
    copy_file,
    new_directory,
    refuse_file,
)
from hotload.directory.places import Directory, RemotePlace
from hotload.directory.remote import RemoteFile
from hotload.directory.shards import (
    Listing,
    OpenShard,
    code_in,
    list_files,
    open_shard,
    read_checkpoint,
    read_document,
    read_files,
)
from hotload.errors import Finding, InvalidCheckpointError
from hotload.quantities import plural
from hotload.records import FileDigest


class CheckpointView:
    """What is published of a checkpoint: headers, documents, and where every file's bytes lie.

    No dataclass, because Prefect would walk through every header of one that is a task's parameter.

    Args:
        plan: None where the directory is in the served layout already.
        files: those to publish by a plan, by name.
        sources: the shards that a plan reads.
    """

    def __init__(
        self,
        directory: Directory,
        checkpoint: Checkpoint,
        plan: Plan | None = None,
        files: Mapping[str, AnyFile] = MappingProxyType({}),
        sources: tuple[str, ...] = (),
    ) -> None:
        self.directory, self.checkpoint, self.plan = directory, checkpoint, plan
        self.files, self.sources = files, sources

    def file(self, name: str) -> AnyFile:
        """Find the file that is published under a name.

        Raises:
            InvalidCheckpointError: the trainer has changed which files there are.
        """
        if self.plan is None:
            return self.directory / name
        if name not in self.files:
            refuse_file("changed_while_read", name, "no such file any more", "what was validated")
        return self.files[name]

    def describe(self) -> str:
        """Say in one sentence what a cycle publishes of it."""
        shards = plural(len(self.checkpoint.shards), "shard")
        if self.plan is None:
            return f"a cycle publishes it file by file: {shards}"
        said = (
            f"a cycle publishes {plural(len(self.sources), 'file')} as {shards}, one layer a file"
        )
        dropped = [tied.head[1].name for tied in self.plan.heads if tied.is_told]
        return f"{said}; {first_names(dropped)} tied, left out" if dropped else said

    def describe_quantization(self) -> str:
        """Say how its weights are quantized; empty where none is.

        Raises:
            InvalidCheckpointError: config.json cannot be read.
        """
        config = self.checkpoint.documents.get(CONFIG_FILE, b"{}")
        tensors = tuple(self.checkpoint.tensors)
        return describe_quantization(tensors, read_json_object(config, file=CONFIG_FILE))

    def check_heads(self) -> tuple[Finding, ...]:
        """Compare the heads that config.json ties with the embeddings; reads the bytes of both.

        Raises:
            InvalidCheckpointError: a shard cannot be read any more.
        """
        if self.plan is None:
            return check_heads(self.directory, self.checkpoint)
        return _compare_heads(self.directory, self.plan.heads)


def view_checkpoint(
    place: Path | RemotePlace, *, spec_dtype_style: SpecDtypeStyle = "torch"
) -> CheckpointView:
    """Read a checkpoint directory as it is published, wherever it lies; side files are digested.

    The same directory gives the same view, byte for byte.

    Args:
        spec_dtype_style: of the spec that is made where there is none.

    Raises:
        InvalidCheckpointError: it cannot be read, as `read_checkpoint`; or it is no full checkpoint
            and cannot be brought into the served layout, as `plan_relayout`.
        StoreUnavailableError: it lies in a store that is away.
    """
    directory = place if isinstance(place, Path) else place.look()
    listing = list_files(directory)
    names = {path.name for path in listing.paths}
    if names & {SPEC_FILE, ADAPTER_CONFIG_FILE}:
        return CheckpointView(directory, read_files(listing))
    if listing.findings:
        raise InvalidCheckpointError(listing.findings)
    return lay_out(directory, listing, spec_dtype_style=spec_dtype_style)


@dataclass(frozen=True, slots=True)
class Relayout:
    """What was done: files written, what stayed behind and why, warnings of the layout check."""

    shard_count: int
    tensor_count: int
    size_bytes: int
    side_files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    dropped_heads: tuple[str, ...]
    other_tensors: tuple[str, ...]
    dropped_metadata: tuple[str, ...]
    warnings: tuple[Finding, ...]


def file_in(place: Path | CheckpointView, name: str) -> AnyFile:
    """Find a file of a directory, or the one that is published under its name.

    Raises:
        InvalidCheckpointError: as `CheckpointView.file`.
    """
    return place / name if isinstance(place, Path) else place.file(name)


def lay_out(
    directory: Directory,
    listing: Listing,
    *,
    config: bytes | None = None,
    spec_dtype_style: SpecDtypeStyle = "torch",
) -> CheckpointView:
    """View the listed files of a directory in the served layout, with `config` for its config.json.

    Raises:
        InvalidCheckpointError: as `select_files` and `plan_relayout`.
    """
    paths = {path.name: path for path in listing.paths}
    if not any(map(_is_shard, paths)):
        others = (one.file for one in listing.left_out if not _is_shard(one.file))
        relayout_plan.select_files((*paths, *others), None)  # says what there is instead
    index = read_document(paths[INDEX_FILE]) if INDEX_FILE in paths else None
    selection = relayout_plan.select_files(paths, index, code_in(directory, paths))
    made = {} if config is None else {CONFIG_FILE: config}
    if config is None and CONFIG_FILE in paths:
        config = read_document(paths[CONFIG_FILE])
    shards = read_files(Listing(tuple(paths[one] for one in selection.shards), (), ())).shards
    plan = relayout_plan.plan_relayout(shards, config, index, spec_dtype_style=spec_dtype_style)
    made |= {INDEX_FILE: plan.index, SPEC_FILE: plan.spec}
    left_out = (*listing.left_out, *selection.left_out)
    beside = read_files(Listing(tuple(paths[one] for one in selection.side_files), (), ()))
    side_files = {one.file: one for one in beside.side_files} | {
        file: FileDigest(file=file, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in made.items()
    }
    checkpoint = Checkpoint(
        tuple(planned.header for planned in plan.shards),
        {**beside.documents, **made},
        tuple(side_files[file] for file in sorted(side_files)),
        left_out,
    )
    files: dict[str, AnyFile] = {file: paths[file] for file in selection.side_files}
    files |= {file: ComposedFile(file, data) for file, data in made.items()}
    starts = {shard.file: shard.data_start for shard in shards}
    files |= {one.header.file: _compose(one, paths, starts) for one in plan.shards}
    return CheckpointView(directory, checkpoint, plan, files, selection.shards)


def check_heads(directory: Directory, checkpoint: Checkpoint) -> tuple[Finding, ...]:
    """Compare the heads that config.json ties with the embeddings; reads the bytes of both.

    Raises:
        InvalidCheckpointError: a shard cannot be read any more.
    """
    config = read_json_object(checkpoint.documents.get(CONFIG_FILE, b"{}"), file=CONFIG_FILE)
    tensors = tuple(checkpoint.tensors)
    parts = find_parts((one for _, one in tensors), config)
    heads = [one for one in find_tied_heads(tensors, parts, config) if one.is_told]
    return (*check_forms(heads), *_compare_heads(directory, heads))


def relayout_directory(
    source: Path,
    out: Path,
    *,
    config_from: Path | None = None,
    progress: ByteProgress | None = None,
) -> Relayout:
    """Write the checkpoint in `source` again at `out`, one layer a file, with index and spec.

    Links to files are followed, so a model in a download cache will do. Sub-directories, the
    trainer's own files and weights in other formats stay behind. With `config_from` the output has
    the config.json of that directory, the base model's. `progress` hears of bytes done and bytes in
    all; every byte counts twice, written and read back.

    Raises:
        InvalidCheckpointError: the source is no full checkpoint, or breaks a rule that moving
        tensors cannot mend; see `relayout_plan.plan_relayout`.
        OSError: `out` is there and not empty, or lies in the source.
    """
    listing = _list(source)
    config: bytes | None = None
    taken: tuple[Finding, ...] = ()
    if config_from is not None and any(path.name == CONFIG_FILE for path in listing.paths):
        base = read_document(config_from / CONFIG_FILE)
        config, taken = take_config(read_document(source / CONFIG_FILE), base)
    view = lay_out(source, listing, config=config)
    warnings = (*taken, *refuse_errors(view.check_heads()))
    warnings += _write(view, source, out, progress)
    plan, checkpoint = view.plan, view.checkpoint
    assert plan is not None
    made = {INDEX_FILE, SPEC_FILE}
    return Relayout(
        shard_count=len(plan.shards),
        tensor_count=sum(len(shard.tensors) for shard in checkpoint.shards),
        size_bytes=sum(shard.size_bytes for shard in checkpoint.shards),
        side_files=tuple(one.file for one in checkpoint.side_files if one.file not in made),
        left_out=checkpoint.left_out,
        dropped_heads=tuple(tied.head[1].name for tied in plan.heads if tied.is_told),
        other_tensors=plan.others,
        dropped_metadata=plan.dropped_metadata,
        warnings=warnings,
    )


def _is_equal(one: OpenShard, tensor: TensorInfo, other: OpenShard, twin: TensorInfo) -> bool:
    pairs = zip(_pieces(one, tensor), _pieces(other, twin), strict=True)
    return all(np.array_equal(first, second) for first, second in pairs)


def _compare_heads(directory: Directory, heads: Iterable[TiedHead]) -> tuple[Finding, ...]:
    """Find the heads that are no copies of the embeddings, and those that are unannounced."""
    files = {file for tied in heads for file, _ in (tied.head, *tied.embeddings)}
    findings = []
    with ExitStack() as stack:
        shards = {file: stack.enter_context(open_shard(directory / file)) for file in files}
        for tied in heads:
            file, head = tied.head
            is_copy = any(
                _is_equal(shards[file], head, shards[other], embeddings)
                for other, embeddings in tied.embeddings
            )
            if tied.embeddings and (finding := head_finding(tied, is_copy=is_copy)):
                findings.append(finding)
    return tuple(findings)


def _compose(
    planned: PlannedShard, paths: Mapping[str, Path | RemoteFile], starts: Mapping[str, int]
) -> AnyFile:
    """Compose a planned shard of the trainer's files; one that is the same byte for byte stays."""
    stretches: list[Stretch] = []
    for file, tensor in planned.sources:
        path, offset = paths[file], starts[file] + tensor.start
        last = stretches[-1] if stretches else None
        if last and (last.path, last.offset + last.size_bytes) == (path, offset):
            stretches[-1] = Stretch(path, last.offset, last.size_bytes + tensor.size_bytes)
        else:
            stretches.append(Stretch(path, offset, tensor.size_bytes))
    head_bytes = len(planned.head)
    if [one.offset for one in stretches] == [head_bytes]:
        with open_shard(stretches[0].path) as source:
            is_whole = source.size_bytes == planned.header.size_bytes
            if is_whole and read_bytes(source, 0, head_bytes) == planned.head:
                return stretches[0].path
    return ComposedFile(planned.header.file, planned.head, tuple(stretches))


def _pieces(shard: OpenShard, tensor: TensorInfo) -> Iterator[ByteArray]:
    """The bytes of a tensor; each piece is overwritten when the next is asked for."""
    buffer = np.empty(min(PIECE_BYTES, tensor.size_bytes), np.uint8)
    start, end = shard.header.data_start + tensor.start, shard.header.data_start + tensor.end
    for at in range(start, end, PIECE_BYTES):
        piece = buffer[: end - at]
        shard.read_into(at, piece.data)
        yield piece


def _is_shard(file: str) -> bool:
    return file.endswith(SHARD_SUFFIX)


def _list(source: Path) -> Listing:
    """List what counts, links to files as well, and what does not with the reason."""
    paths: list[Path | RemoteFile] = []
    left_out: list[LeftOut] = []
    if not source.is_dir():
        refuse_file("missing_directory", str(source), "no such directory", "a checkpoint directory")
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            left_out.append(LeftOut(path.name, "its name begins with a dot"))
        elif path.is_dir():
            left_out.append(directory_left_out(path.name))
        elif reason := name_obstacle(path.name):
            refuse_file("file_name", reason, "the name", "a plain file name")
        elif not path.is_file():
            refuse_file("not_a_file", path.name, "a device, or a link to nothing", "files only")
        else:
            paths.append(path)
    return Listing(tuple(paths), tuple(left_out), ())


def _write(
    view: CheckpointView, source: Path, out: Path, progress: ByteProgress | None
) -> tuple[Finding, ...]:
    """Write the view, check what was written, give it its name; the warnings of the check."""
    shards = view.checkpoint.shards
    done, total = 0, 2 * sum(shard.size_bytes - shard.data_start for shard in shards)

    def step(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress:
            progress(done, total)

    with new_directory(out, source) as directory:
        for side_file in view.checkpoint.side_files:
            copy_file(view.file(side_file.file), directory / side_file.file)
        for shard in shards:
            copy_file(view.file(shard.file), directory / shard.file)
            step(shard.size_bytes - shard.data_start)
        warnings = refuse_errors(check_full(read_checkpoint(directory)))
        for shard in shards:
            _compare(view, shard, directory)
            step(shard.size_bytes - shard.data_start)
    return warnings


def _compare(view: CheckpointView, header: ShardHeader, directory: Path) -> None:
    with (
        open_shard(view.file(header.file)) as original,
        open_shard(directory / header.file) as written,
    ):
        if written.header != header:
            _refuse_written(header.file, None, "another header than was written")
        for tensor in header.tensors:
            if not _is_equal(original, tensor, written, tensor):
                _refuse_written(header.file, tensor.name, "other bytes than were written")


def _refuse_written(file: str, tensor: str | None, found: str) -> NoReturn:
    expected = "what was written; look at the disk"
    raise InvalidCheckpointError(
        (Finding("read_back", file, tensor, found, expected, who="operator"),)
    )
