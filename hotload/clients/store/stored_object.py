"""One object as a store lists it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object: its path below the store, its size in bytes, and when it was last written."""

    path: str
    size_bytes: int
    modified_at: datetime
