"""From two shards to a delta: read, XOR, scan, sum and compress every byte once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from threading import local

import numpy as np

from hotload.checkpoint.safetensors import DTYPE_BITS, ShardHeader, TensorInfo
from hotload.delta.byte_io import Bytes, Readable, Writable, read_bytes
from hotload.delta.checksums import (
    ADLER32_OF_NOTHING,
    Checksum,
    adler32,
    join_adler32,
    start_checksum,
)
from hotload.delta.envelope import ARC_V2, Envelope, delta_head, shard_obstacle
from hotload.delta.frame import (
    PIECE_BYTES,
    FrameMethod,
    FrameWriter,
    best_method,
    method_for,
    pack_piece,
)
from hotload.delta.libzstd import ByteArray
from hotload.delta.ordered_threads import Turnstile, Workers, run_in_order
from hotload.delta.shard_writer import DeltaFile
from hotload.errors import LayoutMismatchError

SPAN_BYTES = 2 * PIECE_BYTES  # what a thread takes at a time

_SCRATCH = local()  # of a thread, not of a shard: several shards share the threads


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """One tensor of a delta; elements are of its own dtype, or bytes where that is packed.

    One that was left out, since it did not change, has a frame of no bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    frame_size_bytes: int
    checksum: str
    element_count: int
    changed_element_count: int

    @property
    def is_unchanged(self) -> bool:
        """Whether base and target are equal."""
        return self.changed_element_count == 0


@dataclass(frozen=True, slots=True)
class DeltaStats:
    """What one encode read and wrote.

    `size_bytes` and `sha256` are the delta's. `content_*` belong to the shard that applying it to
    the base restores: header of the base, tensors of the target. `target_sha256` is the target file
    as it was read, and equals `content_sha256` unless the two headers differ. A SHA-256 nobody
    asked for is "".
    """

    size_bytes: int
    sha256: str
    content_size_bytes: int
    content_sha256: str
    target_sha256: str
    tensors: tuple[TensorDelta, ...]

    @property
    def has_changed(self) -> bool:
        """Whether base and target differ in any tensor."""
        return not all(tensor.is_unchanged for tensor in self.tensors)

    @property
    def element_count(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.element_count for tensor in self.tensors)

    @property
    def changed_element_count(self) -> int:
        """Elements whose bytes differ between base and target."""
        return sum(tensor.changed_element_count for tensor in self.tensors)


def encode_tensor(
    base: Bytes, target: Bytes, *, writer: FrameMethod | None = None
) -> tuple[bytes, int]:
    """Encode the frame that turns `base` into `target`, and sum the Adler-32 of `target`
    (wire-format §1).

    Raises:
        LayoutMismatchError: the two differ in size.
    """
    size = len(target)
    if len(base) != size:
        raise LayoutMismatchError(f"a tensor of {len(base)} bytes became one of {size}")
    old, new = np.frombuffer(base, np.uint8), np.frombuffer(target, np.uint8)
    room = np.empty(min(size, PIECE_BYTES), np.uint8)
    pieces = (
        (old[at : at + PIECE_BYTES], new[at : at + PIECE_BYTES], room[: size - at])
        for at in range(0, size, PIECE_BYTES)
    )
    chunks: list[Bytes] = []
    writer = method_for(size, writer or best_method())
    frame = FrameWriter(size, chunks.append, writer=writer)
    span = _pack(pieces, size, writer, is_end=True)
    for packed, piece_bytes in span.pieces:
        frame.add(packed, piece_bytes)
    frame.end()
    return b"".join(chunks), span.adler32


