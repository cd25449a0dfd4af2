"""A replica's directory whose files may come from the agents beside it, and go to them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.beside.peers import Asking, Peers
from agent.loading.bucket import MissingObjectError, SnapshotBucket
from agent.loading.disk import Disk, Load
from hotload.clients.store.records import SNAPSHOTS
from hotload.concurrently import overlap
from hotload.errors import StoreError
from hotload.identity import SnapshotKind, is_identity
from hotload.publish.snapshot import SnapshotManifest
from hotload.records import FileDigest

READS_AT_ONCE = 2


class PeeredDisk(Disk):
    """Fetches what the publisher's record has a digest of from peers, the rest from the store.

    A file has its name once it is whole. What was fetched is offered to peers: the files of a full
    as long as it is held, those of a delta until the next load.
    """

    def __init__(
        self, directory: Path, bucket: SnapshotBucket, peers: Peers, *, workers: int = 1
    ) -> None:
        super().__init__(directory, bucket, workers=workers)
        self._peers = peers
        self._coming: tuple[str, frozenset[str]] = ("", frozenset())
        self._held_full: str | None = None
        self.on_news: Callable[[], object] = lambda: None
        """Called, in any thread, when a file is whole and when a snapshot begins to come."""

    def offered(self, identity: str, file: str) -> Path | None:
        """Find a file as it lies in the store, if it is whole here."""
        is_name = file[:1] not in (".", "_", "") and Path(file).name == file and len(file) < 256
        if not (is_name and is_identity(identity)):
            return None
        places = [self.arriving(identity)]
        if identity == self._held_full:
            places.append(self._directory / "held" / identity)
        return next((place / file for place in places if (place / file).is_file()), None)

    def is_coming(self, identity: str, file: str) -> bool:
        """Tell whether a file is being fetched, or is about to."""
        return self._coming[0] == identity and file in self._coming[1]

    def arriving(self, identity: str) -> Path:
        """Name the place where a snapshot arrives; what a delta was stays there until the next."""
        return self._directory / "arriving" / identity

    def keep(self, load: Load, arrived: Path) -> Path:
        """Make `arrived` what the replica holds under the identity; returns where it is now."""
        kept = super().keep(load, arrived)
        if load.kind is SnapshotKind.FULL:
            self._held_full = load.identity
        return kept

    def _get_missing(self, identity: str, files: Mapping[str, int], staged: Path) -> None:
        for other in staged.parent.iterdir():
            if other != staged:
                shutil.rmtree(other, ignore_errors=True)
        for left in staged.glob(".*"):
            left.unlink()
        missing = {name: size for name, size in files.items() if not (staged / name).exists()}
        if not missing:
            return
        self._coming = (identity, frozenset(files))
        self.on_news()
        try:
            asyncio.run(self._fetch(identity, missing, staged, self._recorded(identity)))
        finally:
            self._coming = ("", frozenset())

    async def _fetch(
        self,
        identity: str,
        missing: Mapping[str, int],
        staged: Path,
        digests: Mapping[str, FileDigest],
    ) -> None:
        reads = asyncio.Semaphore(READS_AT_ONCE)

        async def fetch(name: str, size: int, asking: Asking) -> None:
            partial, digest = staged / f".{name}", digests.get(name)
            is_known = digest is not None and digest.size_bytes == size
            if not (digest and is_known and await asking.take(digest, partial)):
                async with reads:
                    await asyncio.to_thread(self._get, identity, name, partial, size)
            partial.rename(staged / name)
            self.on_news()

        async with self._peers.asking(identity) as asking:
            await overlap(fetch(name, size, asking) for name, size in missing.items())

    def _recorded(self, identity: str) -> dict[str, FileDigest]:
        """Read the digests of the files as stored; none where nobody recorded them readably."""
        try:
            data = self._bucket.read(SNAPSHOTS, f"{identity}.json")
            stored = SnapshotManifest.parse(data, identity=identity).stored_files
        except (MissingObjectError, StoreError):
            return {}
        return {
            one.file: FileDigest(file=one.file, size_bytes=one.size_bytes, sha256=one.sha256)
            for one in stored
        }
