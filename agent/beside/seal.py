"""A record in a held checkpoint of what its files are: it tells a whole one from a torn one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hotload.directory.files import sha256_file, write_atomic
from hotload.errors import InvalidCheckpointError

SEAL_FILE = ".hotload.json"


def seal(directory: Path, digests: Mapping[str, str]) -> None:
    """Record the SHA-256 of every file; written after all of them."""
    write_atomic(directory / SEAL_FILE, json.dumps(dict(digests)).encode())


def read_seal(directory: Path) -> dict[str, str] | None:
    """Read the digests, if every file still has the one that was recorded; reads all of them."""
    try:
        recorded = json.loads((directory / SEAL_FILE).read_bytes())
        is_whole = all(sha256_file(directory / name) == sha for name, sha in recorded.items())
    except (OSError, ValueError, AttributeError, InvalidCheckpointError):
        return None
    return recorded if is_whole else None
