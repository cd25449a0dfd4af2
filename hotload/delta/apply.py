"""From a base and a delta to the next shard, every tensor checked before it is trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np

from hotload.checkpoint.safetensors import ShardHeader, TensorInfo
from hotload.delta.byte_io import Bytes, InMemory, Readable, Writable, read_bytes
from hotload.delta.checksums import start_checksum
from hotload.delta.envelope import ARC_V2, Envelope, check_payload, shard_obstacle
from hotload.delta.frame import PIECE_BYTES, is_zero_frame, read_frame
from hotload.delta.libzstd import ByteArray
from hotload.delta.ordered_threads import Turnstile, Workers, run_in_order
from hotload.errors import ChecksumMismatchError, DeltaError, LayoutMismatchError


@dataclass(frozen=True, slots=True)
class Payload:
    """Where the frame of a tensor lies in a delta shard, and what its target bytes sum to."""

    source: Readable
    file: str
    start: int
    end: int
    checksum: str
    envelope: Envelope


def payloads(
    delta: Readable, header: ShardHeader, envelope: Envelope = ARC_V2
) -> dict[str, Payload]:
    """Find the payloads of a delta shard, by tensor name.

    Raises:
        DeltaError: the header is not one of a delta in this envelope.
    """
    found = {}
    for tensor in header.tensors:
        for finding in check_payload(header, tensor, envelope):
            raise DeltaError(finding.where, finding.summary)
        at = header.data_start
        checksum = envelope.parse(header.metadata.get(tensor.name)) or ""
        found[tensor.name] = Payload(
            delta, header.file, at + tensor.start, at + tensor.end, checksum, envelope
        )
    return found


def decode_tensor(base: Bytes, frame: Bytes, *, adler32: int, subject: str) -> bytearray:
    """Decode `frame` on `base`; `subject` names the tensor in errors.

    Raises:
        DeltaError: not exactly one frame of the size of `base`.
        ChecksumMismatchError: the result has another Adler-32 than `adler32`.
    """
    tensor = TensorInfo(subject, "U8", (len(base),), 0, len(base))
    payload = Payload(InMemory(frame), "", 0, len(frame), f"{adler32:08x}", ARC_V2)
    restored = bytearray(len(base))
    view = memoryview(restored)
    for offset, piece in _restored(InMemory(base), 0, tensor, payload, subject):
        view[offset : offset + len(piece)] = piece.data
    return restored


def apply_shard(
    base: Readable,
    base_header: ShardHeader,
    payloads: Mapping[str, Payload],
    out: Writable,
    *,
    pool: Workers | None = None,
    with_sha256: bool = True,
    on_bytes: Callable[[int], object] | None = None,
) -> str:
    """Write the shard that payloads make of `base`, and tell its SHA-256 if asked for.

    The header is the base's, byte for byte: the result equals the encoder's target where the two
    had equal headers, and in every tensor otherwise. A tensor without a payload is copied; whether
    that may be is for the caller to say. A tensor's checksum is known when its last byte is
    written, so on an error `out` holds a part that must be thrown away. `on_bytes` hears of the
    tensor bytes done, from any thread.

    Raises:
        DeltaError: a payload for no tensor of the base, or not one frame of its size.
        ChecksumMismatchError: a tensor decodes to other bytes than were encoded, as on a wrong
        base.
    """
    for name in payloads.keys() - base_header.by_name.keys():
        raise DeltaError(payloads[name].file, f"a payload for {name!r}, which is not in the base")
    data_start = base_header.data_start
    head = read_bytes(base, 0, data_start)
    out.write_at(0, head)
    follower = _Follower(out, data_start, hashlib.sha256(head)) if with_sha256 else None
    turns = Turnstile()

    def restore(tensor: TensorInfo) -> None:
        payload = payloads.get(tensor.name)
        subject = f"{payload.file if payload else base_header.file}: {tensor.name}"
        for offset, piece in _restored(base, data_start, tensor, payload, subject):
            turns.check()
            out.write_at(data_start + offset, piece.data)
            if on_bytes:
                on_bytes(len(piece))
        if follower:
            follower.finished(data_start + tensor.start, data_start + tensor.end)

    jobs = (partial(restore, tensor) for tensor in base_header.tensors)
    with closing(run_in_order(jobs, pool, turns)) as results:
        for _ in results:
            pass
    return follower.hexdigest() if follower else ""


def verify_shard(
    base: Readable,
    base_header: ShardHeader,
    payloads: Mapping[str, Payload],
    target: Readable,
    target_header: ShardHeader,
    *,
    pool: Workers | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Return if the payloads make of `base` every tensor of `target`, bit for bit (wire-format §6).

    Raises:
        LayoutMismatchError: base and target differ in more than values.
        DeltaError: the delta cannot be applied, or restores other bytes.
        ChecksumMismatchError: a tensor decodes to other bytes than were encoded.
    """
    if reason := shard_obstacle(base_header, target_header):
        raise LayoutMismatchError(reason)
    turns = Turnstile()

    def compare(tensor: TensorInfo) -> None:
        payload = payloads.get(tensor.name)
        subject = f"{payload.file if payload else base_header.file}: {tensor.name}"
        expected = np.empty(min(PIECE_BYTES, tensor.size_bytes), np.uint8)
        for offset, piece in _restored(base, base_header.data_start, tensor, payload, subject):
            turns.check()
            view = expected[: len(piece)]
            target.read_into(target_header.data_start + offset, view.data)
            if not np.array_equal(view, piece):
                raise DeltaError(subject, "restores other bytes than those of the target")
            if on_bytes:
                on_bytes(len(piece))

    jobs = (partial(compare, tensor) for tensor in base_header.tensors)
    with closing(run_in_order(jobs, pool, turns)) as results:
        for _ in results:
            pass


