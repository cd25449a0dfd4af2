"""How others make and apply deltas: what this codec is measured against.

A way is handed all tensors when it is made, encodes them (bytes of the payloads), and decodes its
own payloads on the old tensors: restored tensors, each checked as its format can, in memory that is
there already. Whether they are the new ones, bit for bit, is for the caller to see. Arrays in
between are whole tensors, as their authors write it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zstandard

from benchmarks.checkpoints import Change


class Way(Protocol):
    """One way to make a delta, over one list of changes."""

    def encode(self) -> int:
        """Make and keep the payloads, and tell their bytes."""
        ...

    def decode(self) -> Sequence[npt.NDArray[Any]]:
        """The tensors that the payloads make of the old ones, in order."""
        ...


class Plain:
    """XOR, zstd level 1 in one frame per tensor, zlib's Adler-32: slime, SkyRL, ModelExpress."""

    def __init__(self, changes: Sequence[Change], level: int = 1) -> None:
        self._pairs = [_bytes_of(one) for one in changes]
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._decompressor = zstandard.ZstdDecompressor()
        self._payloads: list[tuple[bytes, int]] = []
        self._restored = [np.empty_like(new) for _, new in self._pairs]

    def encode(self) -> int:
        self._payloads = [
            (self._compressor.compress(np.bitwise_xor(old, new).data), zlib.adler32(new.data))
            for old, new in self._pairs
        ]
        return sum(len(frame) for frame, _ in self._payloads)

    def decode(self) -> list[npt.NDArray[Any]]:
        for (old, _), (frame, adler32), new in zip(
            self._pairs, self._payloads, self._restored, strict=True
        ):
            difference = np.frombuffer(self._decompressor.decompress(frame), np.uint8)
            np.bitwise_xor(old, difference, out=new)
            if zlib.adler32(new.data) != adler32:
                raise SystemExit("the plain way restored other bytes")
        return self._restored


class Sparse:
    """The positions of the elements that changed and their new values, as TRL sends them.

    No checksum and no compression, as there.
    """

    def __init__(self, changes: Sequence[Change]) -> None:
        self._pairs = [(one.old.reshape(-1), one.new.reshape(-1)) for one in changes]
        self._payloads: list[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]] = []
        self._restored = [np.empty_like(new) for _, new in self._pairs]

    def encode(self) -> int:
        self._payloads = []
        for old, new in self._pairs:
            index = np.flatnonzero(old != new).astype(np.int32)
            self._payloads.append((index, new[index]))
        return sum(index.nbytes + values.nbytes for index, values in self._payloads)

    def decode(self) -> list[npt.NDArray[Any]]:
        for (old, _), (index, values), new in zip(
            self._pairs, self._payloads, self._restored, strict=True
        ):
            np.copyto(new, old)
            new[index] = values
        return self._restored


class Vendor:
    """`fireworks-delta-compression`, tensors of torch, format `arc_v2`."""

    def __init__(self, changes: Sequence[Change]) -> None:
        import fireworks_delta_compression as package  # type: ignore[import-not-found]
        import torch

        torch.set_num_threads(1)
        self._package = package
        pairs = (_bytes_of(one) for one in changes)  # its own first step is to look at bytes
        self._pairs = [(torch.from_numpy(old), torch.from_numpy(new)) for old, new in pairs]
        self._payloads: list[tuple[Any, str]] = []

    def encode(self) -> int:
        self._payloads = [
            self._package.delta_compress(src=old, dst=new, compression_format="arc_v2")
            for old, new in self._pairs
        ]
        return sum(int(frame.numel()) for frame, _ in self._payloads)

    def decode(self) -> list[npt.NDArray[Any]]:
        return [
            self._package.delta_decompress(
                src=old, compressed_diff=frame, checksum=checksum, compression_format="arc_v2"
            ).numpy()
            for (old, _), (frame, checksum) in zip(self._pairs, self._payloads, strict=True)
        ]


def _bytes_of(change: Change) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    return change.old.reshape(-1).view(np.uint8), change.new.reshape(-1).view(np.uint8)
