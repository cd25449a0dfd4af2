"""Reading a rank's own copy of the shards it hands over, into memory or into files of its own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from hotload.clients.publish.served_shard import ServedShard
from hotload.delta.frame import PIECE_BYTES
from hotload.delta.libzstd import ByteArray
from hotload.directory.files import AnyFile
from hotload.directory.relayout import view_checkpoint
from hotload.directory.shards import open_shard, read_checkpoint


def read_copy(
    checkpoint: Path, files: Collection[str] = (), *, directory: Path | None = None
) -> dict[str, ServedShard]:
    """Read the copy from the checkpoint that is served, in whatever layout it is.

    Args:
        files: names of the shards as they are served. Empty takes all.
        directory: where to keep them as files that are mapped; without it they are held in memory.

    Raises:
        InvalidCheckpointError: it cannot be read, or has no such shard.
    """
    view = view_checkpoint(checkpoint)
    names = files or [shard.file for shard in view.checkpoint.shards]
    return {name: _copy_of(view.file(name), name, directory) for name in names}


def map_copy(directory: Path) -> dict[str, ServedShard]:
    """Map the copy that `read_copy` kept in a directory, in a process that was started again.

    Raises:
        InvalidCheckpointError: it cannot be read.
    """
    files = [shard.file for shard in read_checkpoint(directory).shards]
    return {file: ServedShard(file, np.memmap(directory / file)) for file in files}


def _copy_of(source: AnyFile, name: str, directory: Path | None) -> ServedShard:
    with open_shard(source) as shard:
        data: ByteArray
        if directory is None:
            data = np.empty(shard.size_bytes, np.uint8)
        else:
            data = np.memmap(directory / name, mode="w+", shape=shard.size_bytes)
        for at in range(0, shard.size_bytes, PIECE_BYTES):
            shard.read_into(at, data[at : at + PIECE_BYTES].data)
    return ServedShard(name, data)
