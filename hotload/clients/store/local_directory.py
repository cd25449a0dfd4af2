"""A checkpoint store that is a directory on this machine or on a mounted file system.

fsspec's local file system writes in place, so a reader could see half a file; here a file is
written below `_hotload/partial`, synced, and renamed to where it belongs.
`hotload.directory.files` writes beside the destination; here that would be listed as an object.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from hotload.clients.store.stored_object import StoredObject
from hotload.directory.files import AnyFile, read_pieces, sync_directory
from hotload.errors import StoreError

T = TypeVar("T")
PIECE_BYTES = 8 << 20
PARTIAL = "_hotload/partial"
TRIES = 10
# Unfinished files of this process; everything else below PARTIAL was left behind by a dead one.
_IN_FLIGHT: Counter[str] = Counter()


class LocalDirectory:
    """Objects are files below `root`, which must exist; paths are relative and already checked."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def put_file(self, local: AnyFile, path: str) -> None:
        """Copy, sync, rename. A cancelled call stops within one piece of 8 MiB."""
        stop = threading.Event()
        try:
            await asyncio.to_thread(self._write, path, lambda: _pieces(local, stop))
        finally:
            stop.set()

    async def put_bytes(self, data: bytes, path: str) -> None:
        await asyncio.to_thread(self._write, path, lambda: iter((data,)))

    async def create_bytes(self, data: bytes, path: str) -> bool:
        return await asyncio.to_thread(self._create, data, path)

    async def read_bytes(self, path: str, limit_bytes: int) -> bytes:
        """At most `limit_bytes` + 1 bytes, so that the caller sees an object that is too large."""
        return await asyncio.to_thread(_read_head, self._file(path), limit_bytes + 1)

    async def read_piece(self, path: str, start: int, size_bytes: int) -> bytes:
        return await asyncio.to_thread(_read_head, self._file(path), size_bytes, start)

    async def get_file(self, path: str, local: Path) -> None:
        stop = threading.Event()
        try:
            await asyncio.to_thread(_copy, self._file(path), local, stop)
        finally:
            stop.set()

    async def size(self, path: str) -> int | None:
        return await asyncio.to_thread(self._size, path)

    async def names(self, prefix: str) -> list[str]:
        return await asyncio.to_thread(self._names, prefix)

    async def objects(self, prefix: str) -> list[StoredObject]:
        return await asyncio.to_thread(self._objects, prefix)

    async def delete_file(self, path: str) -> None:
        await asyncio.to_thread(self._delete, path)

    async def abort_orphaned_uploads(self, prefix: str) -> int:
        """Unfinished files carry no path, so all of them below the store go, whatever the
        prefix."""
        del prefix
        return await asyncio.to_thread(self._remove_partial_files)

    def _file(self, path: str) -> Path:
        if not self._root.is_dir():
            raise StoreError(
                str(self._root), "the directory does not exist; hotload never creates one"
            )
        return self._root / path if path else self._root

    def _write(self, path: str, pieces: Callable[[], Iterator[bytes | bytearray]]) -> None:
        target = self._file(path)
        with self._partial_file() as partial:
            _write_synced(partial, pieces())
            _into_directory(target.parent, lambda: partial.replace(target))
            sync_directory(target.parent)

    def _create(self, data: bytes, path: str) -> bool:
        target = self._file(path)
        with self._partial_file() as partial:
            _write_synced(partial, iter((data,)))

            def link() -> bool:
                # A link, not a rename: it refuses an existing name, and what it names is complete.
                try:
                    target.hardlink_to(partial)
                except FileExistsError:
                    return False
                return True

            if not _into_directory(target.parent, link):
                return False
            sync_directory(target.parent)
        return True

    def _size(self, path: str) -> int | None:
        target = self._file(path)
        try:
            return target.stat().st_size if target.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _names(self, prefix: str) -> list[str]:
        try:
            names = os.listdir(self._file(prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []
        start = f"{prefix}/" if prefix else ""
        return sorted(name for name in names if start + name != PARTIAL)

    def _objects(self, prefix: str) -> list[StoredObject]:
        found = []
        for directory, below, files in os.walk(self._file(prefix)):
            place = Path(directory).relative_to(self._root)
            below[:] = [name for name in below if str(place / name) != PARTIAL]
            for name in files:
                # One that is gone since it was listed is not there.
                with suppress(FileNotFoundError):
                    facts = Path(directory, name).stat()
                    written = datetime.fromtimestamp(facts.st_mtime, UTC)
                    found.append(StoredObject(str(place / name), facts.st_size, written))
        return sorted(found, key=lambda one: one.path)

    def _delete(self, path: str) -> None:
        target = self._file(path)
        with suppress(FileNotFoundError, NotADirectoryError):
            target.unlink()
        # No object store has an empty directory, and it would be listed as something stored.
        for parent in target.parents:
            if parent == self._root:
                return
            try:
                parent.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return

    @contextmanager
    def _partial_file(self) -> Iterator[Path]:
        """A name of this process below PARTIAL; what is left under it is removed at the end."""
        directory = self._file(PARTIAL)
        _make_directory(directory)
        partial = directory / f"{os.getpid()}-{secrets.token_hex(8)}"
        _IN_FLIGHT[partial.name] += 1
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)
            del _IN_FLIGHT[partial.name]

    def _remove_partial_files(self) -> int:
        directory = self._file(PARTIAL)
        try:
            orphans = [entry for entry in directory.iterdir() if entry.name not in _IN_FLIGHT]
        except FileNotFoundError:
            return 0
        for orphan in orphans:
            orphan.unlink(missing_ok=True)
        return len(orphans)


def _pieces(source: AnyFile, stop: threading.Event) -> Iterator[bytes | bytearray]:
    for piece in _read(source) if isinstance(source, Path) else read_pieces(source):
        if stop.is_set():
            raise InterruptedError("the copy was cancelled")
        yield piece


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _copy(source: Path, target: Path, stop: threading.Event) -> None:
    with target.open("xb") as file:
        for piece in _pieces(source, stop):
            file.write(piece)


def _read_head(path: Path, size: int, start: int = 0) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _write_synced(path: Path, pieces: Iterator[bytes | bytearray]) -> None:
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _into_directory(directory: Path, place: Callable[[], T]) -> T:
    """Make the directory and place a file in it, again if another's deletion took it between."""
    for _ in range(TRIES - 1):
        try:
            _make_directory(directory)
            return place()
        except FileNotFoundError:
            continue
    _make_directory(directory)
    return place()


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    try:
        directory.mkdir(exist_ok=True)
    except FileExistsError:
        if directory.exists():
            raise
        # Another made it and a third removed it, since `mkdir` looked.
        raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(directory)) from None
    sync_directory(directory.parent)
