"""A reader that looks at a store all the time, and notes whatever is visible and not whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl

from hotload.checkpoint.names import INDEX_FILE
from hotload.dataset.rollout_plan import RolloutManifest
from hotload.dataset.table import check_rollouts
from hotload.publish.lease import Lease
from hotload.publish.snapshot import SnapshotManifest
from hotload.report.cycle_report import CycleReport

BETWEEN_LOOKS_SECONDS = 0.005
Stamp = tuple[int, int, int]


class StoreReader:
    """Reads a store that is a directory, from `with` until the block ends.

    A file is read when it is first seen and whenever it was replaced. What it names must be there
    with the size and digest it says; what was seen once must never be seen with other bytes.
    """

    def __init__(self, bucket: Path, checkpoints: list[Path]) -> None:
        self._bucket = bucket
        self._names = {path.name for path in checkpoints[0].iterdir()}
        self._seen: dict[Path, Stamp] = {}
        self._digests: dict[Path, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.looks = 0
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(BETWEEN_LOOKS_SECONDS):
            self._look()
            self.looks += 1

    def _look(self) -> None:
        # Records first: a record seen now may rely on nothing that appears later.
        records = self._bucket / "_hotload"
        self._read_changed(records / "reports", self._report)
        for rollout in _entries(records / "rollouts"):
            self._read_changed(Path(rollout), self._rolled_out)
        self._read_changed(records / "snapshots", self._snapshot)
        for account in _entries(records / "leases"):
            for service in _entries(Path(account)):
                self._read_changed(Path(service), self._lease)
        for entry in _entries(self._bucket):
            if not entry.name.startswith("_"):
                self._read_changed(Path(entry), self._stored)

    def _read_changed(self, directory: Path, read: Callable[[Path, bytes], None]) -> None:
        """Hand every file that is new or was replaced to `read`; what it raises is a complaint."""
        for entry in _entries(directory):
            path = Path(entry)
            try:
                if self._seen.get(path) == _stamp(entry.stat()):
                    continue
                with path.open("rb") as file:
                    self._seen[path] = stamp = _stamp(os.fstat(file.fileno()))
                    data = file.read()
            except FileNotFoundError:
                continue  # a lease that was given up since it was listed
            if len(data) != stamp[2]:
                self._complain(path, f"{stamp[2]} bytes when opened, {len(data)} when read")
            try:
                read(path, data)
            except Exception as error:  # noqa: BLE001 - every way not to be whole is a finding
                self._complain(path, f"{type(error).__name__}: {error}")

    def _once(self, path: Path, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if self._digests.setdefault(path, digest) != digest:
            self._complain(path, "was visible with other bytes before")

    def _stored(self, path: Path, data: bytes) -> None:
        self._once(path, data)
        if path.name not in self._names:
            self._complain(path, "is no file of a checkpoint")
        if path.name == INDEX_FILE:
            for shard in sorted(set(json.loads(data)["weight_map"].values())):
                if not path.with_name(shard).exists():
                    self._complain(path, f"names {shard}, which is not there")

    def _snapshot(self, path: Path, data: bytes) -> None:
        self._once(path, data)
        manifest = SnapshotManifest.parse(data, identity=path.stem)
        for file in (*manifest.shards, *manifest.side_files):
            named = self._bucket / manifest.identity / file.file
            self._names_whole(path, named, file.size_bytes, file.sha256)

    def _rolled_out(self, path: Path, data: bytes) -> None:
        if path.suffix == ".parquet":
            self._once(path, data)
            check_rollouts(pl.read_parquet(io.BytesIO(data)))
            return
        for part in RolloutManifest.parse(data, path=str(path)).parts:
            self._names_whole(path, path.parent / part.file, part.size_bytes, part.sha256)

    def _report(self, path: Path, data: bytes) -> None:
        if path.suffix == ".html":  # a page to look at, made again by a restarted cycle
            assert data.rstrip().endswith(b"</html>")
            return
        self._once(path, data)
        identity = CycleReport.model_validate_json(data).snapshot.identity
        records = self._bucket / "_hotload"
        for named in (
            records / "snapshots" / f"{identity}.json",
            records / "rollouts" / identity / "manifest.json",
        ):
            if not named.exists():
                self._complain(path, f"names {named.name}, which is not there")

    def _lease(self, path: Path, data: bytes) -> None:
        Lease.parse(data, token=int(path.stem), path=str(path))

    def _names_whole(self, path: Path, named: Path, size_bytes: int, sha256: str) -> None:
        data = named.read_bytes()
        if (len(data), hashlib.sha256(data).hexdigest()) != (size_bytes, sha256):
            self._complain(path, f"names {named.name} with another size or digest")

    def _complain(self, path: Path, what: str) -> None:
        self.complaints.append(f"{path.relative_to(self._bucket)}: {what}")


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(directory))
    except FileNotFoundError:
        return []


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
