"""Checkpoint directories on this machine: shard by shard and file by file.

Reads are positional and bounded. Every write goes to a temporary file beside its destination, is
made durable and then renamed, so that a reader sees the old file or the whole new one. Temporary
names begin with a dot; files with such names are never part of a checkpoint, and neither is what a
trainer keeps for itself: optimizer, schedule, random state.

Raises, besides what each function says: OSError where the disk is full or a directory cannot be
written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

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
from hotload.delta.byte_io import Bytes
from hotload.delta.encode import DeltaStats, encode_shard
from hotload.delta.envelope import ARC_V2, Envelope, check_delta_shard
from hotload.delta.ordered_threads import Workers
from hotload.errors import DeltaError, Finding, InvalidCheckpointError
from hotload.records import FileDigest

DOCUMENTS = (CONFIG_FILE, INDEX_FILE, SPEC_FILE, ADAPTER_CONFIG_FILE)
DOCUMENT_LIMIT_BYTES = 100_000_000
COPY_BYTES = 4 << 20
CLONE_BYTES = 1 << 30
# What systems answer that cannot copy between these two files by themselves.
CANNOT_CLONE = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM})
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
                _refuse_unreadable(self.file, error)
            if not count:
                found = f"an end after {offset + filled} bytes"
                _refuse("truncated", self.file, found, f"{self.size_bytes} bytes, as when opened")
            filled += count

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)


class OutFile:
    """A file under way, written at positions (`hotload.delta.byte_io.Writable`)."""

    def __init__(self, descriptor: int, file: str) -> None:
        self._descriptor, self.file = descriptor, file

    @property
    def size_bytes(self) -> int:
        """Bytes there are so far."""
        return os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on.

        Raises:
            OSError: the file ends before, or cannot be read.
        """
        filled = 0
        while filled < len(view):
            count = os.preadv(self._descriptor, [view[filled:]], offset + filled)
            if not count:
                raise OSError(errno.EIO, "file under way became shorter", self.file)
            filled += count

    def write_at(self, offset: int, data: Bytes) -> None:
        """Put all of `data` at `offset`.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        view, written = memoryview(data), 0
        while written < len(view):
            written += os.pwrite(self._descriptor, view[written:], offset + written)

    def fill_from(self, descriptor: int) -> None:
        """Take over the bytes of an open file, without copying where the file system can share.

        Raises:
            OSError: the disk is full; or, as one of CANNOT_CLONE, the system cannot do that.
        """
        if not hasattr(os, "copy_file_range"):
            raise OSError(errno.ENOSYS, "no copy_file_range", self.file)
        while os.copy_file_range(descriptor, self._descriptor, CLONE_BYTES):
            pass

    def truncate(self, size_bytes: int) -> None:
        """End the file there."""
        os.ftruncate(self._descriptor, size_bytes)


class _OpenDelta(OpenShard):
    """A delta open for reads; that it cannot be read is no fault of the checkpoint's."""

    def read_into(self, offset: int, view: memoryview) -> None:
        try:
            super().read_into(offset, view)
        except InvalidCheckpointError as error:
            raise DeltaError(self.file, error.findings[0].told) from None


@contextmanager
def open_shard(path: Path) -> Iterator[OpenShard]:
    """Open the shard at `path` until the block ends.

    Raises:
        InvalidCheckpointError: no such file, not readable, or its header breaks a rule.
    """
    with _open_regular(path) as descriptor:
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
                size_bytes, sha256 = _sum(path)
            side_files.append(FileDigest(file=path.name, size_bytes=size_bytes, sha256=sha256))
        except InvalidCheckpointError as error:
            findings += error.findings
    if findings:
        raise InvalidCheckpointError(tuple(findings))
    return Checkpoint(tuple(shards), documents, tuple(side_files))


def sha256_file(path: Path) -> str:
    """Digest a file: SHA-256 in hex.

    Raises:
        InvalidCheckpointError: no such file, or not readable.
    """
    return _sum(path)[1]


