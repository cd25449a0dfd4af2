"""Checking what lies in a store by digest: every object against the manifest that names it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

from hotload.clients.store.records import SNAPSHOTS
from hotload.clients.store.store import Store
from hotload.concurrently import overlap
from hotload.errors import Finding, StoreError, StoreUnavailableError
from hotload.publish.snapshot import SnapshotManifest

PIECE_BYTES = 8 << 20
OBJECTS_AT_ONCE = 4
"""So many pieces are in memory at once, whatever the sizes of objects and bucket."""


async def verify_snapshot(
    store: Store, manifest: SnapshotManifest, advance: Callable[[int], None]
) -> list[Finding]:
    """Hold every object of a snapshot to the size and SHA-256 its manifest names.

    Args:
        advance: called with the bytes that were read since it was called before, or need not be.

    Returns:
        What is missing or differs, and, as warnings, objects that the manifest does not name.

    Raises:
        StoreError: the store refuses, or does not answer.
    """
    prefix = f"{manifest.identity}/"
    sizes = {
        one.path.removeprefix(prefix): one.size_bytes
        for one in await store.objects(manifest.identity)
    }
    gate = asyncio.Semaphore(OBJECTS_AT_ONCE)

    async def verify(file: str, size_bytes: int, digest: str) -> Finding | None:
        path = prefix + file
        found = sizes.pop(file, None)
        if found != size_bytes:
            advance(size_bytes)
            what = "no such object" if found is None else f"{found} bytes"
            rule = "missing_object" if found is None else "object_size"
            return Finding(rule, path, None, what, f"{size_bytes} bytes", "operator")
        async with gate:
            return await _verify_digest(store, path, size_bytes, digest, advance)

    stored = manifest.stored_files
    checked = await overlap(verify(one.file, one.size_bytes, one.sha256) for one in stored)
    strays = [
        Finding(
            "stray_object",
            prefix + file,
            None,
            f"{size_bytes} bytes",
            f"only objects that {SNAPSHOTS}/{manifest.identity}.json names",
            "operator",
            "warning",
        )
        for file, size_bytes in sorted(sizes.items())
    ]
    return [*(finding for finding in checked if finding is not None), *strays]


async def _verify_digest(
    store: Store, path: str, size_bytes: int, digest: str, advance: Callable[[int], None]
) -> Finding | None:
    running = hashlib.sha256()
    done = 0
    while done < size_bytes:
        try:
            piece = await store.read_piece(path, done, min(PIECE_BYTES, size_bytes - done))
        except StoreUnavailableError:
            raise
        except StoreError as error:
            advance(size_bytes - done)
            expected = f"{size_bytes} bytes that can be read"
            return Finding("unreadable_object", path, None, error.reason, expected, "operator")
        if not piece:
            break  # it became shorter; the digest shows it
        await asyncio.to_thread(running.update, piece)
        done += len(piece)
        advance(len(piece))
    if running.hexdigest() == digest:
        return None
    found, expected = f"SHA-256 {running.hexdigest()[:12]}…", f"SHA-256 {digest[:12]}…"
    return Finding("object_digest", path, None, found, expected, "operator")
