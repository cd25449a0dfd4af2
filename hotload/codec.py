"""`arc_v2`: lossless deltas between two shards, XOR then zstd (wire-format §1, §2, §4).

A delta shard has the file name and every tensor of its base shard. The payload of a tensor is one
zstd frame over `target XOR base`, stored as a `U8` vector; the frame states its content size and
nothing follows it. `__metadata__` maps each tensor to the decimal Adler-32 of its target bytes.

Nothing here opens a file: shards come in as `Readable`, outputs as binary files opened "w+b". Work
goes in pieces of 1 MiB, so memory does not grow with a tensor. An output is whole only once the
function that writes it has returned; `hotload.local` throws it away otherwise.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
import zstandard

from hotload.errors import ChecksumMismatchError, DeltaError, LayoutMismatchError
from hotload.layout import check_delta_shard, shard_drift
from hotload.shards import DTYPE_BITS, ShardHeader, TensorInfo, render_header
from hotload.zstd_frame import LEVEL, Array, Bytes, read_frame, write_frame
from hotload.zstd_frame import InMemory as InMemory
from hotload.zstd_frame import Readable as Readable
from hotload.zstd_frame import read_bytes as read_bytes

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """One tensor of a delta; elements are of its own dtype, or bytes where that is packed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    frame_size_bytes: int
    adler32: int
    element_count: int
    changed_element_count: int


@dataclass(frozen=True, slots=True)
class DeltaStats:
    """What one encode read and wrote.

    `size_bytes` and `sha256` are the delta's. `content_*` belong to the shard that applying it to
    the base restores: header of the base, tensors of the target. `base_sha256` and `target_sha256`
    are the two files as they were read; `content_sha256` equals `target_sha256` unless their
    headers differ.
    """

    size_bytes: int
    sha256: str
    content_size_bytes: int
    content_sha256: str
    base_sha256: str
    target_sha256: str
    tensors: tuple[TensorDelta, ...]

    @property
    def element_count(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.element_count for tensor in self.tensors)

    @property
    def changed_element_count(self) -> int:
        """Elements whose bytes differ between base and target."""
        return sum(tensor.changed_element_count for tensor in self.tensors)


def encode_tensor(base: Bytes, target: Bytes, *, level: int = LEVEL) -> tuple[bytes, int]:
    """The frame that turns `base` into `target`, and the Adler-32 of `target` (wire-format §1).

    Raises:
        LayoutMismatchError: the two differ in size.
    """
    if len(base) != len(target):
        raise LayoutMismatchError(f"a tensor of {len(base)} bytes became one of {len(target)}")
    difference = np.frombuffer(base, np.uint8) ^ np.frombuffer(target, np.uint8)
    out = BytesIO()
    write_frame([difference], len(target), out, zstandard.ZstdCompressor(level=level))
    return out.getvalue(), zlib.adler32(target)


def decode_tensor(base: Bytes, frame: Bytes, *, adler32: int, subject: str) -> bytes:
    """The bytes `frame` makes of `base`; `subject` names the tensor in errors.

    Raises:
        DeltaError: not exactly one frame of the size of `base`.
        ChecksumMismatchError: the result has another Adler-32 than `adler32`.
    """
    restored = np.frombuffer(base, np.uint8).copy()
    buffer = np.empty(min(PIECE_BYTES, len(base)), np.uint8)
    at = 0
    for piece in read_frame(InMemory(frame), 0, len(frame), len(base), buffer, subject):
        restored[at : at + len(piece)] ^= piece
        at += len(piece)
    _check_adler32(subject, str(adler32), zlib.adler32(restored.data))
    return restored.tobytes()


