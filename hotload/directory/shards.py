"""Shards and checkpoint directories on this machine: opened, encoded, applied, verified.

What a trainer keeps for itself is never part of a checkpoint: optimizer, schedule, random state.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import (
    PREFIX_BYTES,
    SHARD_SUFFIX,
    ShardHeader,
    header_size,
    name_obstacle,
    read_header,
)
from hotload.delta.apply import Payload, apply_shard, payloads, verify_shard
from hotload.delta.encode import DeltaStats, encode_shard
from hotload.delta.envelope import ARC_V2, Envelope, check_delta_shard
from hotload.delta.ordered_threads import Workers
from hotload.directory.files import (
    open_regular,
    read_pieces,
    refuse_file,
    refuse_unreadable,
    replacing_file,
    size_and_sha256,
)
from hotload.errors import DeltaError, Finding, InvalidCheckpointError
from hotload.records import FileDigest

DOCUMENTS = (CONFIG_FILE, INDEX_FILE, SPEC_FILE, ADAPTER_CONFIG_FILE)
DOCUMENT_LIMIT_BYTES = 100_000_000
# A trainer keeps these beside the model. They change with every step and no replica reads them:
# published, they would force every snapshot to be full, and double its size.
TRAINER_FILE = re.compile(
    r"trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler|rng_state)[\w.-]*"
)


class OpenShard:
    """A shard open for positional reads (`hotload.delta.byte_io.Readable`), its header checked."""

    def __init__(self, descriptor: int, file: str, size_bytes: int) -> None:
        self._descriptor = descriptor
        self.file = file
        self.size_bytes = size_bytes
        prefix = self._read(0, min(PREFIX_BYTES, size_bytes))
        head = self._read(0, header_size(prefix, file=file, size_bytes=size_bytes))
        self.header: ShardHeader = read_header(head, file=file, size_bytes=size_bytes)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on.

        Raises:
            InvalidCheckpointError: the file became shorter, or cannot be read.
        """
        filled = 0
        while filled < len(view):
            try:
                count = os.preadv(self._descriptor, [view[filled:]], offset + filled)
            except OSError as error:
                refuse_unreadable(self.file, error)
            if not count:
                found = f"an end after {offset + filled} bytes"
                refuse_file(
                    "truncated", self.file, found, f"{self.size_bytes} bytes, as when opened"
                )
            filled += count

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)


class _OpenDelta(OpenShard):
    """A delta open for reads; that it cannot be read is no fault of the checkpoint's."""

    def read_into(self, offset: int, view: memoryview) -> None:
        try:
            super().read_into(offset, view)
        except InvalidCheckpointError as error:
            raise DeltaError(self.file, error.findings[0].summary) from None