class FileDigests:
    """SHA-256 of files, each read once for as long as it stays as it is.

    A file counts as unchanged while its inode, size and times of change are the same. Several
    threads may ask at a time.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], str]] = {}

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file in hex.

        Raises:
            InvalidCheckpointError: no such file, or not readable.
        """
        if known := self.known(path):
            return known
        before = _state(path)
        digest = sha256_file(path)
        if before is not None and before == _state(path):
            self._known[path] = before, digest
        return digest

    def known(self, path: Path) -> str | None:
        """Return the digest of a file that was read before and has not changed since, or None."""
        state, digest = self._known.get(path, (None, None))
        return digest if state is not None and state == _state(path) else None


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
    """Write the delta from shard `base` to shard `target` at `out`; see `codec.encode_shard`.

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
        raise DeltaError(finding.where, finding.told)
    return payloads(delta, delta.header)


@contextmanager
def replacing_file(path: Path) -> Iterator[OutFile]:
    """Write a file that takes the place of `path` when the block ends; on an error, none."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(partial, flags, 0o666)
        try:
            yield OutFile(descriptor, path.name)
        finally:
            os.close(descriptor)
        sync_and_replace(partial, path)
    except BaseException:  # an interrupt leaves no half file either
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Make `path` hold exactly `data`, durably; a reader never sees a part."""
    with replacing_file(path) as file:
        file.write_at(0, data)


def copy_file(source: Path, destination: Path) -> str:
    """Copy a file's bytes durably to `destination`, and return their SHA-256.

    Raises:
        InvalidCheckpointError: the source cannot be read.
    """
    digest, end = hashlib.sha256(), 0
    with replacing_file(destination) as file:
        for piece in _pieces(source):
            digest.update(piece)
            file.write_at(end, piece)
            end += len(piece)
    return digest.hexdigest()


def clone_file(source: Path, destination: Path) -> None:
    """Copy a file's bytes durably; where the file system can, the two share them until one changes.

    Raises:
        InvalidCheckpointError: the source cannot be read.
    """
    try:
        with _open_regular(source) as descriptor, replacing_file(destination) as file:
            file.fill_from(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_CLONE:
            raise
        copy_file(source, destination)


def sync_and_replace(partial: Path, target: Path) -> None:
    """Make a finished file durable and give it its name, in one step for every reader."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a file or directory with all that is in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        _refuse("missing_file", path.name, "no such file", "a file")
    except OSError as error:
        _refuse_unreadable(path.name, error)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            _refuse("not_a_file", path.name, "a directory or device", "a file")
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_delta_shard(path: Path) -> Iterator[OpenShard]:
    """Open the delta shard at `path` until the block ends.

    Raises:
        DeltaError: no such file, not readable, or its header breaks a rule.
    """
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(_open_regular(path))
            delta = _OpenDelta(descriptor, path.name, os.fstat(descriptor).st_size)
        except InvalidCheckpointError as error:
            raise DeltaError(path.name, error.findings[0].told) from None
        yield delta


def _files(directory: Path, findings: list[Finding]) -> list[Path]:
    """List the files of a checkpoint by name; what is no plain file becomes a finding."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        _refuse("missing_directory", str(directory), "no such directory", "a checkpoint directory")
    except NotADirectoryError:
        expected = "a checkpoint directory"
        _refuse("not_a_directory", str(directory), "something else", expected, "caller")
    except OSError as error:
        _refuse_unreadable(str(directory), error)
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
    with _open_regular(path) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes > DOCUMENT_LIMIT_BYTES:
            limit = f"at most {DOCUMENT_LIMIT_BYTES}"
            _refuse("document_size", path.name, f"{size_bytes} bytes", limit)
    return b"".join(_pieces(path))


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written to or replaced; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sum(path: Path) -> tuple[int, str]:
    digest, size_bytes = hashlib.sha256(), 0
    for piece in _pieces(path):
        digest.update(piece)
        size_bytes += len(piece)
    return size_bytes, digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with _open_regular(path) as descriptor:
        while True:
            try:
                piece = os.read(descriptor, COPY_BYTES)
            except OSError as error:
                _refuse_unreadable(path.name, error)
            if not piece:
                return
            yield piece


def _refuse(rule: str, file: str, found: str, expected: str, who: str = "trainer") -> NoReturn:
    raise InvalidCheckpointError((Finding(rule, file, None, found, expected, who),))


def _refuse_unreadable(file: str, error: OSError) -> NoReturn:
    reason = error.strerror or type(error).__name__
    _refuse("unreadable", file, reason, "a file this process may read", "operator")
