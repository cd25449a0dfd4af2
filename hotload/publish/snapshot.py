"""Names and records of snapshots: what we publish, under which identity, following what.

Snapshot values are written once. The manifest in the store is the only record of what was
published; it is written after everything it names (design, rule 2), so a reader may rely on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import ceil
from typing import Literal, Self

from pydantic import Field, model_validator

from hotload.errors import StoreError
from hotload.identity import SnapshotKind, check_identity
from hotload.records import FileDigest, FileName, Record, Sha256

MANIFEST_LIMIT_BYTES = 64 << 20


class Shard(Record):
    """One safetensors file as stored, and the full shard it stands for; sizes in bytes.

    For a full snapshot the two are the same file.
    """

    file: FileName
    size_bytes: int = Field(ge=0)
    sha256: Sha256
    content_size_bytes: int = Field(ge=0)
    content_sha256: Sha256


class SnapshotManifest(Record):
    """What was published under one identity: lineage, files, digests. Written last, never
    changed."""

    schema_number: Literal[1] = 1
    identity: str
    run_id: str
    policy_version: int = Field(ge=0)
    kind: SnapshotKind
    previous: str | None
    anchor: str
    chain_length: int = Field(ge=0)
    attempt: int = Field(ge=0)
    reason: str
    content_sha256: Sha256
    codec: Literal["arc_v2", "none"]
    checksum: Literal["adler32", "none"]
    shards: tuple[Shard, ...]
    side_files: tuple[FileDigest, ...]
    created_at: datetime

    @model_validator(mode="after")
    def _lineage(self) -> Self:
        for name in (self.identity, self.anchor, *([self.previous] if self.previous else [])):
            check_identity(name)
        is_delta = self.kind is SnapshotKind.DELTA
        if is_delta != (self.previous is not None) or is_delta != (self.codec == "arc_v2"):
            raise ValueError("a delta, and only a delta, has a previous identity and a codec")
        if is_delta != (self.chain_length > 0) or (self.anchor == self.identity) == is_delta:
            raise ValueError("an anchor is its own anchor at chain length 0; a delta follows one")
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes that travelled: shards and side files as stored."""
        return sum(shard.size_bytes for shard in self.shards) + sum(
            side_file.size_bytes for side_file in self.side_files
        )

    @property
    def content_size_bytes(self) -> int:
        """Bytes of the checkpoint it stands for, shards only."""
        return sum(shard.content_size_bytes for shard in self.shards)

    def render(self) -> bytes:
        """The manifest as JSON, stable field order; `parse` reads it back."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, *, identity: str) -> SnapshotManifest:
        """The manifest in `data`, which must be the one of `identity`.

        Raises:
            StoreError: not a manifest, or that of another identity.
        """
        manifest = cls.parse_stored(data, f"manifest of {identity}")
        if manifest.identity != identity:
            raise StoreError(f"manifest of {identity}", f"names {manifest.identity!r}")
        return manifest


class CheckpointContent(Record):
    """The files of a checkpoint as the trainer wrote it, with their digests; no tensor bytes."""

    kind: Literal[SnapshotKind.FULL, SnapshotKind.LORA]
    shards: tuple[FileDigest, ...]
    side_files: tuple[FileDigest, ...]
    warnings: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """One digest over all files: names the content, not the directory."""
        files = (*self.shards, *self.side_files)
        return content_sha256({file.file: file.sha256 for file in files})

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """What to publish next and why; carried out by a task."""

    kind: SnapshotKind
    identity: str
    previous: str | None
    anchor: str
    chain_length: int
    attempt: int
    reason: str


def content_sha256(files: dict[str, str]) -> str:
    """One digest over a checkpoint: SHA-256 of its sorted (file, SHA-256) pairs."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def batches(shards: Sequence[FileDigest], limit: int) -> list[tuple[FileDigest, ...]]:
    """The shards in order, in at most `limit` batches of about equal count; none for no shards."""
    size = max(1, ceil(len(shards) / limit))
    return [tuple(shards[start : start + size]) for start in range(0, len(shards), size)]
