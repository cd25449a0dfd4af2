"""Bytes at positions: what the codec reads and writes instead of files."""

from __future__ import annotations

from typing import Protocol

Bytes = bytes | bytearray | memoryview


class Readable(Protocol):
    """Bytes at positions: a file on disk, or `InMemory`. Any thread may read."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on, or raise."""
        ...


class Writable(Readable, Protocol):
    """An output that may be written in any order, and read again. Any thread may write."""

    def write_at(self, offset: int, data: Bytes) -> None:
        """Put all of `data` at `offset`."""
        ...

    def truncate(self, size_bytes: int) -> None:
        """End the output there."""
        ...


class InMemory:
    """A `Readable` over bytes somebody already holds."""

    def __init__(self, data: Bytes) -> None:
        self._data = memoryview(data).cast("B")

    @property
    def size_bytes(self) -> int:
        """Bytes there are."""
        return len(self._data)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view.

        Raises:
            ValueError: it reaches past the end.
        """
        view[:] = self._data[offset : offset + len(view)]


def read_bytes(source: Readable, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset` on."""
    data = bytearray(size)
    source.read_into(offset, memoryview(data))
    return bytes(data)
