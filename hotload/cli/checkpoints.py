"""`check` and `doctor`: what a checkpoint directory breaks, and a directory that does not."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from hotload.checkpoint.anatomy import is_delta
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.index_and_spec import check_index
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.rules import check_full, check_lora
from hotload.checkpoint.safetensors import first_names, read_json_object, storage_bytes
from hotload.cli.contents import kind_of
from hotload.cli.outcome import FOUND, OK, CommandResult
from hotload.cli.progress import ProgressBar
from hotload.cli.refusals import UsageError
from hotload.delta.dialects import parse_index
from hotload.delta.envelope import check_payload
from hotload.delta.frame import content_size
from hotload.delta.inspect_delta import Form, spec_forms
from hotload.delta.rules import check_delta, delta_obstacle
from hotload.directory.inputs import open_delta
from hotload.directory.relayout import CheckpointView, relayout_directory, view_checkpoint
from hotload.directory.shards import read_checkpoint, read_document
from hotload.errors import DeltaError, Finding, InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.quantities import plural, size


def check(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Check every layout rule; one line per finding."""
    directory: Path = options.dir
    previous = None if options.previous is None else read_checkpoint(options.previous)
    kind: SnapshotKind | None = None
    said = ""
    try:
        view = _view(directory)
        said = f"; {view.describe()}"
        checkpoint = view.checkpoint
        kind = kind_of(checkpoint)
        findings = tuple(_findings(directory, view, kind, previous))
    except InvalidCheckpointError as error:
        findings = error.findings
        if any(finding.who != "trainer" for finding in findings):
            raise  # not about the checkpoint
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = len(findings) - errors
    if kind is SnapshotKind.FULL and not errors and (quantized := view.describe_quantization()):
        said += f"; quantized: {quantized}"
    noun = "directory" if kind is None else f"{kind.value} snapshot"
    line = (
        f"{plural(errors, 'error')}, {plural(warnings, 'warning')}" if findings else "nothing found"
    )
    return CommandResult(
        {
            "directory": str(directory),
            "kind": None if kind is None else kind.value,
            "error_count": errors,
            "warning_count": warnings,
            "findings": [asdict(finding) for finding in findings],
        },
        lines=tuple(map(str, findings)),
        notes=(f"{directory}: {noun}, {line}{said if kind is not SnapshotKind.DELTA else ''}",),
        exit_code=FOUND if errors else OK,
    )


