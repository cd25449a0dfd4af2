"""k consecutive deltas as one, without the checkpoints between them (wire-format §1).

"XORs compose: delta(a→c) = delta(a→b) XOR delta(b→c) before compression." Of the checksums the
last delta's stays, since they are over target bytes. Frames are decoded piece by piece, side by
side, so memory grows with the number of deltas and not with a tensor; a tensor that changed in one
of them only is copied as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hotload.delta.apply import Payload
from hotload.delta.byte_io import Writable
from hotload.delta.convert import copy_frame, is_unchanged
from hotload.delta.envelope import Envelope, delta_head
from hotload.delta.frame import (
    PIECE_BYTES,
    FrameWriter,
    best_method,
    content_size,
    method_for,
    pack_piece,
    read_frame,
)
from hotload.delta.libzstd import ByteArray
from hotload.delta.ordered_threads import OnBytes
from hotload.delta.shard_writer import DeltaFile
from hotload.errors import DeltaError


def fold_shard(
    links: Sequence[Mapping[str, Payload]],
    out: Writable,
    envelope: Envelope,
    *,
    on_bytes: OnBytes,
) -> tuple[str, ...]:
    """Write the delta shard that does what these do one after the other, and name its tensors.

    A link holds payloads by tensor name, the earliest link first. Where the envelope leaves
    unchanged tensors out, a link may lack some, and none of the answer's may remain. `on_bytes`
    hears of payload bytes done, those of all links.

    Raises:
        DeltaError: the links hold other tensors or sizes than one another, do not follow one
        another, or a frame does not decode.
    """
    chains = _chains(links, envelope)
    checksums = {name: chain[-1].checksum for name, chain in chains.items()}
    sizes = {name: _content_size(name, chain) for name, chain in chains.items()}
    # No frame that is written or copied here is longer.
    limits = {name: 2 * size + 1024 + _total(chains[name]) for name, size in sizes.items()}
    file = DeltaFile(out, len(delta_head(limits, checksums, envelope)))
    frames: dict[str, int] = {}
    for name, chain in chains.items():
        size = _fold_tensor(name, chain, sizes[name], file, envelope, on_bytes)
        if size:
            frames[name] = size
    file.close(delta_head(frames, checksums, envelope))
    return tuple(frames)


def _chains(links: Sequence[Mapping[str, Payload]], envelope: Envelope) -> dict[str, list[Payload]]:
    """The payloads of each tensor in the order of the links."""
    chains: dict[str, list[Payload]] = {}
    for link in links:
        for name, payload in link.items():
            chains.setdefault(name, []).append(payload)
    for name, chain in chains.items():
        if envelope.has_every_tensor and len(chain) < len(links):
            reason = f"in {len(chain)} of {len(links)} deltas; each has to hold every tensor"
            raise DeltaError(f"{chain[0].file}: {name}", reason)
    return chains


def _content_size(name: str, chain: Sequence[Payload]) -> int:
    """The tensor's size, of which every frame has to be."""
    found = [content_size(one.source, one.start, one.end, f"{one.file}: {name}") for one in chain]
    if len(set(found)) > 1:
        sizes = ", ".join(str(size) for size in found)
        raise DeltaError(f"{chain[0].file}: {name}", f"the deltas state other sizes: {sizes}")
    return found[0]


def _fold_tensor(
    name: str,
    chain: Sequence[Payload],
    size_bytes: int,
    file: DeltaFile,
    envelope: Envelope,
    on_bytes: OnBytes,
) -> int:
    """Append the tensor's frame, and tell its bytes: 0 where it is left out."""
    changes = _changes(name, chain)
    if not changes and envelope.has_every_tensor:
        changes = [chain[-1]]  # a frame of zeros
    if len(changes) > 1:
        size = _append_xor(name, changes, size_bytes, file, envelope.has_every_tensor, on_bytes)
    else:
        size = _total(changes)
        for payload in changes:
            copy_frame(payload, file.append, on_bytes)
    on_bytes(_total(chain) - _total(changes))
    return size


def _changes(name: str, chain: Sequence[Payload]) -> list[Payload]:
    """Those of the chain that change the tensor."""
    changes: list[Payload] = []
    before: Payload | None = None
    for payload in chain:
        if not is_unchanged(payload):
            changes.append(payload)
        elif before and before.checksum != payload.checksum:
            # All that gives away a wrong order where no index tells the lineage.
            found = f"unchanged at {payload.checksum}, but {before.checksum} before that"
            raise DeltaError(f"{payload.file}: {name}", f"{found}: not consecutive deltas")
        before = payload
    return changes


def _append_xor(
    name: str,
    changes: Sequence[Payload],
    size_bytes: int,
    file: DeltaFile,
    keep_zeros: bool,
    on_bytes: OnBytes,
) -> int:
    writer = method_for(size_bytes, best_method())
    frame = FrameWriter(size_bytes, file.append, writer=writer)
    payload_bytes = _total(changes)
    reached, reported = 0, 0
    for piece in _folded(name, changes, size_bytes):
        reached += len(piece)
        frame.add(pack_piece(piece, writer=writer, is_last=reached == size_bytes), len(piece))
        done = payload_bytes * reached // size_bytes
        on_bytes(done - reported)
        reported = done
    return frame.end(keep_zeros=keep_zeros)


def _folded(name: str, changes: Sequence[Payload], size_bytes: int) -> Iterator[ByteArray]:
    """The XOR of all that the frames hold, in pieces; each is overwritten by the next."""
    total = np.empty(min(PIECE_BYTES, size_bytes), np.uint8)
    streams = [
        read_frame(
            payload.source,
            payload.start,
            payload.end,
            size_bytes,
            np.empty_like(total),
            f"{payload.file}: {name}",
        )
        for payload in changes
    ]
    for first, second, *others in zip(*streams, strict=True):
        piece = np.bitwise_xor(first, second, out=total[: len(first)])
        for other in others:
            piece ^= other
        yield piece


def _total(payloads: Sequence[Payload]) -> int:
    return sum(payload.end - payload.start for payload in payloads)
