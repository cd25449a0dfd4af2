"""A bucket and a disk with the faults that were ordered (protocol §21)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.loading.bucket import MissingObjectError, SnapshotBucket
from agent.loading.disk import Disk, Load
from emulator.control.faults import Faults
from hotload.checkpoint.names import INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX
from hotload.delta.dialects import Lineage
from hotload.delta.ordered_threads import Workers
from hotload.directory.files import copy_file
from hotload.directory.inputs import read_delta
from hotload.directory.operations import apply_directory
from hotload.errors import DeltaError


class FaultyBucket(SnapshotBucket):
    """A bucket of which files are missing, or late."""

    def __init__(self, url: str, options: Mapping[str, Any], faults: Faults) -> None:
        super().__init__(url, options)
        self._faults = faults

    def files(self, identity: str, *, replica: str | None = None) -> dict[str, int]:
        """List what is to be seen of a snapshot."""
        found = {}
        for name, size in super().files(identity).items():
            where = {"identity": identity, "file": name, "replica": replica}
            hidden = self._faults.take("missing_object", **where)
            if hidden is None and self._faults.take("late_object", **where) is None:
                found[name] = size
        if not found:
            raise MissingObjectError(f"snapshot {identity!r} is not in the bucket")
        return found


class FaultyDisk(Disk):
    """A disk that takes what a hint has brought, spoils what arrives and tears what it merges."""

    def __init__(
        self, directory: Path, hinted: Path, bucket: FaultyBucket, faults: Faults, name: str
    ) -> None:
        super().__init__(directory, bucket)
        self._hinted, self._faulty, self._faults, self._name = hinted, bucket, faults, name

    def copy(self, load: Load, directory: Path) -> Path:
        """Take the files of a local directory for the snapshot, as a base that has a name."""
        staged = self._directory / "arriving" / load.identity
        staged.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            if path.is_file():
                copy_file(path, staged / path.name)
        return staged

    def _files(self, identity: str) -> dict[str, int]:
        return self._faulty.files(identity, replica=self._name)

    def _get(self, identity: str, name: str, target: Path, size_bytes: int) -> None:
        hinted = self._hinted / identity / name
        if hinted.exists() and hinted.stat().st_size == size_bytes:
            shutil.copyfile(hinted, target)
        else:
            super()._get(identity, name, target, size_bytes)
        where = {"replica": self._name, "identity": identity, "file": name}
        fault = self._faults.take("corrupt_object", **where)
        if fault is None or not target.stat().st_size:
            return
        data = bytearray(target.read_bytes())
        start = int(fault["offset"]) % len(data)
        for at in range(start, min(len(data), start + int(fault["size"]))):
            data[at] ^= 0x01
        target.write_bytes(data)

    def _merge_shard(
        self, load: Load, base: Path, delta: Path, out: Path, pool: Workers | None
    ) -> None:
        super()._merge_shard(load, base, delta, out, pool)
        if self._faults.take("torn_apply", replica=self._name, identity=load.identity):
            # As the vendor's decoder does it: in place, without a journal (wire-format §7).
            os.replace(out, base)
            raise DeltaError(out.name, "torn: the apply stopped after this shard")


class ChangedTensorsDisk(FaultyDisk):
    """A disk for deltas of changed tensors, whose index says what they follow (wire-format §5)."""

    def merge(self, load: Load, arrived: Path, held: Path) -> Path:
        """Merge the delta in `arrived` into a full checkpoint, on the one in `held`.

        Raises:
            DeltaError: the delta is not the one that was signalled, or does not fit the base.
        """
        lineage, expected = read_delta(arrived).lineage, Lineage(load.identity, str(load.previous))
        if lineage != expected:
            raise DeltaError(INDEX_FILE, f"found {lineage}, expected {expected}")
        merged = self._directory / "merging" / load.identity
        shutil.rmtree(merged, ignore_errors=True)
        merged.parent.mkdir(exist_ok=True)
        apply_directory(held, arrived, merged)
        if self._faults.take("torn_apply", replica=self._name, identity=load.identity):
            shard = min(merged.glob(f"*{SHARD_SUFFIX}"))
            os.replace(shard, held / shard.name)
            raise DeltaError(shard.name, "torn: the apply stopped after this shard")
        return merged
