"""Identities: the names of snapshots, with their run and policy version (wire-format §8)."""

from __future__ import annotations

import hashlib
import json
import re
from enum import StrEnum

from hotload.errors import InvalidIdentityError

IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


RESERVED = frozenset({"latest", "initial", "identities.json"})


class SnapshotKind(StrEnum):
    """How a snapshot's bytes are to be read."""

    FULL = "full"
    DELTA = "delta"
    LORA = "lora"


def check_identity(identity: str) -> str:
    """Return the identity, if it is one path segment that every receiver accepts (wire-format §8).

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
    """Make `<run>-<version:06d>`: the trainer's name of a checkpoint, and the key of its cycle.

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
    """Make `<run>-<version:06d>-<8 hex>`, the hex from content, kind, previous and attempt
    (wire-format §8).

    The same for a resumed upload, another after any failure (`attempt` counts from 0).

    Raises:
        InvalidIdentityError: the run id could not begin an identity.
    """
    facts = json.dumps([content_sha256, kind.value, previous, attempt])
    suffix = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return check_identity(f"{cycle_name(run_id, policy_version)}-{suffix}")


def version_of(identity: str, run_id: str | None = None) -> int | None:
    """Read the policy version that an identity names, of this run or of any; `None` for what is no
    such identity.
    """
    run = ".+" if run_id is None else re.escape(run_id)
    found = re.fullmatch(rf"{run}-(\d{{6,9}})-[0-9a-f]{{8}}", identity)
    return int(found[1]) if found else None


def is_of_run(identity: str, other: str) -> bool:
    """Whether both identities name versions of one run."""
    parts = [each.rsplit("-", 2) for each in (identity, other)]
    is_named = version_of(identity) is not None and version_of(other) is not None
    return is_named and parts[0][0] == parts[1][0]
