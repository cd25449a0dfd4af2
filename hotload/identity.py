"""Identities: the names of snapshots, with their run and policy version (wire-format §8)."""

from __future__ import annotations

import hashlib
import json
import re
from enum import StrEnum
from typing import NamedTuple

from hotload.errors import InvalidIdentityError

IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
LINES_LIMIT = 1000
"""Lines of a run are numbered below this."""
RESERVED = frozenset({"latest", "initial", "identities.json"})


class SnapshotKind(StrEnum):
    """How a snapshot's bytes are to be read."""

    FULL = "full"
    DELTA = "delta"
    LORA = "lora"


def check_identity(identity: str) -> str:
    """Return the identity, if it is one path segment every receiver accepts (wire-format §8).

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
    """Tell whether `check_identity` would let `text` pass."""
    return bool(IDENTITY.fullmatch(text)) and text not in RESERVED and not text.endswith(".tmp")


def version_text(policy_version: int, line: int = 0) -> str:
    """Spell a version of a line as names have it: `000003`, and `000003.1` of line 1."""
    return f"{policy_version:06d}.{line}" if line else f"{policy_version:06d}"


def cycle_name(run_id: str, policy_version: int, line: int = 0) -> str:
    """Make `<run>-<version:06d>`, with `.<line>` behind it for other lines than 0: the name a
    trainer knows a checkpoint by, and the key of its cycle.

    Raises:
        InvalidIdentityError: the run id could not begin an identity, or there is no such line.
    """
    if not 0 <= line < LINES_LIMIT:
        raise InvalidIdentityError(run_id, f"line: expected 0 to {LINES_LIMIT - 1}, not {line}")
    if not RUN_ID.fullmatch(run_id):
        reason = "run_id: expected 1-96 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
        raise InvalidIdentityError(run_id, reason)
    return check_identity(f"{run_id}-{version_text(policy_version, line)}")


class NamedVersion(NamedTuple):
    """The run, the line and the policy version that a name says.

    In the order in which a run publishes: all of a line comes after all of the lines before it.
    """

    run_id: str
    line: int
    policy_version: int


_CYCLE = re.compile(r"(?s:(.+))-([0-9]{6,9})(?:\.([1-9][0-9]{0,2}))?")


def read_cycle_name(name: str) -> NamedVersion | None:
    """Read what `cycle_name` made; None for any other name.

    No run id is mistaken for a line's: what follows the last dash is the version, and has a dot
    only where a line is named.
    """
    found = _CYCLE.fullmatch(name)
    return NamedVersion(found[1], int(found[3] or 0), int(found[2])) if found else None


def read_identity(identity: str) -> NamedVersion | None:
    """Read what `snapshot_identity` made; None for a name that is not ours."""
    name, _, suffix = identity.rpartition("-")
    return read_cycle_name(name) if re.fullmatch(r"[0-9a-f]{8}", suffix) else None


def snapshot_identity(
    run_id: str,
    policy_version: int,
    *,
    content_sha256: str,
    kind: SnapshotKind,
    previous: str | None,
    attempt: int,
    line: int = 0,
) -> str:
    """Make `<cycle name>-<8 hex>`, the hex from content, kind, previous and attempt
    (wire-format §8).

    The same for a resumed upload, another after any failure (`attempt` counts from 0).

    Raises:
        InvalidIdentityError: the run id could not begin an identity.
    """
    name = cycle_name(run_id, policy_version, line)
    return _named_by(name, [content_sha256, kind.value, previous, attempt])


def ranks_identity(name: str, *, previous: str, attempt: int) -> str:
    """Make the identity of a delta that several ranks write for the cycle `name`: none of them
    knows the whole content while it uploads, so the hex is from previous and attempt.

    Raises:
        InvalidIdentityError: as `snapshot_identity`.
    """
    return _named_by(name, ["ranks", previous, attempt])


def _named_by(name: str, facts: list[object]) -> str:
    suffix = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return check_identity(f"{name}-{suffix}")


def version_of(identity: str, run_id: str | None = None) -> int | None:
    """Read the policy version out of an identity of this run, or of any; None for others."""
    named = read_identity(identity)
    return named.policy_version if named and run_id in (None, named.run_id) else None


def line_of(identity: str) -> int:
    """Read the line out of an identity; 0 for a name that is not ours, as of an adopted base."""
    named = read_identity(identity)
    return named.line if named else 0


def slug(text: str) -> str:
    """Spell a name as Prefect's artifacts and blocks may be called: a-z, 0-9 and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cycle_of(identity: str) -> str | None:
    """Name the cycle that made an identity; None for a name that is not ours."""
    return identity.rpartition("-")[0] if read_identity(identity) is not None else None


def is_of_run(identity: str, other: str) -> bool:
    """Tell whether both identities name versions of one run, of whichever lines."""
    one, two = read_identity(identity), read_identity(other)
    return one is not None and two is not None and one.run_id == two.run_id
