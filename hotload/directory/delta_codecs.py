"""Deltas as a snapshot's manifest names them: what stands around the payloads, and their index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from hotload.checkpoint.names import INDEX_FILE
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Dialect, Lineage, envelope_of, render_index
from hotload.delta.envelope import ARC_V2, Envelope
from hotload.directory.files import write_atomic
from hotload.directory.shards import open_delta_shard
from hotload.publish.doors.api_dialect import DeltaCodec
from hotload.records import FileDigest

ENVELOPES: Mapping[DeltaCodec, Envelope] = {
    "arc_v2": ARC_V2,
    "coreweave": envelope_of(Dialect.COREWEAVE),
}


def write_delta_index(directory: Path, lineage: Lineage, files: Iterable[str]) -> FileDigest:
    """Write the index of the delta shards in `directory`, which says what they follow.

    Raises:
        DeltaError: one of the shards cannot be read.
    """
    weight_map: dict[str, str] = {}
    for file in files:
        with open_delta_shard(directory / file) as shard:
            weight_map |= dict.fromkeys(shard.header.by_name, file)
    data = render_index(lineage, Checksum.ADLER32, weight_map)
    write_atomic(directory / INDEX_FILE, data)
    digest = hashlib.sha256(data).hexdigest()
    return FileDigest(file=INDEX_FILE, size_bytes=len(data), sha256=digest)
