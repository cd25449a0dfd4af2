"""Files and directories: read wherever they lie, written on this machine in one step: seen
complete or not at all.

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
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NoReturn

from hotload.delta.byte_io import Bytes
from hotload.directory.remote import ReadAhead, RemoteFile
from hotload.errors import Finding, InvalidCheckpointError

COPY_BYTES = 4 << 20
CLONE_BYTES = 1 << 30
# What systems answer that cannot copy between these two files by themselves.
CANNOT_CLONE = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM})


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file: `size_bytes` of them, from `offset` on."""

    path: Path | RemoteFile
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ComposedFile:
    """A file that is never written here: bytes held in memory, then stretches of other files."""

    name: str
    head: bytes
    stretches: tuple[Stretch, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of head and stretches."""
        return len(self.head) + sum(stretch.size_bytes for stretch in self.stretches)

    @property
    def paths(self) -> tuple[Path | RemoteFile, ...]:
        """Every file that it is made of, once."""
        return tuple(dict.fromkeys(stretch.path for stretch in self.stretches))


AnyFile = Path | ComposedFile | RemoteFile
ReadSome = Callable[[int, memoryview], int]
"""Fills a view with bytes from an offset on, as far as it gets; returns how many."""


class OpenFile:
    """A file open for positional reads (`hotload.delta.byte_io.Readable`), wherever it lies."""

    def __init__(
        self, file: str, head: bytes, stretches: Sequence[tuple[ReadSome, int, int]]
    ) -> None:
        """Take the bytes held, then (reader, offset, size in bytes) of every stretch."""
        self.file = file
        self._head = head
        self._stretches = [stretch for stretch in stretches if stretch[2]]
        self._ends = list(accumulate((one[2] for one in self._stretches), initial=len(head)))
        self.size_bytes = self._ends[-1]

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on.

        Raises:
            InvalidCheckpointError: the file became shorter, or cannot be read.
            StoreUnavailableError: it lies in a store that is away.
        """
        held = self._head[offset : offset + len(view)]
        view[: len(held)] = held
        filled = len(held)
        while filled < len(view):
            at = offset + filled
            number = bisect_right(self._ends, at) - 1
            count = 0
            if number < len(self._stretches):
                read, start, _ = self._stretches[number]
                room = view[filled : filled + self._ends[number + 1] - at]
                count = read(start + at - self._ends[number], room)
            if not count:
                refuse_shortened(self.file, at, self.size_bytes)
            filled += count


class _OpenRemote(OpenFile):
    """One with bytes that lie elsewhere, which are asked for ahead of their reader."""

    def __init__(self, joined: OpenFile, ahead: ReadAhead) -> None:
        self.file, self.size_bytes, self._ahead = joined.file, joined.size_bytes, ahead

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > self.size_bytes:
            refuse_shortened(self.file, self.size_bytes, offset + len(view))
        self._ahead.read_into(offset, view)


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

    def fill_from(self, descriptor: int, offset: int, size_bytes: int, at: int) -> None:
        """Take over bytes of an open file, without copying where the file system can share; fewer
        where it ends before.

        Raises:
            OSError: the disk is full; or, as one of CANNOT_CLONE, the system cannot do that.
        """
        if not hasattr(os, "copy_file_range"):
            raise OSError(errno.ENOSYS, "no copy_file_range", self.file)
        done = 0
        while done < size_bytes:
            wanted = min(CLONE_BYTES, size_bytes - done)
            count = os.copy_file_range(
                descriptor, self._descriptor, wanted, offset + done, at + done
            )
            if not count:
                return
            done += count

    def truncate(self, size_bytes: int) -> None:
        """End the file there."""
        os.ftruncate(self._descriptor, size_bytes)


def sha256_file(path: AnyFile) -> str:
    """Digest a file: SHA-256 in hex.

    Raises:
        InvalidCheckpointError: no such file, or not readable.
    """
    return size_and_sha256(path)[1]


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


def copy_file(source: AnyFile, destination: Path) -> str:
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


def clone_file(source: AnyFile, destination: Path) -> None:
    """Copy a file's bytes durably; where the file system can, the two share them until one changes.

    Raises:
        InvalidCheckpointError: the source cannot be read.
    """
    paths = [path for path in files_behind(source) if isinstance(path, Path)]
    if len(paths) < len(files_behind(source)):
        copy_file(source, destination)
        return
    try:
        with ExitStack() as stack:
            opened: dict[object, int] = {
                path: stack.enter_context(open_regular(path)) for path in paths
            }
            file = stack.enter_context(replacing_file(destination))
            if isinstance(source, ComposedFile):
                head, stretches = source.head, [*source.stretches]
            else:
                size_bytes = os.fstat(opened[source]).st_size
                head, stretches = b"", [Stretch(source, 0, size_bytes)]
            file.write_at(0, head)
            end = len(head)
            for one in stretches:
                file.fill_from(opened[one.path], one.offset, one.size_bytes, end)
                end += one.size_bytes
    except OSError as error:
        if error.errno not in CANNOT_CLONE:
            raise
        copy_file(source, destination)


def link_file(source: Path, destination: Path) -> None:
    """Give a file one more name, durably; where the file system does not, copy it as `clone_file`.

    Raises:
        InvalidCheckpointError: the source cannot be read.
    """
    try:
        os.link(source, destination)
    except OSError:
        clone_file(source, destination)
        return
    with destination.open("rb") as file:
        os.fsync(file.fileno())
    sync_directory(destination.parent)


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


def files_behind(file: AnyFile) -> tuple[Path | RemoteFile, ...]:
    """Name the files that hold the bytes of a file, each once."""
    return file.paths if isinstance(file, ComposedFile) else (file,)


@contextmanager
def open_file(file: AnyFile) -> Iterator[OpenFile]:
    """Open a file for reads until the block ends, wherever its bytes lie.

    Raises:
        InvalidCheckpointError: no such file, or not readable.
    """
    with ExitStack() as stack:
        readers: dict[object, ReadSome] = {}
        sizes: dict[object, int] = {}
        is_remote = False
        for source in files_behind(file):
            if isinstance(source, Path):
                descriptor = stack.enter_context(open_regular(source))
                sizes[source] = os.fstat(descriptor).st_size
                readers[source] = _reader_of(descriptor, source.name)
            else:
                is_remote = True
                sizes[source] = source.size_bytes
                readers[source] = _remote_reader_of(source)
        if isinstance(file, ComposedFile):
            head, stretches = file.head, file.stretches
        else:
            head, stretches = b"", (Stretch(file, 0, sizes[file]),)
        joined = OpenFile(
            file.name, head, [(readers[one.path], one.offset, one.size_bytes) for one in stretches]
        )
        if is_remote:
            ahead = ReadAhead(joined.read_into, joined.size_bytes)
            stack.callback(ahead.close)
            joined = _OpenRemote(joined, ahead)
        yield joined


def _reader_of(descriptor: int, file: str) -> ReadSome:
    def read(offset: int, view: memoryview) -> int:
        try:
            return os.preadv(descriptor, [view], offset)
        except OSError as error:
            refuse_unreadable(file, error)

    return read


def _remote_reader_of(source: RemoteFile) -> ReadSome:
    def read(offset: int, view: memoryview) -> int:
        source.read_into(offset, view)
        return len(view)

    return read


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


def size_and_sha256(path: AnyFile) -> tuple[int, str]:
    """Digest a file: its size in bytes, and SHA-256 in hex."""
    digest, size_bytes = hashlib.sha256(), 0
    for piece in read_pieces(path):
        digest.update(piece)
        size_bytes += len(piece)
    return size_bytes, digest.hexdigest()


def read_pieces(path: AnyFile) -> Iterator[bytes | bytearray]:
    """Read a file in pieces of at most `COPY_BYTES`.

    Raises:
        InvalidCheckpointError: no such file, not readable, or shorter than it was.
        StoreUnavailableError: it lies in a store that is away.
    """
    if not isinstance(path, Path):
        with open_file(path) as opened:
            for at in range(0, opened.size_bytes, COPY_BYTES):
                room = bytearray(min(COPY_BYTES, opened.size_bytes - at))
                opened.read_into(at, memoryview(room))
                yield room
        return
    with open_regular(path) as descriptor:
        while True:
            try:
                piece = os.read(descriptor, COPY_BYTES)
            except OSError as error:
                refuse_unreadable(path.name, error)
            if not piece:
                return
            yield piece


def read_chunks(path: AnyFile, size_bytes: int) -> Iterator[bytes]:
    """Read a file in parts of `size_bytes`, the last one shorter; raises as `read_pieces`."""
    part = bytearray()
    for piece in read_pieces(path):
        part += piece
        while len(part) >= size_bytes:
            yield bytes(part[:size_bytes])
            del part[:size_bytes]
    if part:
        yield bytes(part)


def read_whole(path: AnyFile) -> bytes:
    """Read all of a file that is small enough to be held; raises as `read_pieces`."""
    return b"".join(read_pieces(path))


def refuse_shortened(file: str, found_bytes: int, expected_bytes: int) -> NoReturn:
    """Raise a finding for a file that ends before it did when it was first read."""
    found = f"an end after {found_bytes} bytes"
    refuse_file("truncated", file, found, f"{expected_bytes} bytes, as when opened")


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
