"""Names and records of snapshots: what we publish, under which identity, following what.

Snapshot values are written once. The manifest in the store is the only record of what was
published; it is written after everything it names (design, rule 2), so a reader may rely on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from math import ceil
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hotload.errors import InvalidIdentityError, StoreError

MANIFEST_LIMIT_BYTES = 64 << 20
IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
RESERVED = frozenset({"latest", "initial", "identities.json"})
INDEX_FILE = "model.safetensors.index.json"
SPEC_FILE = "model.weight.spec.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^/\\\x00-\x1f]+$")]


class SnapshotKind(StrEnum):
    """How a snapshot's bytes are to be read."""

    FULL = "full"
    DELTA = "delta"
    LORA = "lora"


def check_identity(identity: str) -> str:
    """The identity itself, if it is one path segment every receiver accepts (wire-format §8).

    Raises:
        InvalidIdentityError: it has a slash, `@`, a reserved name, or is too long.
    """
    if not IDENTITY.fullmatch(identity):
        reason = "expected 1-128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
        raise InvalidIdentityError(identity, reason)
    if identity in RESERVED or identity.endswith(".tmp"):
        raise InvalidIdentityError(identity, "the name is reserved")
    return identity


def is_identity(text: str) -> bool:
    """Whether `check_identity` would let `text` pass."""
    return bool(IDENTITY.fullmatch(text)) and text not in RESERVED and not text.endswith(".tmp")


def cycle_name(run_id: str, policy_version: int) -> str:
    """`<run>-<version:06d>`: the name a trainer knows a checkpoint by, and the key of its cycle.

    Raises:
        InvalidIdentityError: the run id could not begin an identity.
    """
    if not RUN_ID.fullmatch(run_id):
        reason = "run_id: expected 1-96 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
        raise InvalidIdentityError(run_id, reason)
    return check_identity(f"{run_id}-{policy_version:06d}")


def snapshot_identity(
    run_id: str,
    policy_version: int,
    *,
    content_sha256: str,
    kind: SnapshotKind,
    previous: str | None,
    attempt: int,
) -> str:
    """`<run>-<version:06d>-<8 hex>`, the hex from content, kind, previous and attempt (wire-format
    §8).

    The same for a resumed upload, another after any failure (`attempt` counts from 0).

    Raises:
        InvalidIdentityError: the run id could not begin an identity.
    """
    facts = json.dumps([content_sha256, kind.value, previous, attempt])
    suffix = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return check_identity(f"{cycle_name(run_id, policy_version)}-{suffix}")


def version_of(identity: str, run_id: str | None = None) -> int | None:
    """The policy version that an identity names, of this run or of any; `None` for what is no such
    identity.
    """
    run = ".+" if run_id is None else re.escape(run_id)
    found = re.fullmatch(rf"{run}-(\d{{6,9}})-[0-9a-f]{{8}}", identity)
    return int(found[1]) if found else None


def is_of_run(identity: str, other: str) -> bool:
    """Whether both identities name versions of one run."""
    parts = [each.rsplit("-", 2) for each in (identity, other)]
    is_named = version_of(identity) is not None and version_of(other) is not None
    return is_named and parts[0][0] == parts[1][0]


class Record(BaseModel):
    """A frozen value that is also parsed from outside JSON; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse_stored(cls, data: bytes, path: str) -> Self:
        """The record in `data`, which was read at `path`.

        Raises:
            StoreError: it is none; names the first field that is wrong.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            found = error.errors(include_input=False, include_url=False)[0]
            where = [".".join(map(str, found["loc"]))] if found["loc"] else []
            noun = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
            raise StoreError(path, ": ".join([f"not a {noun}", *where, found["msg"]])) from None


class FileDigest(Record):
    """One file of a checkpoint or snapshot: name, size in bytes, SHA-256 of its bytes."""

    file: FileName
    size_bytes: int = Field(ge=0)
    sha256: Sha256


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