def encode_shard(
    base: Readable,
    base_header: ShardHeader,
    target: Readable,
    target_header: ShardHeader,
    out: Writable,
    *,
    envelope: Envelope = ARC_V2,
    pool: Workers | None = None,
    with_sha256: bool = True,
    target_sha256: str | None = None,
    on_bytes: Callable[[int], object] | None = None,
    writer: FrameMethod | None = None,
    self_check: bool = False,
) -> DeltaStats:
    """Write the delta shard that turns `base` into `target`, and tell its sizes and digests.

    Payloads come first, behind room for the longest possible header; the header is written last.
    Every byte of both shards is read once; `with_sha256` the target is summed on the way, so that
    the caller sees whether it changed since it was last looked at, unless its `target_sha256` is
    known. `on_bytes` hears of the tensor bytes done. With `self_check` every frame is decoded again
    while the bytes that went into it are still held; what the disk keeps of it afterwards, its own
    SHA-256 tells.

    Raises:
        LayoutMismatchError: tensors, dtypes, shapes or their order differ.
        DeltaError: `self_check` was asked for, and a frame does not decode to what went into it.
    """
    if reason := shard_obstacle(base_header, target_header):
        raise LayoutMismatchError(reason)
    writer = writer or best_method()
    reader = _Reader(base, base_header.data_start, target, target_header.data_start, self_check)
    base_head = read_bytes(base, 0, base_header.data_start)
    target_head = read_bytes(target, 0, target_header.data_start)
    known = {target_head: target_sha256} if target_sha256 else {}
    sums = _Sums(envelope.checksum, (base_head, target_head) if with_sha256 else (), known)
    room = _head_limit(base_header.tensors, envelope)
    file = DeltaFile(out, room)
    tensors: list[TensorDelta] = []
    jobs = (
        partial(reader.encode, tensor, span, sums, method_for(tensor.size_bytes, writer))
        for tensor in base_header.tensors
        for span in _spans(tensor)
    )
    with closing(run_in_order(jobs, pool, sums.turns)) as results:
        for tensor in base_header.tensors:
            open_tensor = _OpenTensor(tensor, file.append, envelope, writer, self_check)
            for span in _spans(tensor):
                open_tensor.add(next(results))
                if on_bytes:
                    on_bytes(len(span))
            tensors.append(open_tensor.end())
    kept = [tensor for tensor in tensors if tensor.frame_size_bytes]
    head = delta_head(
        {tensor.name: tensor.frame_size_bytes for tensor in kept},
        {tensor.name: tensor.checksum for tensor in kept},
        envelope,
    )
    size_bytes = file.close(head)
    return DeltaStats(
        size_bytes=size_bytes,
        sha256=_sha256(out, size_bytes) if with_sha256 else "",
        content_size_bytes=base_header.size_bytes,
        content_sha256=sums.sha256(base_head),
        target_sha256=sums.sha256(target_head),
        tensors=tuple(tensors),
    )


@dataclass(frozen=True, slots=True)
class _Span:
    """A run of a tensor, packed; `checksum` is the whole tensor's, where its last span knows it."""

    pieces: list[tuple[bytes | None, int]]
    size_bytes: int
    changed_element_count: int
    adler32: int
    checksum: str = ""


class _Reader:
    """Two shards read span by span, in any thread."""

    def __init__(
        self,
        base: Readable,
        base_start: int,
        target: Readable,
        target_start: int,
        self_check: bool,
    ) -> None:
        self._base, self._base_start = base, base_start
        self._target, self._target_start = target, target_start
        self._self_check = self_check

    def encode(self, tensor: TensorInfo, span: range, sums: _Sums, writer: FrameMethod) -> _Span:
        """Read, pack and sum a span of a tensor, counted from the end of the header."""
        old, new = self._buffers()
        is_end = span.stop == tensor.end
        pieces = self._pieces(span, old, new, keep=sums.are_needed)
        packed = _pack(
            pieces,
            len(span),
            writer,
            is_end=is_end,
            element=_element(tensor),
            self_check=self._self_check,
        )
        checksum = sums.add(tensor, span, new[: len(span)].data)
        return replace(packed, checksum=checksum) if checksum else packed

    def _pieces(
        self, span: range, old: ByteArray, new: ByteArray, *, keep: bool
    ) -> Iterator[tuple[ByteArray, ByteArray, ByteArray]]:
        """Base, target and room for their difference, which may be the base's; `keep` leaves the
        target's pieces in `new` one after the other.
        """
        for at in range(span.start, span.stop, PIECE_BYTES):
            size = min(PIECE_BYTES, span.stop - at)
            begin = at - span.start if keep else 0
            base, target = old[:size], new[begin : begin + size]
            self._base.read_into(self._base_start + at, base.data)
            self._target.read_into(self._target_start + at, target.data)
            yield base, target, base

    def _buffers(self) -> tuple[ByteArray, ByteArray]:
        """A piece of the base and a span of the target: this thread's, so that no span pays for
        fresh memory.
        """
        if not hasattr(_SCRATCH, "buffers"):
            sizes = (PIECE_BYTES, SPAN_BYTES)
            _SCRATCH.buffers = tuple(np.empty(size, np.uint8) for size in sizes)
        return _SCRATCH.buffers


