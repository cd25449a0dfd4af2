"""How a snapshot becomes bytes of a replica's own: downloaded, merged. Blocking; runs in threads.

A delta is written to a copy, which then takes the old one's place: on a failure the old bytes stay.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from emulator.control.faults import Faults
from emulator.engine.weights import shard_names
from emulator.replicas.bucket import MissingObjectError, SnapshotBucket
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX
from hotload.directory.files import copy_file, remove_tree
from hotload.directory.shards import apply_file
from hotload.errors import DeltaError
from hotload.identity import SnapshotKind


@dataclass(frozen=True, slots=True)
class Load:
    """One snapshot a replica has to load."""

    identity: str
    kind: SnapshotKind
    previous: str | None
    reset_prompt_cache: str = "all"


class Disk:
    """One replica's directory: what it holds, and a place for what arrives."""

    def __init__(
        self, directory: Path, hinted: Path, bucket: SnapshotBucket, faults: Faults, name: str
    ) -> None:
        self._directory, self._hinted = directory, hinted
        self._bucket, self._faults, self._name = bucket, faults, name
        directory.mkdir(parents=True, exist_ok=True)

    def fetch(self, load: Load) -> Path:
        """Download every file of the snapshot into a directory, or take it from a hint's copy.

        Files already there are kept, so a second look fetches only what was missing.

        Raises:
            MissingObjectError: the snapshot, or a file its index lists, is not there (yet).
            BucketError: the bucket does not answer.
        """
        staged = self._directory / "arriving" / load.identity
        staged.mkdir(parents=True, exist_ok=True)
        files = self._bucket.files(load.identity, replica=self._name)
        for name, size in files.items():
            target, hinted = staged / name, self._hinted / load.identity / name
            if target.exists() and target.stat().st_size == size:
                continue
            if hinted.exists() and hinted.stat().st_size == size:
                shutil.copyfile(hinted, target)
            else:
                self._bucket.download(load.identity, name, target)
            self._corrupt(load.identity, target)
        needed = ADAPTER_CONFIG_FILE if load.kind is SnapshotKind.LORA else INDEX_FILE
        if needed not in files:
            raise MissingObjectError(f"{needed} of {load.identity!r} is missing")
        missing = [] if load.kind is SnapshotKind.LORA else set(shard_names(staged)) - files.keys()
        if missing:
            raise MissingObjectError(f"{min(missing)} of {load.identity!r} is missing")
        return staged

    def copy(self, load: Load, directory: Path) -> Path:
        """Take the files of a local directory for the snapshot, as a base that has a name."""
        staged = self._directory / "arriving" / load.identity
        staged.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            if path.is_file():
                copy_file(path, staged / path.name)
        return staged

    def merge(self, load: Load, arrived: Path, held: Path) -> Path:
        """Merge the delta in `arrived` into a full checkpoint, on the one in `held`.

        Raises:
            DeltaError: the delta does not fit the base, or a checksum is wrong.
        """
        merged = self._directory / "merging" / load.identity
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir(parents=True)
        if (arrived / INDEX_FILE).read_bytes() != (held / INDEX_FILE).read_bytes():
            raise DeltaError(INDEX_FILE, "differs from that of the previous snapshot")
        for name in shard_names(held):
            apply_file(held / name, arrived / name, merged / name)
            if self._faults.take("torn_apply", replica=self._name, identity=load.identity):
                # As the vendor's decoder does it: in place, without a journal (wire-format §7).
                os.replace(merged / name, held / name)
                raise DeltaError(name, "torn: the apply stopped after this shard")
        for path in arrived.iterdir():
            if not path.name.endswith(SHARD_SUFFIX):
                copy_file(path, merged / path.name)
        return merged

    def keep(self, load: Load, arrived: Path) -> Path:
        """Make `arrived` what the replica holds under the identity; returns where it is now."""
        kept = self._directory / "held" / load.identity
        kept.parent.mkdir(exist_ok=True)
        remove_tree(kept)
        arrived.rename(kept)
        return kept

    def forget_others(self, *kept: Path | None) -> None:
        """Remove everything but the directories given."""
        for path in self._directory.glob("*/*"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def discard(self, load: Load) -> None:
        """Remove what arrived of a load that failed."""
        for place in ("arriving", "merging"):
            shutil.rmtree(self._directory / place / load.identity, ignore_errors=True)

    def _corrupt(self, identity: str, path: Path) -> None:
        where = {"replica": self._name, "identity": identity, "file": path.name}
        fault = self._faults.take("corrupt_object", **where)
        if fault is None or not path.stat().st_size:
            return
        data = bytearray(path.read_bytes())
        start = int(fault["offset"]) % len(data)
        for at in range(start, min(len(data), start + int(fault["size"]))):
            data[at] ^= 0x01
        path.write_bytes(data)