@contextmanager
def open_shard(path: Path) -> Iterator[OpenShard]:
    """Open the shard at `path` until the block ends.

    Raises:
        InvalidCheckpointError: no such file, not readable, or its header breaks a rule.
    """
    with open_regular(path) as descriptor:
        yield OpenShard(descriptor, path.name, os.fstat(descriptor).st_size)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers, documents and side files of a checkpoint directory; side files are
    digested.

    Which files there have to be is for `hotload.checkpoint.rules` to say.

    Raises:
        InvalidCheckpointError: no such directory; a sub-directory, link or device in it; a file
        that cannot be read; a shard whose header breaks a rule. All findings at once.
    """
    findings: list[Finding] = []
    shards: list[ShardHeader] = []
    documents: dict[str, bytes] = {}
    side_files: list[FileDigest] = []
    for path in _files(directory, findings):
        try:
            if path.name.endswith(SHARD_SUFFIX):
                with open_shard(path) as shard:
                    shards.append(shard.header)
                continue
            if path.name in DOCUMENTS:
                documents[path.name] = data = _read_document(path)
                size_bytes, sha256 = len(data), hashlib.sha256(data).hexdigest()
            else:
                size_bytes, sha256 = size_and_sha256(path)
            side_files.append(FileDigest(file=path.name, size_bytes=size_bytes, sha256=sha256))
        except InvalidCheckpointError as error:
            findings += error.findings
    if findings:
        raise InvalidCheckpointError(tuple(findings))
    return Checkpoint(tuple(shards), documents, tuple(side_files))


def encode_file(
    base: Path,
    target: Path,
    out: Path,
    *,
    envelope: Envelope = ARC_V2,
    pool: Workers | None = None,
    with_sha256: bool = True,
    on_bytes: Callable[[int], object] | None = None,
) -> DeltaStats:
    """Write the delta from shard `base` to shard `target` at `out`; see `delta.encode_shard`.

    Raises:
        InvalidCheckpointError: one of the two cannot be read.
        LayoutMismatchError: they differ in more than values.
    """
    with open_shard(base) as old, open_shard(target) as new, replacing_file(out) as file:
        return encode_shard(
            old,
            old.header,
            new,
            new.header,
            file,
            envelope=envelope,
            pool=pool,
            with_sha256=with_sha256,
            on_bytes=on_bytes,
        )


def apply_file(base: Path, delta: Path, out: Path, *, pool: Workers | None = None) -> str:
    """Write the shard that `delta` makes of `base` at `out`, and return its SHA-256; `out` may
    be `base`.

    Raises:
        InvalidCheckpointError: the base cannot be read.
        DeltaError: the delta cannot be read or applied; also ChecksumMismatchError.
    """
    with open_shard(base) as old, open_delta_shard(delta) as change, replacing_file(out) as file:
        return apply_shard(old, old.header, payloads_on(old, change), file, pool=pool)


def verify_file(base: Path, delta: Path, target: Path, *, pool: Workers | None = None) -> None:
    """Return if `delta` makes of `base` every tensor of `target`, bit for bit.

    Raises:
        InvalidCheckpointError: base or target cannot be read.
        LayoutMismatchError: they differ in more than values.
        DeltaError: the delta cannot be read or applied, or restores other bytes.
    """
    with open_shard(base) as old, open_delta_shard(delta) as change, open_shard(target) as new:
        found = payloads_on(old, change)
        verify_shard(old, old.header, found, new, new.header, pool=pool)


def payloads_on(base: OpenShard, delta: OpenShard) -> dict[str, Payload]:
    """Find the payloads of an `arc_v2` delta shard: one for each tensor of its base, and no other.

    Raises:
        DeltaError: keys or payloads are not those of a delta on this base.
    """
    for finding in check_delta_shard(delta.header, base.header):
        raise DeltaError(finding.where, finding.summary)
    return payloads(delta, delta.header)


@contextmanager
def open_delta_shard(path: Path) -> Iterator[OpenShard]:
    """Open the delta shard at `path` until the block ends.

    Raises:
        DeltaError: no such file, not readable, or its header breaks a rule.
    """
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(open_regular(path))
            delta = _OpenDelta(descriptor, path.name, os.fstat(descriptor).st_size)
        except InvalidCheckpointError as error:
            raise DeltaError(path.name, error.findings[0].summary) from None
        yield delta


def _files(directory: Path, findings: list[Finding]) -> list[Path]:
    """List the files of a checkpoint by name; what is no plain file becomes a finding."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        refuse_file(
            "missing_directory", str(directory), "no such directory", "a checkpoint directory"
        )
    except NotADirectoryError:
        expected = "a checkpoint directory"
        refuse_file("not_a_directory", str(directory), "something else", expected, "caller")
    except OSError as error:
        refuse_unreadable(str(directory), error)
    paths = []
    for entry in entries:
        if entry.name.startswith(".") or TRAINER_FILE.fullmatch(entry.name):
            continue
        if reason := name_obstacle(entry.name):
            findings.append(Finding("file_name", reason, None, "the name", "a plain file name"))
        elif not entry.is_file(follow_symlinks=False):
            # Receivers do not walk sub-directories, and a link may lead out of the checkpoint.
            found = "a link" if entry.is_symlink() else "a directory or device"
            expected = "files only; `hotload doctor` makes such a directory"
            findings.append(Finding("not_a_file", entry.name, None, found, expected))
        else:
            paths.append(directory / entry.name)
    return paths


def _read_document(path: Path) -> bytes:
    with open_regular(path) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes > DOCUMENT_LIMIT_BYTES:
            limit = f"at most {DOCUMENT_LIMIT_BYTES}"
            refuse_file("document_size", path.name, f"{size_bytes} bytes", limit)
    return b"".join(read_pieces(path))
