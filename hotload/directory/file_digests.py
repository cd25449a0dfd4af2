"""Digests of files: each is read once for as long as it stays as it is."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from hotload.directory.files import AnyFile, files_behind, sha256_file, write_atomic
from hotload.errors import InvalidCheckpointError


class FileDigests:
    """SHA-256 of files, each read once for as long as it stays as it is.

    A file counts as unchanged while its inode, size and times of change are the same, wherever it
    is moved; a composed one, while those of all that it is made of are. A link to it that came or
    went moves the time of its inode, and is no change. Several threads may ask at a time.

    Args:
        memory: a file that remembers them for the next process. One that cannot be read is taken
            for empty.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known: dict[Hashable, tuple[tuple[_Inode, ...], str]] = {}
        if memory is not None:
            with suppress(OSError, ValueError, TypeError):
                for *numbers, digest in json.loads(memory.read_bytes()):
                    inode = _Inode(*map(int, numbers))
                    self._known[inode.content] = (inode,), str(digest)

    def of(self, path: AnyFile) -> str:
        """Return the SHA-256 of a file in hex.

        Raises:
            InvalidCheckpointError: no such file, or not readable.
        """
        if known := self.known(path):
            return known
        before = _inodes(path)
        digest = sha256_file(path)
        if before is not None and before == _inodes(path):
            self._known[_key(path, before)] = before, digest
        return digest

    def known(self, path: AnyFile) -> str | None:
        """Return the digest of a file that was read before and has not changed since, or None."""
        now = _inodes(path)
        if now is None or (found := self._known.get(_key(path, now))) is None:
            return None
        before, digest = found
        if not all(map(_Inode.is_unchanged, now, before)):
            return None
        self._known[_key(path, now)] = now, digest
        return digest

    def note(self, path: AnyFile, digest: str) -> None:
        """Remember the digest of a file that was just written, without reading it again."""
        if (inodes := _inodes(path)) is not None:
            self._known[_key(path, inodes)] = inodes, digest

    def doubt(self) -> None:
        """Forget every digest, and let the next process begin with none: all is read again."""
        self._known.clear()
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.unlink(missing_ok=True)

    def remember(self, directories: Iterable[Path]) -> None:
        """Let the next process know the files of these directories, and no others; after a doubt,
        none."""
        if self._memory is None:
            return
        paths = [path for directory in directories for path in sorted(directory.iterdir())]
        kept = []
        for path in paths:
            if (digest := self.known(path)) and (inodes := _inodes(path)):
                kept.append((*astuple(inodes[0]), digest))
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._memory, json.dumps(kept).encode())


@dataclass(frozen=True, slots=True)
class _Inode:
    """What tells a file that was written to or replaced from the one it was."""

    device: int
    number: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    link_count: int

    @property
    def content(self) -> tuple[int, ...]:
        """What stays while nobody writes to it."""
        return self.device, self.number, self.size_bytes, self.mtime_ns

    def is_unchanged(self, before: _Inode) -> bool:
        """Tell whether nothing but a link has changed it."""
        by_link = self.link_count != before.link_count
        return self.content == before.content and (self.ctime_ns == before.ctime_ns or by_link)


def _key(source: AnyFile, inodes: tuple[_Inode, ...]) -> Hashable:
    """Name what a digest is of: a file by its inode, a composed one by what it is made of, one that
    lies elsewhere by itself."""
    return inodes[0].content if isinstance(source, Path) else (source,)


def _inodes(source: AnyFile) -> tuple[_Inode, ...] | None:
    """Look at every file here that it is made of; None where one is not there, or elsewhere is no
    longer the one that was listed."""
    found: list[_Inode] = []
    for path in files_behind(source):
        try:
            if not isinstance(path, Path):
                if not path.is_unchanged():
                    return None
                continue
            one = path.stat()
        except (OSError, InvalidCheckpointError):
            return None
        times = one.st_mtime_ns, one.st_ctime_ns
        found.append(_Inode(one.st_dev, one.st_ino, one.st_size, *times, one.st_nlink))
    return tuple(found)