def doctor(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Write the checkpoint again, in the required layout."""
    done = relayout_directory(
        options.dir, options.out, config_from=options.config_from, progress=bar
    )
    written = f"{plural(done.tensor_count, 'tensor')} in {plural(done.shard_count, 'shard')}"
    lines = [
        f"{options.out}: {written}, {size(done.size_bytes)}; every byte compared with {options.dir}"
    ]
    way = "file by file, by its spec" if (options.dir / SPEC_FILE).is_file() else "in this layout"
    said = f"a cycle publishes {options.dir} {way}, without doctor"
    tied = f"a copy of the embeddings, which {CONFIG_FILE} ties it to"
    lines += [f"left out tensor {name}: {tied}" for name in done.dropped_heads]
    lines += [f"left out {file.file}: {file.reason}" for file in done.left_out]
    if done.other_tensors:
        names = first_names(done.other_tensors)
        lines.append(f"recognised as no layer, embeddings, final norm or head: {names}")
    if done.dropped_metadata:
        names = ", ".join(done.dropped_metadata)
        lines.append(f"left out of the headers, as the source's files disagree: {names}")
    if done.side_files:
        lines.append(f"copied as they are: {', '.join(done.side_files)}")
    facts = asdict(done) | {"directory": str(options.out)}
    return CommandResult(facts, tuple(lines), notes=(said, *map(str, done.warnings)))


def _view(directory: Path) -> CheckpointView:
    """View a directory as a cycle does; a delta, which only we write, as it lies."""
    path = directory / INDEX_FILE
    index = read_json_object(read_document(path), file=INDEX_FILE) if path.is_file() else None
    if is_delta((), index):
        return CheckpointView(directory, read_checkpoint(directory))
    return view_checkpoint(directory)


def _findings(
    directory: Path, view: CheckpointView, kind: SnapshotKind, previous: Checkpoint | None
) -> Iterator[Finding]:
    checkpoint = view.checkpoint
    if kind is SnapshotKind.LORA:
        yield from check_lora(checkpoint)
    elif kind is SnapshotKind.DELTA:
        yield from _check_delta(directory, checkpoint, previous)
    else:
        yield from check_full(checkpoint)
        yield from view.check_heads()
        if previous is not None and (reason := _obstacle(previous, checkpoint)):
            expected = "the layout of previous; otherwise the next snapshot has to be a full one"
            yield Finding("drift", str(directory), None, reason, expected, severity="warning")


def _obstacle(previous: Checkpoint, checkpoint: Checkpoint) -> str | None:
    if kind_of(previous) is not SnapshotKind.FULL:
        raise UsageError("--previous is no full checkpoint; give the one its deltas restore")
    return delta_obstacle(previous, checkpoint)


def _check_delta(
    directory: Path, delta: Checkpoint, previous: Checkpoint | None
) -> Iterator[Finding]:
    found = list(_check_delta_files(delta, previous))
    yield from found
    if all(finding.severity == "warning" for finding in found):
        yield from _check_frames(directory, _forms(delta, previous))


def _check_delta_files(delta: Checkpoint, previous: Checkpoint | None) -> Iterator[Finding]:
    data = delta.documents.get(INDEX_FILE)
    if data is None:
        yield _ours("missing_file", INDEX_FILE, None, "no such file", "the index of the delta")
        return
    try:
        index = parse_index(data)
    except DeltaError as error:
        yield _ours("index", INDEX_FILE, None, error.reason, "the index of a delta")
        return
    if index.weight_map or delta.shards:  # a delta of no change has neither
        yield from check_index(delta, index.weight_map)
    if not index.dialect.carries_side_files:
        for shard in delta.shards:
            for tensor in shard.tensors:
                yield from check_payload(shard, tensor, index.envelope)
        if previous is not None:
            base = {tensor.name for _, tensor in previous.tensors}
            for name in sorted(index.weight_map.keys() - base):
                found, expected = "a payload", "only tensors of previous"
                yield _ours("extra_tensor", index.weight_map[name], name, found, expected)
        return
    # Without a previous layout the delta is held to itself: payloads, checksums, sizes.
    yield from check_delta(delta, previous or delta)
    for file in (CONFIG_FILE, SPEC_FILE):
        if file not in delta.documents:
            yield _ours("missing_file", file, None, "no such file", "that of the previous snapshot")


def _check_frames(directory: Path, forms: dict[str, Form]) -> Iterator[Finding]:
    """Each payload is one whole frame of its tensor's size; nothing is decoded."""
    try:
        with open_delta(directory) as delta:
            for name, payload in delta.payloads.items():
                subject = f"{payload.file}: {name}"
                stated = content_size(payload.source, payload.start, payload.end, subject)
                expected = storage_bytes(*forms[name]) if name in forms else None
                if expected is not None and stated != expected:
                    found = f"a frame of {stated} bytes"
                    yield _ours("frame_size", payload.file, name, found, f"{expected} bytes")
    except DeltaError as error:
        yield _ours("frame", error.subject, None, error.reason, "one whole zstd frame a tensor")


def _forms(delta: Checkpoint, previous: Checkpoint | None) -> dict[str, Form]:
    """Dtype and shape of every tensor, as far as the delta's spec or the base tells them."""
    if previous is not None and kind_of(previous) is SnapshotKind.FULL:
        return {tensor.name: (tensor.dtype, tensor.shape) for _, tensor in previous.tensors}
    spec = delta.documents.get(SPEC_FILE)
    return {} if spec is None else spec_forms(read_json_object(spec, file=SPEC_FILE))


def _ours(rule: str, file: str, tensor: str | None, found: str, expected: str) -> Finding:
    return Finding(rule, file, tensor, found, expected, who="publisher")
