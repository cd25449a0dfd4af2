"""Whole directories: encode, apply, verify, convert, fold (wire-format §2, §3, §6, §9).

`hotload.directory.shards` shard by shard, on as many threads as are given. What is made appears in
one step under its name, or not at all: it grows in a directory beside OUT whose name begins with a
dot, and an error or an interrupt stops the threads and removes that.

A Fireworks delta carries every other file of its base, byte for byte. The others carry an index of
their own and nothing else: what they are applied to keeps its config and tokenizer. Either way a
target in which more than tensors changed has to be published in full.

Raises, besides what each function says: OSError where OUT is taken or the disk is full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.names import INDEX_FILE
from hotload.checkpoint.safetensors import TensorInfo
from hotload.delta.apply import Payload, apply_shard, verify_shard
from hotload.delta.checksums import Checksum
from hotload.delta.convert import changed_payloads, complete_payloads, write_shard
from hotload.delta.dialects import (
    Dialect,
    Lineage,
    check_lineage,
    envelope_of,
    join_lineages,
    render_index,
)
from hotload.delta.encode import DeltaStats, TensorDelta
from hotload.delta.fold import fold_shard
from hotload.delta.frame import zero_frame_bytes
from hotload.delta.ordered_threads import ByteProgress, OnBytes, Workers, for_each_shard
from hotload.delta.rules import delta_obstacle
from hotload.directory import files as local
from hotload.directory.files import new_directory
from hotload.directory.inputs import read_delta, read_full
from hotload.directory.shards import encode_file, open_shard
from hotload.errors import DeltaError, Finding, InvalidCheckpointError, LayoutMismatchError


@dataclass(frozen=True, slots=True)
class DirectoryStats:
    """What one encode read and wrote; `shards` by file name, `size_bytes` those of all of OUT."""

    dialect: Dialect
    checksum: Checksum
    lineage: Lineage | None
    size_bytes: int
    shards: Mapping[str, DeltaStats]

    @property
    def content_size_bytes(self) -> int:
        """Bytes of the shards that applying the delta restores."""
        return sum(shard.content_size_bytes for shard in self.shards.values())

    @property
    def tensors(self) -> Iterator[TensorDelta]:
        """Every tensor of the base, those that did not change included."""
        return (tensor for shard in self.shards.values() for tensor in shard.tensors)


def encode_directory(
    base: Path,
    target: Path,
    out: Path,
    *,
    dialect: Dialect = Dialect.FIREWORKS,
    checksum: Checksum = Checksum.ADLER32,
    lineage: Lineage | None = None,
    workers: int = 1,
    progress: ByteProgress | None = None,
) -> DirectoryStats:
    """Make OUT the delta from checkpoint `base` to checkpoint `target`.

    `lineage` for the dialects whose index tells it. Shards keep their names; in the dialects of
    changed tensors only, those without any are left out.

    Raises:
        InvalidCheckpointError: one of the two is no whole checkpoint.
        InvalidIdentityError: the lineage is not one of the dialect.
        LayoutMismatchError: they differ in more than tensor values; a full snapshot is needed.
        DeltaError: the dialect's receivers do not compare this checksum.
    """
    envelope = envelope_of(dialect, checksum)
    check_lineage(dialect, lineage)
    old, new = read_full(base), read_full(target)
    _refuse_obstacle(old, new)

    def encode(file: str, pool: Workers | None, on_bytes: OnBytes) -> DeltaStats:
        stats = encode_file(
            base / file,
            target / file,
            staged / file,
            envelope=envelope,
            pool=pool,
            with_sha256=False,
            on_bytes=on_bytes,
        )
        if not envelope.has_every_tensor and not stats.changed_element_count:
            local.remove_tree(staged / file)
        return stats

    with new_directory(out, base, target) as staged:
        shards = for_each_shard(
            (shard.file for shard in old.shards),
            encode,
            workers=workers,
            total_bytes=_tensor_bytes(old),
            progress=progress,
        )
        names = {
            file: [tensor.name for tensor in stats.tensors if not tensor.is_unchanged]
            for file, stats in shards.items()
        }
        _finish(staged, lineage, checksum, names, side_files=(base, old))
        size_bytes = sum(path.stat().st_size for path in staged.iterdir())
    return DirectoryStats(dialect, checksum, lineage, size_bytes, shards)


def apply_directory(
    base: Path,
    delta: Path,
    out: Path,
    *,
    workers: int = 1,
    progress: ByteProgress | None = None,
) -> None:
    """Make OUT the checkpoint that `delta` makes of `base`, with all other files of `base`.

    Every tensor that the delta holds is compared with its checksum. `base` is only read.

    Raises:
        InvalidCheckpointError: the base is no whole checkpoint.
        DeltaError: the delta is not one on this base, or cannot be decoded.
        ChecksumMismatchError: a tensor comes out otherwise than it was encoded, as on a wrong base
        or where the delta was applied before.
    """
    old, change = read_full(base), read_delta(delta)
    change.check_base(old)

    def apply(file: str, pool: Workers | None, on_bytes: OnBytes) -> None:
        with (
            open_shard(base / file) as shard,
            change.opened(shard.header.by_name) as payloads,
            local.replacing_file(staged / file) as restored,
        ):
            apply_shard(
                shard,
                shard.header,
                payloads,
                restored,
                pool=pool,
                with_sha256=False,
                on_bytes=on_bytes,
            )

    with new_directory(out, base, delta) as staged:
        for_each_shard(
            (shard.file for shard in old.shards),
            apply,
            workers=workers,
            total_bytes=_tensor_bytes(old),
            progress=progress,
        )
        _copy_side_files(base, old, staged)


def verify_directory(
    base: Path,
    delta: Path,
    target: Path,
    *,
    workers: int = 1,
    progress: ByteProgress | None = None,
) -> None:
    """Return if `delta` makes of `base` every tensor of `target`, bit for bit (wire-format §6).

    Raises:
        InvalidCheckpointError: base or target is no whole checkpoint.
        LayoutMismatchError: the two differ in more than tensor values.
        DeltaError: the delta cannot be applied to the base, or restores other bytes.
    """
    old, new, change = read_full(base), read_full(target), read_delta(delta)
    _refuse_obstacle(old, new)
    change.check_base(old)

    def verify(file: str, pool: Workers | None, on_bytes: OnBytes) -> None:
        with (
            open_shard(base / file) as shard,
            change.opened(shard.header.by_name) as payloads,
            open_shard(target / file) as expected,
        ):
            verify_shard(
                shard,
                shard.header,
                payloads,
                expected,
                expected.header,
                pool=pool,
                on_bytes=on_bytes,
            )

    for_each_shard(
        (shard.file for shard in old.shards),
        verify,
        workers=workers,
        total_bytes=_tensor_bytes(old),
        progress=progress,
    )


def convert_directory(
    delta: Path,
    out: Path,
    *,
    dialect: Dialect,
    lineage: Lineage | None = None,
    base: Path | None = None,
    workers: int = 1,
    progress: ByteProgress | None = None,
) -> None:
    """Make OUT the same delta for another dialect: headers and index anew, payloads copied.

    Nothing is decoded, so checksums stay what they are. Fireworks wants every tensor: from a delta
    that holds the changed ones only, `base` gives the others and its files, and is read for it.

    Raises:
        InvalidCheckpointError: the base is no whole checkpoint.
        InvalidIdentityError: the lineage is not one of the dialect.
        DeltaError: the delta cannot be read or is not one on this base; its checksums are others
        than the dialect's receivers compare; a base is needed.
    """
    source = read_delta(delta)
    checksum = source.envelope.checksum
    try:
        envelope = envelope_of(dialect, checksum)
    except DeltaError as error:
        reason = f"{error.reason}, and no checksum follows from another: encode again"
        raise DeltaError(f"{delta.name} for {error.subject}", reason) from None
    check_lineage(dialect, lineage)
    owner, layout = delta, source.checkpoint
    missing: dict[str, TensorInfo] = {}
    if envelope.has_every_tensor and not source.envelope.has_every_tensor:
        if base is None:
            reason = f"{dialect} wants unchanged tensors, too: a base is needed to take them from"
            raise DeltaError(delta.name, reason)
        owner, layout = base, read_full(base)
        source.check_base(layout)
        missing = {one.name: one for _, one in layout.tensors if one.name not in source.files}
    headers = {shard.file: shard for shard in layout.shards}

    def convert(file: str, _: Workers | None, on_bytes: OnBytes) -> list[str]:
        with source.opened(headers[file].by_name) as payloads:
            if not envelope.has_every_tensor:
                payloads, all_of_them = changed_payloads(payloads), payloads
                on_bytes(_payload_bytes(all_of_them) - _payload_bytes(payloads))
            if owner is not delta:
                with open_shard(owner / file) as shard:
                    payloads = complete_payloads(
                        payloads, shard, shard.header, envelope, on_bytes=on_bytes
                    )
            if payloads or envelope.has_every_tensor:
                with local.replacing_file(staged / file) as dressed:
                    write_shard(payloads, dressed, envelope, on_bytes=on_bytes)
        return list(payloads)

    with new_directory(out, delta, *([base] if base else [])) as staged:
        names = for_each_shard(
            headers,
            convert,
            workers=workers,
            total_bytes=_tensor_bytes(source.checkpoint)
            + sum(one.size_bytes + zero_frame_bytes(one.size_bytes) for one in missing.values()),
            progress=progress,
        )
        _finish(staged, lineage, checksum, names, side_files=(owner, layout))


def fold_directory(
    deltas: Sequence[Path], out: Path, *, workers: int = 1, progress: ByteProgress | None = None
) -> None:
    """Make OUT the delta that does what these consecutive ones, the earliest first, do together.

    It follows what the first follows and makes what the last makes. slime's receivers count by one,
    so there it has to be converted to the number they wait for.

    Raises:
        DeltaError: one cannot be read; they differ in dialect, checksum, tensors or other files; or
        one does not follow the one before it, as far as that is known.
    """
    if not deltas:
        raise DeltaError("fold", "found no delta, expected one or more")
    links = [read_delta(delta) for delta in deltas]
    first = links[0]
    for link in links[1:]:
        link.check_kind(first)
    lineage = join_lineages([link.lineage for link in links])
    file_of = {name: file for link in links for name, file in link.files.items()}
    groups: dict[str, list[str]] = {}
    for name, file in file_of.items():
        groups.setdefault(file, []).append(name)

    def fold(file: str, _: Workers | None, on_bytes: OnBytes) -> tuple[str, ...]:
        with ExitStack() as stack:
            parts = [stack.enter_context(link.opened(groups[file])) for link in links]
            folded = stack.enter_context(local.replacing_file(staged / file))
            names = fold_shard(parts, folded, first.envelope, on_bytes=on_bytes)
        if not names:
            local.remove_tree(staged / file)
        return names

    with new_directory(out, *deltas) as staged:
        names = for_each_shard(
            groups,
            fold,
            workers=workers,
            total_bytes=sum(_tensor_bytes(link.checkpoint) for link in links),
            progress=progress,
        )
        side_files = (first.path, first.checkpoint)
        _finish(staged, lineage, first.envelope.checksum, names, side_files=side_files)


def _finish(
    staged: Path,
    lineage: Lineage | None,
    checksum: Checksum,
    names: Mapping[str, Iterable[str]],
    *,
    side_files: tuple[Path, Checkpoint],
) -> None:
    """Write what stands beside the shards of a delta: its index, or the files of its base.

    `names` are the tensors by shard file, `side_files` where those files are.
    """
    if lineage is None:
        _copy_side_files(*side_files, staged)
        return
    weight_map = {name: file for file, tensors in names.items() for name in tensors}
    local.write_atomic(staged / INDEX_FILE, render_index(lineage, checksum, weight_map))


def _copy_side_files(directory: Path, checkpoint: Checkpoint, staged: Path) -> None:
    for side in checkpoint.side_files:
        if local.copy_file(directory / side.file, staged / side.file) != side.sha256:
            found = Finding("changed", side.file, None, "other bytes", "those read a moment ago")
            raise InvalidCheckpointError((found,))


def _refuse_obstacle(base: Checkpoint, target: Checkpoint) -> None:
    if reason := delta_obstacle(base, target):
        raise LayoutMismatchError(reason)


def _payload_bytes(payloads: Mapping[str, Payload]) -> int:
    return sum(payload.end - payload.start for payload in payloads.values())


def _tensor_bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.size_bytes for _, tensor in checkpoint.tensors)