def encode_shard(
    base: Readable,
    base_header: ShardHeader,
    target: Readable,
    target_header: ShardHeader,
    out: BinaryIO,
    *,
    level: int = LEVEL,
) -> DeltaStats:
    """Write the delta shard that turns `base` into `target`, and tell its sizes and digests.

    Payloads come first, behind room for the longest possible header; the header is written last.
    Every byte of both shards is read once and summed on the way, so that the caller sees whether
    either changed since it last looked.

    Raises:
        LayoutMismatchError: tensors, dtypes, shapes or their order differ.
    """
    if reason := shard_drift(base_header, target_header):
        raise LayoutMismatchError(reason)
    compressor = zstandard.ZstdCompressor(level=level)
    room = _head_limit(base_header.tensors)
    out.seek(room)
    tensors: list[TensorDelta] = []
    with ThreadPoolExecutor(1, "sha256") as pool:
        old, new = _Summed(base, base_header, pool), _Summed(target, target_header, pool)
        content = new.digest if old.head == new.head else new.add_digest(old.head)
        for tensor in base_header.tensors:
            tally = _Tally(tensor)
            differences = _differences(old, new, tensor, tally)
            frame_size = write_frame(differences, tensor.size_bytes, out, compressor)
            tensors.append(tally.total(frame_size))
        base_sha256, target_sha256 = old.digest.hexdigest(), new.digest.hexdigest()
        content_sha256 = content.hexdigest()
    size_bytes, sha256 = _close_up(out, room, _delta_head(tensors))
    return DeltaStats(
        size_bytes=size_bytes,
        sha256=sha256,
        content_size_bytes=base_header.size_bytes,
        content_sha256=content_sha256,
        base_sha256=base_sha256,
        target_sha256=target_sha256,
        tensors=tuple(tensors),
    )


def apply_shard(
    base: Readable,
    base_header: ShardHeader,
    delta: Readable,
    delta_header: ShardHeader,
    out: BinaryIO,
) -> str:
    """Write the shard a delta makes of `base`, and tell its SHA-256.

    The header is the base's, byte for byte: the result equals the encoder's target where the two
    had equal headers, and in every tensor otherwise. A tensor's checksum is known when its last
    byte is written, so on an error `out` holds a part that must be thrown away.

    Raises:
        DeltaError: keys, payloads or frames are not those of a delta on `base`.
        ChecksumMismatchError: a tensor decodes to other bytes than were encoded, as on a wrong
        base.
    """
    with ThreadPoolExecutor(1, "sha256") as pool:
        digest = _Digest(pool)
        head = read_bytes(base, 0, base_header.data_start)
        digest.update(head)
        out.write(head)
        for _, piece in _restored(base, base_header, delta, delta_header):
            digest.update(piece.data)
            out.write(piece.data)
        return digest.hexdigest()


def verify_shard(
    base: Readable,
    base_header: ShardHeader,
    delta: Readable,
    delta_header: ShardHeader,
    target: Readable,
    target_header: ShardHeader,
) -> None:
    """Return if the delta makes of `base` every tensor of `target`, bit for bit (wire-format §6).

    Raises:
        LayoutMismatchError: base and target differ in more than values.
        DeltaError: the delta cannot be applied, or restores other bytes.
        ChecksumMismatchError: a tensor decodes to other bytes than were encoded.
    """
    if reason := shard_drift(base_header, target_header):
        raise LayoutMismatchError(reason)
    expected = np.empty(PIECE_BYTES, np.uint8)
    for offset, piece in _restored(base, base_header, delta, delta_header):
        view = expected[: len(piece)]
        target.read_into(target_header.data_start + offset, view.data)
        if not np.array_equal(view, piece):
            raise DeltaError(delta_header.file, "restores other bytes than those of the target")


class _Digest:
    """A SHA-256 taken in another thread while its caller works on with the same bytes.

    `update` waits for the bytes of the update before it, so two buffers in turn are enough.
    """

    def __init__(self, pool: Executor) -> None:
        self._sha256 = hashlib.sha256()
        self._pool = pool
        self._pending: Future[None] | None = None

    def update(self, data: Bytes) -> None:
        self.wait()
        self._pending = self._pool.submit(self._sha256.update, data)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def hexdigest(self) -> str:
        self.wait()
        return self._sha256.hexdigest()


class _Summed:
    """A shard read from front to back, every byte summed; one buffer that each read overwrites."""

    def __init__(self, shard: Readable, header: ShardHeader, pool: Executor) -> None:
        self._shard, self._data_start, self._pool = shard, header.data_start, pool
        self._buffer = np.empty(PIECE_BYTES, np.uint8)
        self._digests: list[_Digest] = []
        self.head = read_bytes(shard, 0, header.data_start)
        self.digest = self.add_digest(self.head)

    def add_digest(self, head: bytes) -> _Digest:
        """A digest over `head` and everything read from now on."""
        digest = _Digest(self._pool)
        digest.update(head)
        self._digests.append(digest)
        return digest

    def read(self, offset: int, size: int) -> Array:
        for digest in self._digests:
            digest.wait()
        view = self._buffer[:size]
        self._shard.read_into(self._data_start + offset, view.data)
        for digest in self._digests:
            digest.update(view.data)
        return view