class _Sums:
    """Sums that need the target's bytes in their order: SHA-256 of files, checksums of tensors.

    A file here is one of the given heads and all tensors of the target behind it; those that are
    known are not summed. Adler-32 is not among them: it can be joined.
    """

    def __init__(
        self, algorithm: Checksum, heads: Iterable[bytes], known: Mapping[bytes, str]
    ) -> None:
        self.turns = Turnstile()
        self._known = known
        self._files = {head: hashlib.sha256(head) for head in heads if head not in known}
        self._algorithm = algorithm
        self._tensor = start_checksum(algorithm)
        self.are_needed = bool(self._files) or algorithm is not Checksum.ADLER32

    def add(self, tensor: TensorInfo, span: range, data: memoryview) -> str:
        """Take a span when its turn has come; the tensor's checksum, if this is its last one."""
        if not self.are_needed:
            return ""
        with self.turns.at(span.start, len(span)):
            for digest in self._files.values():
                digest.update(data)
            if self._algorithm is Checksum.ADLER32:
                return ""
            if span.start == tensor.start:
                self._tensor = start_checksum(self._algorithm)
            self._tensor.update(data)
            return self._tensor.hexdigest() if span.stop == tensor.end else ""

    def sha256(self, head: bytes) -> str:
        """Of the file behind `head`."""
        known = self._known.get(head, "")
        return self._files[head].hexdigest() if head in self._files else known


class _OpenTensor:
    """A tensor whose spans arrive one by one."""

    def __init__(
        self,
        tensor: TensorInfo,
        write: Callable[[Bytes], object],
        envelope: Envelope,
        writer: FrameMethod,
        self_check: bool,
    ) -> None:
        self._tensor, self._envelope = tensor, envelope
        frame_writer = method_for(tensor.size_bytes, writer)
        self._frame = FrameWriter(
            tensor.size_bytes, write, writer=frame_writer, self_check=self_check
        )
        self._checksum = start_checksum(envelope.checksum).hexdigest()
        self._adler32, self._changed_element_count = ADLER32_OF_NOTHING, 0

    def add(self, span: _Span) -> None:
        for packed, size_bytes in span.pieces:
            self._frame.add(packed, size_bytes)
        self._changed_element_count += span.changed_element_count
        self._adler32 = join_adler32(self._adler32, span.adler32, span.size_bytes)
        is_adler32 = self._envelope.checksum is Checksum.ADLER32
        self._checksum = f"{self._adler32:08x}" if is_adler32 else span.checksum

    def end(self) -> TensorDelta:
        tensor = self._tensor
        return TensorDelta(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            size_bytes=tensor.size_bytes,
            frame_size_bytes=self._frame.end(keep_zeros=self._envelope.has_every_tensor),
            checksum=self._checksum,
            element_count=tensor.size_bytes // _element(tensor).itemsize,
            changed_element_count=self._changed_element_count,
        )


def _pack(
    pieces: Iterable[tuple[ByteArray, ByteArray, ByteArray]],
    size_bytes: int,
    writer: FrameMethod,
    *,
    is_end: bool,
    element: np.dtype[np.unsignedinteger] | None = None,
    self_check: bool = False,
) -> _Span:
    """One pass over memory, piece by piece as they stay in a cache: XOR, checksum, scan, compress.

    A piece is (base, target, room for the difference); `is_end` says that the last one ends its
    tensor. Changed elements are counted where `element` says what one is.
    """
    packed: list[tuple[bytes | None, int]] = []
    changed, checksum, reached = 0, ADLER32_OF_NOTHING, 0
    for base, target, room in pieces:
        reached += len(target)
        difference = np.bitwise_xor(base, target, out=room)
        checksum = adler32(target.data, checksum)
        is_last = is_end and reached == size_bytes
        blocks = pack_piece(difference, writer=writer, is_last=is_last, self_check=self_check)
        if blocks is not None and element is not None:
            changed += int(np.count_nonzero(difference.view(element)))
        packed.append((blocks, len(target)))
    return _Span(packed, size_bytes, changed, checksum)


def _spans(tensor: TensorInfo) -> Iterator[range]:
    for at in range(tensor.start, tensor.end, SPAN_BYTES):
        yield range(at, min(at + SPAN_BYTES, tensor.end))


def _element(tensor: TensorInfo) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"u{DTYPE_BITS[tensor.dtype] // 8 or 1}")


def _head_limit(tensors: Sequence[TensorInfo], envelope: Envelope) -> int:
    """No delta of these tensors has a longer head: all its numbers have their most digits."""
    longest = "f" * envelope.checksum.digits
    # Twice its size and more is far above zstd's own bound for a frame.
    frames = {tensor.name: 2 * tensor.size_bytes + 1024 for tensor in tensors}
    return len(delta_head(frames, dict.fromkeys(frames, longest), envelope))


def _sha256(source: Readable, size_bytes: int) -> str:
    digest = hashlib.sha256()
    for at in range(0, size_bytes, PIECE_BYTES):
        digest.update(read_bytes(source, at, min(PIECE_BYTES, size_bytes - at)))
    return digest.hexdigest()
