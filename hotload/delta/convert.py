"""Payloads that exist already, put into another envelope: nothing is decoded (wire-format §9).

"Only the header differs; payload bytes are shared."
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import zstandard

from hotload.checkpoint.safetensors import ShardHeader
from hotload.delta.apply import Payload
from hotload.delta.byte_io import Bytes, InMemory, Readable, Writable, read_bytes
from hotload.delta.checksums import start_checksum
from hotload.delta.envelope import Envelope, delta_head
from hotload.delta.frame import (
    HEADER_LIMIT_BYTES,
    PIECE_BYTES,
    content_size,
    is_zero_frame,
    zero_frame,
)
from hotload.delta.shard_writer import DeltaFile


def is_unchanged(payload: Payload) -> bool:
    """Tell by its bytes whether this is the frame that we write for an unchanged tensor.

    Zeros in the frame of another encoder count as a change. That costs the frame's bytes and no
    more: receivers that want changed tensors only take others, too (wire-format §3).
    """
    head_bytes = min(HEADER_LIMIT_BYTES, payload.end - payload.start)
    try:
        head = zstandard.get_frame_parameters(read_bytes(payload.source, payload.start, head_bytes))
    except zstandard.ZstdError:
        return False
    return is_zero_frame(payload.source, payload.start, payload.end, head.content_size)


def changed_payloads(payloads: Mapping[str, Payload]) -> dict[str, Payload]:
    """Leave out the payloads that are unchanged."""
    return {name: payload for name, payload in payloads.items() if not is_unchanged(payload)}


def complete_payloads(
    payloads: Mapping[str, Payload],
    base: Readable,
    base_header: ShardHeader,
    envelope: Envelope,
    *,
    on_bytes: Callable[[int], object],
) -> dict[str, Payload]:
    """Give every tensor of a base shard a payload, in its order.

    Where there is none the tensor did not change: the frame is one of zeros, the checksum that of
    the base's bytes. `on_bytes` hears of the bytes read for that.

    Raises:
        DeltaError: a payload is not one whole frame of its tensor's size.
    """
    found: dict[str, Payload] = {}
    for tensor in base_header.tensors:
        size = tensor.size_bytes
        if payload := payloads.get(tensor.name):
            subject = f"{payload.file}: {tensor.name}"
            content_size(payload.source, payload.start, payload.end, subject, expected=size)
            found[tensor.name] = payload
            continue
        checksum = start_checksum(envelope.checksum)
        for at in range(0, size, PIECE_BYTES):
            offset = base_header.data_start + tensor.start + at
            checksum.update(read_bytes(base, offset, min(PIECE_BYTES, size - at)))
            on_bytes(min(PIECE_BYTES, size - at))
        frame = zero_frame(size)
        found[tensor.name] = Payload(
            InMemory(frame), base_header.file, 0, len(frame), checksum.hexdigest(), envelope
        )
    return found


def write_shard(
    payloads: Mapping[str, Payload],
    out: Writable,
    envelope: Envelope,
    *,
    on_bytes: Callable[[int], object],
) -> None:
    """Write the delta shard of these payloads, by tensor name and in this order.

    Their checksums have to be of the envelope's algorithm. `on_bytes` hears of payload bytes done.
    """
    frames = {name: payload.end - payload.start for name, payload in payloads.items()}
    checksums = {name: payload.checksum for name, payload in payloads.items()}
    head = delta_head(frames, checksums, envelope)
    file = DeltaFile(out, len(head))
    for payload in payloads.values():
        copy_frame(payload, file.append, on_bytes)
    file.close(head)


def copy_frame(
    payload: Payload, append: Callable[[Bytes], object], on_bytes: Callable[[int], object]
) -> None:
    """Append the payload's bytes."""
    for begin in range(payload.start, payload.end, PIECE_BYTES):
        piece = read_bytes(payload.source, begin, min(PIECE_BYTES, payload.end - begin))
        append(piece)
        on_bytes(len(piece))