class _Follower:
    """Sums a file that threads write tensor by tensor, as far as it is whole from the front."""

    def __init__(self, out: Readable, position: int, digest: hashlib._Hash) -> None:
        self._out, self._position, self._digest = out, position, digest
        self._ends: dict[int, int] = {}
        self._lock = Lock()
        self._is_busy = False

    def finished(self, start: int, end: int) -> None:
        """These bytes are written; whoever comes first sums all that follow one another."""
        with self._lock:
            if start < end:
                self._ends[start] = end
            if self._is_busy:
                return
            self._is_busy = True
        while True:
            with self._lock:
                begin = self._position
                stop = self._ends.pop(begin, begin)
                if begin == stop:
                    self._is_busy = False
                    return
            for at in range(begin, stop, PIECE_BYTES):
                self._digest.update(read_bytes(self._out, at, min(PIECE_BYTES, stop - at)))
            self._position = stop

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _restored(
    base: Readable, data_start: int, tensor: TensorInfo, payload: Payload | None, subject: str
) -> Iterator[tuple[int, ByteArray]]:
    """(offset from the end of the header, target bytes) piece by piece; checked at the end.

    A piece is overwritten when the next is asked for.
    """
    size = tensor.size_bytes
    room = min(PIECE_BYTES, size)
    pieces = (
        None
        if payload is None or is_zero_frame(payload.source, payload.start, payload.end, size)
        else read_frame(
            payload.source, payload.start, payload.end, size, np.empty(room, np.uint8), subject
        )
    )
    running = start_checksum(payload.envelope.checksum) if payload else None
    restored = np.empty(room, np.uint8)
    for offset in range(tensor.start, tensor.end, PIECE_BYTES):
        piece = restored[: tensor.end - offset]
        base.read_into(data_start + offset, piece.data)
        if pieces is not None:
            piece ^= next(pieces)
        if running:
            running.update(piece.data)
        yield offset, piece
    for _ in pieces or ():
        pass  # the frame's end is looked at, too
    if payload and running and running.hexdigest() != payload.checksum:
        spell = payload.envelope.spell
        raise ChecksumMismatchError(subject, spell(payload.checksum), spell(running.hexdigest()))
