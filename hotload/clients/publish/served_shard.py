"""A rank's own copy of a shard as it is served: the base of its deltas."""

from __future__ import annotations

import hashlib
from typing import NoReturn

import numpy as np

from hotload.checkpoint.safetensors import PREFIX_BYTES, header_size, read_header
from hotload.delta.apply import apply_shard, payloads
from hotload.delta.byte_io import Bytes, InMemory
from hotload.delta.libzstd import ByteArray
from hotload.delta.ordered_threads import Workers
from hotload.directory.files import refuse_file


class ServedShard:
    """The bytes of one shard as it is served, in memory or in a file that is mapped
    (`hotload.delta.byte_io.Writable`), and the delta of it that may be served next.

    It follows what is served by itself: a delta that was handed over is kept beside it, and applied
    once a later version follows that.
    """

    def __init__(self, file: str, data: ByteArray) -> None:
        """Take over `data`, u8 [bytes], and digest it.

        Raises:
            InvalidCheckpointError: it is no shard.
        """
        self._data = data
        self._next: tuple[bytes, str] | None = None
        self._read_header(file)
        self.sha256 = hashlib.sha256(data.data).hexdigest()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on."""
        room = np.frombuffer(view, np.uint8)
        room[:] = self._data[offset : offset + room.size]  # without the interpreter's lock

    def write_at(self, offset: int, data: Bytes) -> None:
        """Put all of `data` at `offset`."""
        self._data[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def truncate(self, size_bytes: int) -> None:
        """Do nothing: a shard keeps its size."""

    def note_next(self, delta: bytes, sha256: str) -> None:
        """Keep the delta that makes of this the shard with that SHA-256, until it is known to be
        served."""
        self._next = delta, sha256

    def is_led_to(self, sha256: str) -> bool:
        """Tell whether `follow` would make this the shard with that SHA-256."""
        return sha256 in (self.sha256, self._next and self._next[1])

    def follow(self, sha256: str, pool: Workers) -> None:
        """Make this the shard that is served: what it is, or what the delta noted last makes of it.

        Raises:
            InvalidCheckpointError: it is neither.
            DeltaError: the copy was damaged; it has to be read again.
        """
        if self._next and self._next[1] == sha256:
            delta = self._next[0]
            size = header_size(delta[:PREFIX_BYTES], file=self.header.file, size_bytes=len(delta))
            head = read_header(delta[:size], file=self.header.file, size_bytes=len(delta))
            self.sha256, self._next = "", None  # half a copy is nobody's
            apply_shard(
                self,
                self.header,
                payloads(InMemory(delta), head),
                self,
                pool=pool,
                with_sha256=False,
            )
            self.sha256 = sha256
        if self.sha256 != sha256:
            found = f"sha256 {self.sha256[:12]}…" if self.sha256 else "a damaged copy"
            self._refuse(found, sha256)

    def replace(self, data: bytes, sha256: str) -> None:
        """Make this the shard that is served, all of whose bytes are `data`.

        Raises:
            InvalidCheckpointError: it is larger or smaller than the copy.
        """
        if len(data) != len(self._data):
            self._refuse(f"{len(self._data)} bytes, not {len(data)}", sha256)
        self.sha256, self._next = "", None
        self.write_at(0, data)
        self._read_header(self.header.file)
        self.sha256 = sha256

    def _read_header(self, file: str) -> None:
        size_bytes = len(self._data)
        prefix = self._data[:PREFIX_BYTES].tobytes()
        self.head = self._data[: header_size(prefix, file=file, size_bytes=size_bytes)].tobytes()
        self.header = read_header(self.head, file=file, size_bytes=size_bytes)

    def _refuse(self, found: str, sha256: str) -> NoReturn:
        expected = f"sha256 {sha256[:12]}…, as served: read the copy again from that checkpoint"
        refuse_file("served_copy", self.header.file, found, expected)
