"""Names and records of snapshots: what we publish, under which identity, following what.

Snapshot values are written once. The manifest in the store is the only record of what was
published; it is written after everything it names (design, rule 2), so a reader may rely on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from math import ceil
from typing import Literal, Self

from pydantic import Field, model_validator

from hotload.errors import StoreError
from hotload.identity import SnapshotKind, check_identity, line_of
from hotload.publish.doors.api_dialect import DeltaCodec
from hotload.records import FileDigest, FileName, Record, Sha256, schema_number_of

MANIFEST_LIMIT_BYTES = 64 << 20


class Shard(Record):
    """One safetensors file as stored, and the full shard it stands for; sizes in bytes.

    For a full snapshot the two are the same file. Of no bytes is a delta that changes nothing,
    where deltas hold changed tensors alone: such a file is not stored.
    """

    file: FileName
    size_bytes: int = Field(ge=0)
    sha256: Sha256
    content_size_bytes: int = Field(ge=0)
    content_sha256: Sha256


class ShardBatch(Record):
    """Shards that travel together, and the seconds spent on them so far, wherever that was done."""

    shards: tuple[Shard, ...]
    encode_seconds: float = Field(0, ge=0)
    upload_seconds: float = Field(0, ge=0)
    hint_count: int = Field(0, ge=0)

    @classmethod
    def as_written(cls, files: Sequence[FileDigest]) -> ShardBatch:
        """Make the batch of a full snapshot, whose shards are stored as the trainer wrote them."""
        shards = (
            Shard(
                file=file.file,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                content_size_bytes=file.size_bytes,
                content_sha256=file.sha256,
            )
            for file in files
        )
        return cls(shards=tuple(shards))


class Foreseen(Record):
    """What a delta on a base would be: an obstacle to it, or else the bytes of its shards."""

    obstacle: str | None = None
    delta_bytes: int = Field(0, ge=0)


class SnapshotPlan(Record):
    """What to publish, following what, and why."""

    identity: str
    run_id: str
    policy_version: int = Field(ge=0)
    kind: SnapshotKind
    previous: str | None
    anchor: str
    chain_length: int = Field(ge=0)
    attempt: int = Field(ge=0)
    reason: str

    @property
    def line(self) -> int:
        """The line of the run, which the identity names; an adopted base is of line 0."""
        return line_of(self.identity)

    @model_validator(mode="after")
    def _lineage(self) -> Self:
        for name in (self.identity, self.anchor, *([self.previous] if self.previous else [])):
            check_identity(name)
        is_delta = self.kind is SnapshotKind.DELTA
        if is_delta != (self.previous is not None):
            raise ValueError("a delta, and only a delta, has a previous identity")
        if is_delta != (self.chain_length > 0) or (self.anchor == self.identity) == is_delta:
            raise ValueError("an anchor is its own anchor at chain length 0; a delta follows one")
        return self


def adopted_plan(identity: str, run_id: str, policy_version: int) -> SnapshotPlan:
    """Make the plan of a base that is served under a name of somebody else's: a chain's anchor.

    Raises:
        ValueError: the name is no identity.
    """
    return SnapshotPlan(
        identity=identity,
        run_id=run_id,
        policy_version=policy_version,
        kind=SnapshotKind.FULL,
        previous=None,
        anchor=identity,
        chain_length=0,
        attempt=0,
        reason="adopted: every replica serves it",
    )


class SnapshotManifest(SnapshotPlan):
    """A plan that was carried out, with its files and digests. Written last, never changed."""

    schema_number: Literal[1] = 1
    content_sha256: Sha256
    codec: Literal[DeltaCodec, "none"]
    checksum: Literal["adler32", "none"]
    shards: tuple[Shard, ...]
    side_files: tuple[FileDigest, ...]
    created_at: datetime
    delta_index: FileDigest | None = None
    """The index of a delta that says itself what it follows; its side files lie in the anchor."""

    @model_validator(mode="after")
    def _encoding(self) -> Self:
        if (self.kind is SnapshotKind.DELTA) != (self.codec != "none"):
            raise ValueError("a delta, and only a delta, has a codec")
        if (self.codec == "coreweave") != (self.delta_index is not None):
            raise ValueError("a delta with an index of its own, and no other, names it")
        return self

    @classmethod
    def of(
        cls,
        plan: SnapshotPlan,
        content: CheckpointContent,
        shards: Sequence[Shard],
        created_at: datetime,
        delta_index: FileDigest | None = None,
    ) -> SnapshotManifest:
        """Record `plan` as carried out: these shards, and the other files of the checkpoint."""
        is_delta = plan.kind is SnapshotKind.DELTA
        codec = "coreweave" if delta_index else "arc_v2"
        return cls(
            **dict(plan),
            content_sha256=content.sha256,
            delta_index=delta_index,
            codec=codec if is_delta else "none",
            checksum="adler32" if is_delta else "none",
            shards=tuple(sorted(shards, key=lambda shard: shard.file)),
            side_files=content.side_files,
            created_at=created_at,
        )

    @property
    def plan(self) -> SnapshotPlan:
        """The plan that was carried out."""
        return SnapshotPlan(**{name: getattr(self, name) for name in SnapshotPlan.model_fields})

    @property
    def content(self) -> CheckpointContent:
        """The checkpoint that it stands for."""
        return CheckpointContent.of_stored(self.shards, self.side_files)

    def is_of(self, content_sha256: str) -> bool:
        """Tell whether that is the digest of its content: as the trainer wrote it, or as it is
        restored, which has headers and files of `previous` where those mean the same."""
        return content_sha256 in (self.content_sha256, self.content.sha256)

    def shard(self, file: str) -> Shard | None:
        """Find a shard by its name."""
        return next((one for one in self.shards if one.file == file), None)

    @property
    def stored_files(self) -> tuple[Shard | FileDigest, ...]:
        """What lies in the store under its identity."""
        if self.delta_index is None:
            return (*self.shards, *self.side_files)
        return (*(shard for shard in self.shards if shard.size_bytes), self.delta_index)

    @property
    def side_files_at(self) -> str:
        """The identity that its side files lie under: all deltas of a chain have the anchor's."""
        return self.anchor if self.delta_index else self.identity

    @property
    def size_bytes(self) -> int:
        """Bytes that travelled: shards and side files as stored."""
        return sum(one.size_bytes for one in self.stored_files)

    @property
    def content_size_bytes(self) -> int:
        """Bytes of the checkpoint it stands for, shards only."""
        return sum(shard.content_size_bytes for shard in self.shards)

    def render(self) -> bytes:
        """Write the manifest as JSON, stable field order; `parse` reads it back."""
        unsaid = None if self.delta_index else {"delta_index"}  # programs before it read on
        return self.model_dump_json(indent=1, exclude=unsaid).encode()

    @classmethod
    def parse(cls, data: bytes, *, identity: str) -> SnapshotManifest:
        """Parse the manifest in `data`, which must be the one of `identity`.

        Raises:
            StoreError: not a manifest, or that of another identity.
        """
        manifest = cls.parse_stored(data, f"manifest of {identity}")
        if manifest.identity != identity:
            raise StoreError(f"manifest of {identity}", f"names {manifest.identity!r}")
        return manifest