class _Tally:
    """What is counted while a tensor streams by."""

    def __init__(self, tensor: TensorInfo) -> None:
        self._tensor = tensor
        self._element = np.dtype(f"u{DTYPE_BITS[tensor.dtype] // 8 or 1}")
        self._adler32, self._changed = 1, 0

    def add(self, target: Array, difference: Array) -> None:
        self._adler32 = zlib.adler32(target.data, self._adler32)
        self._changed += int(np.count_nonzero(difference.view(self._element)))

    def total(self, frame_size_bytes: int) -> TensorDelta:
        tensor = self._tensor
        return TensorDelta(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            size_bytes=tensor.size_bytes,
            frame_size_bytes=frame_size_bytes,
            adler32=self._adler32,
            element_count=tensor.size_bytes // self._element.itemsize,
            changed_element_count=self._changed,
        )


def _differences(old: _Summed, new: _Summed, tensor: TensorInfo, tally: _Tally) -> Iterator[Array]:
    """The XOR of a tensor, piece by piece; each is overwritten when the next is asked for."""
    scratch = np.empty(min(PIECE_BYTES, tensor.size_bytes), np.uint8)
    for start in range(tensor.start, tensor.end, PIECE_BYTES):
        size = min(PIECE_BYTES, tensor.end - start)
        target = new.read(start, size)
        difference = np.bitwise_xor(old.read(start, size), target, out=scratch[:size])
        tally.add(target, difference)
        yield difference


def _restored(
    base: Readable, base_header: ShardHeader, delta: Readable, delta_header: ShardHeader
) -> Iterator[tuple[int, Array]]:
    """(offset from the end of the header, target bytes) in file order; each tensor checked at its
    end.

    A piece stays valid until the second one after it is asked for.
    """
    for finding in check_delta_shard(delta_header, base_header):
        raise DeltaError(delta_header.file, str(finding))
    buffer, *turns = (np.empty(PIECE_BYTES, np.uint8) for _ in range(3))
    for tensor in base_header.tensors:
        subject = f"{delta_header.file}: {tensor.name}"
        frame = delta_header.by_name[tensor.name]
        start, end = delta_header.data_start + frame.start, delta_header.data_start + frame.end
        adler32, offset = 1, tensor.start
        for difference in read_frame(delta, start, end, tensor.size_bytes, buffer, subject):
            turns.reverse()
            piece = turns[0][: len(difference)]
            base.read_into(base_header.data_start + offset, piece.data)
            piece ^= difference
            adler32 = zlib.adler32(piece.data, adler32)
            yield offset, piece
            offset += len(piece)
        _check_adler32(subject, delta_header.metadata[tensor.name], adler32)


def _check_adler32(subject: str, expected: str, found: int) -> None:
    if expected != str(found):
        raise ChecksumMismatchError(subject, expected, str(found))


def _delta_head(tensors: Iterable[TensorDelta]) -> bytes:
    end = 0
    entries, metadata = [], {}
    for tensor in tensors:
        start, end = end, end + tensor.frame_size_bytes
        entries.append(TensorInfo(tensor.name, "U8", (end - start,), start, end))
        metadata[tensor.name] = str(tensor.adler32)
    return render_header(entries, metadata)


def _head_limit(tensors: Sequence[TensorInfo]) -> int:
    """No delta of these tensors has a longer head: all its numbers have their most digits."""
    end = sum(2 * tensor.size_bytes + 1024 for tensor in tensors)  # far above zstd's own bound
    entries = [TensorInfo(tensor.name, "U8", (end,), end, end) for tensor in tensors]
    return len(render_header(entries, {tensor.name: str(2**32 - 1) for tensor in tensors}))


def _close_up(out: BinaryIO, room: int, head: bytes) -> tuple[int, str]:
    """Size and SHA-256 of the file once `head` stands right before the payloads that begin at
    `room`."""
    digest = hashlib.sha256(head)
    out.seek(0)
    out.write(head)
    to = len(head)
    while True:
        out.seek(to + room - len(head))
        piece = out.read(PIECE_BYTES)
        if not piece:
            break
        digest.update(piece)
        out.seek(to)
        to += out.write(piece)
    out.truncate(to)
    return to, digest.hexdigest()
