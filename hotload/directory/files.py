"""Files and directories on this machine, written in one step: seen complete or not at all.

Reads are positional and bounded. Every write goes to a temporary name beside its destination, is
made durable and then renamed. Temporary names begin with a dot; files with such names are never
part of a checkpoint.

Raises, besides what each function says: OSError where the disk is full or a directory cannot be
written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from hotload.delta.byte_io import Bytes
from hotload.errors import Finding, InvalidCheckpointError

COPY_BYTES = 4 << 20
CLONE_BYTES = 1 << 30
# What systems answer that cannot copy between these two files by themselves.
CANNOT_CLONE = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM})


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


def sha256_file(path: Path) -> str:
    """Digest a file: SHA-256 in hex.

    Raises:
        InvalidCheckpointError: no such file, or not readable.
    """
    return size_and_sha256(path)[1]


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
        for piece in read_pieces(source):
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
        with open_regular(source) as descriptor, replacing_file(destination) as file:
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
def open_regular(path: Path) -> Iterator[int]:
    """Open a regular file for reading; refuse directories, pipes and devices."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        refuse_file("missing_file", path.name, "no such file", "a file")
    except OSError as error:
        refuse_unreadable(path.name, error)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            refuse_file("not_a_file", path.name, "a directory or device", "a file")
        yield descriptor
    finally:
        os.close(descriptor)


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written to or replaced; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def size_and_sha256(path: Path) -> tuple[int, str]:
    """Digest a file: its size in bytes, and SHA-256 in hex."""
    digest, size_bytes = hashlib.sha256(), 0
    for piece in read_pieces(path):
        digest.update(piece)
        size_bytes += len(piece)
    return size_bytes, digest.hexdigest()


def read_pieces(path: Path) -> Iterator[bytes]:
    """Read a file in pieces of at most `COPY_BYTES`."""
    with open_regular(path) as descriptor:
        while True:
            try:
                piece = os.read(descriptor, COPY_BYTES)
            except OSError as error:
                refuse_unreadable(path.name, error)
            if not piece:
                return
            yield piece


def refuse_unreadable(file: str, error: OSError) -> NoReturn:
    """Raise a finding for a file that the system does not let us read."""
    reason = error.strerror or type(error).__name__
    refuse_file("unreadable", file, reason, "a file this process may read", "operator")


def refuse_file(rule: str, file: str, found: str, expected: str, who: str = "trainer") -> NoReturn:
    """Raise one finding about a file."""
    raise InvalidCheckpointError((Finding(rule, file, None, found, expected, who),))


@contextmanager
def new_directory(out: Path, *sources: Path) -> Iterator[Path]:
    """Make a directory that becomes `out` when the block ends, and vanishes when it raises."""
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise _taken(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(out.parent))
    for source in sources:
        if out.is_relative_to(source.resolve()):
            raise OSError(errno.EINVAL, "an output may not lie in an input", str(out))
    staged = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        staged.mkdir()
        yield staged
        try:
            staged.rename(out)  # takes the place of nothing, or of an empty directory
        except OSError:
            if out.exists():  # what came meanwhile stays
                raise _taken(out) from None
            raise
        sync_directory(out.parent)
    except BaseException:  # an interrupt leaves no half directory either
        with suppress(OSError):  # a thread may still write there; what ended the block matters more
            remove_tree(staged)
        raise


def _taken(out: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "there is something already", str(out))
