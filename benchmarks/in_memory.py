"""Ratio and speed of several ways over the same tensors, in turn, in one process.

    python -m benchmarks.in_memory DATA WAY… [--seed 0] [--repetitions 5] [--quick]

DATA is the title of a recipe or a directory that `benchmarks.training` wrote. Prints JSON: CPU
seconds of each repetition of each way, all its threads together. A repetition encodes, then decodes
what was encoded; the result is compared with the new tensors bit for bit, and a difference ends the
run. The first round only warms up.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import checkpoints
from benchmarks.checkpoints import Change
from benchmarks.peers import Plain, Sparse, Vendor, Way
from hotload.checkpoint.safetensors import PREFIX_BYTES, ShardHeader, header_size, read_header
from hotload.delta.byte_io import InMemory


class Buffer:
    """Memory of a fixed size that the codec reads and writes (`hotload.delta.byte_io.Writable`)."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = data

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.data.data[offset : offset + len(view)]

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.data.data[offset : offset + len(data)] = data

    def truncate(self, size_bytes: int) -> None:
        self.data = self.data[:size_bytes]


class Ours:
    """`arc_v2` of this project, tensor by tensor in memory, as the plain way is handed them."""

    def __init__(self, changes: Sequence[Change], writer: str) -> None:
        from hotload import delta
        from hotload.delta.envelope import ARC_V2
        from hotload.delta.frame import FrameMethod

        self._codec, self._writer, self._envelope = delta, FrameMethod(writer), ARC_V2
        self._pairs = [
            (one.name, one.old.reshape(-1).view(np.uint8), one.new.reshape(-1).view(np.uint8))
            for one in changes
        ]
        self._base = opened(checkpoints.image(changes, "old"))
        self._frames: dict[str, tuple[bytes, int]] = {}
        self._restored = np.empty(self._base[0].size_bytes, np.uint8)

    def encode(self) -> int:
        self._frames = {
            name: self._codec.encode_tensor(old.data, new.data, writer=self._writer)
            for name, old, new in self._pairs
        }
        return sum(len(frame) for frame, _ in self._frames.values())

    def decode(self) -> list[npt.NDArray[Any]]:
        base, head = self._base
        payloads = {
            name: self._codec.Payload(
                InMemory(frame), "delta", 0, len(frame), f"{adler32:08x}", self._envelope
            )
            for name, (frame, adler32) in self._frames.items()
        }
        self._codec.apply_shard(base, head, payloads, Buffer(self._restored), with_sha256=False)
        tensors = self._restored[head.data_start :]
        return [tensors[tensor.start : tensor.end] for tensor in head.tensors]


def opened(image: npt.NDArray[np.uint8]) -> tuple[Buffer, ShardHeader]:
    prefix, size_bytes = image[:PREFIX_BYTES].tobytes(), len(image)
    head = image[: header_size(prefix, file="", size_bytes=size_bytes)].tobytes()
    return Buffer(image), read_header(head, file="", size_bytes=size_bytes)


WAYS: dict[str, Callable[[Sequence[Change]], Way]] = {
    "XOR + zstd 1": Plain,
    "XOR + zstd 3": partial(Plain, level=3),
    "index + value": Sparse,
    "vendor's package": Vendor,
    "hotload, sequences": partial(Ours, writer="sequences"),
    "hotload, zstd 1": partial(Ours, writer="zstd level 1"),
}
PLAIN = "XOR + zstd 1"


def measure(changes: list[Change], ways: Sequence[str], repetitions: int) -> dict[str, Any]:
    """What each way made of the changes."""
    made = {title: WAYS[title](changes) for title in ways}
    told: dict[str, Any] = {title: {"bytes": 0, "encode": [], "decode": []} for title in ways}
    for round_number in range(repetitions + 1):
        for title, way in made.items():
            began = time.process_time()
            size_bytes = way.encode()
            encoded = time.process_time()
            restored = way.decode()
            decoded = time.process_time()
            for change, tensor in zip(changes, restored, strict=True):
                if not np.array_equal(tensor.view(np.uint8), change.new.reshape(-1).view(np.uint8)):
                    raise SystemExit(f"{title} restored other bytes in {change.name}")
                tensor.fill(0)  # so that the next round cannot pass by this one's work
            if round_number:
                told[title]["bytes"] = size_bytes
                told[title]["encode"].append(encoded - began)
                told[title]["decode"].append(decoded - encoded)
    return {
        "size_bytes": sum(one.new.nbytes for one in changes),
        "changed_percent": checkpoints.changed_percent(changes),
        "ways": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("ways", nargs="+", choices=WAYS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.data in checkpoints.RECIPES:
        changes = checkpoints.make(options.data, seed=options.seed, is_quick=options.quick)
    else:
        changes = checkpoints.read(Path(options.data))
    print(json.dumps(measure(changes, options.ways, options.repetitions)))


if __name__ == "__main__":
    main()