def is_of_newer_version(data: bytes) -> bool:
    """Tell whether a manifest that cannot be read has a schema newer than this program's."""
    return schema_number_of(data) > KNOWN_SCHEMA


KNOWN_SCHEMA: int = SnapshotManifest.model_fields["schema_number"].default


class CheckpointContent(Record):
    """The files of a checkpoint as the trainer wrote it, with their digests; no tensor bytes."""

    kind: Literal[SnapshotKind.FULL, SnapshotKind.LORA]
    shards: tuple[FileDigest, ...]
    side_files: tuple[FileDigest, ...]
    warnings: tuple[str, ...] = ()
    adapted_model: str | None = None
    """What an adapter says that it was trained on."""

    @classmethod
    def of_stored(
        cls, shards: Sequence[Shard], side_files: tuple[FileDigest, ...]
    ) -> CheckpointContent:
        """Name the full checkpoint that stored shards stand for."""
        whole = (
            FileDigest(
                file=shard.file,
                size_bytes=shard.content_size_bytes,
                sha256=shard.content_sha256,
            )
            for shard in shards
        )
        return cls(kind=SnapshotKind.FULL, shards=tuple(whole), side_files=side_files)

    @property
    def sha256(self) -> str:
        """One digest over all files: names the content, not the directory."""
        files = (*self.shards, *self.side_files)
        return content_sha256({file.file: file.sha256 for file in files})

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)


def content_sha256(files: dict[str, str]) -> str:
    """Make one digest over a checkpoint: SHA-256 of its sorted (file, SHA-256) pairs."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def batches(shards: Sequence[FileDigest], limit: int) -> list[tuple[FileDigest, ...]]:
    """Split the shards, in order, into at most `limit` batches of about equal count."""
    size = max(1, ceil(len(shards) / limit))
    return [tuple(shards[start : start + size]) for start in range(0, len(shards), size)]
