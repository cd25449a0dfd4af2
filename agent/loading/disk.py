"""How a snapshot becomes bytes of a replica's own: downloaded, merged. Blocking; runs in threads.

A delta is written to a copy, which then takes the old one's place: on a failure the old bytes stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.loading.bucket import MissingObjectError, SnapshotBucket
from agent.loading.checkpoint_files import shard_names
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX
from hotload.delta.ordered_threads import Workers, for_each_shard
from hotload.directory.files import copy_file, remove_tree
from hotload.directory.shards import apply_file
from hotload.errors import DeltaError
from hotload.identity import SnapshotKind

PLACES = ("arriving", "merging", "held")
"""Below a replica's directory, each with a directory for a snapshot; nothing else is removed."""
Transition = Literal["ASYNC", "SYNC"]


@dataclass(frozen=True, slots=True)
class Load:
    """One snapshot a replica has to load."""

    identity: str
    kind: SnapshotKind
    previous: str | None
    reset_prompt_cache: str = "all"
    transition: Transition = "ASYNC"


class Disk:
    """One replica's directory: what it holds, and a place for what arrives.

    Shards are merged on `workers` threads; memory is what those hold, whatever the shards' size.
    """

    def __init__(self, directory: Path, bucket: SnapshotBucket, *, workers: int = 1) -> None:
        self._directory, self._bucket, self._workers = directory, bucket, workers
        directory.mkdir(parents=True, exist_ok=True)

    def fetch(self, load: Load) -> Path:
        """Download every file of the snapshot into a directory.

        Files already there are kept, so a second look fetches only what was missing.

        Raises:
            MissingObjectError: the snapshot, or a file its index lists, is not there (yet).
            BucketError: the bucket does not answer.
        """
        staged = self._directory / "arriving" / load.identity
        staged.mkdir(parents=True, exist_ok=True)
        files = self._files(load.identity)
        self._get_missing(load.identity, files, staged)
        needed = ADAPTER_CONFIG_FILE if load.kind is SnapshotKind.LORA else INDEX_FILE
        if needed not in files:
            raise MissingObjectError(f"{needed} of {load.identity!r} is missing")
        missing = [] if load.kind is SnapshotKind.LORA else set(shard_names(staged)) - files.keys()
        if missing:
            raise MissingObjectError(f"{min(missing)} of {load.identity!r} is missing")
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

        def merge_shard(name: str, pool: Workers | None = None, on_bytes: object = None) -> None:
            self._merge_shard(load, held / name, arrived / name, merged / name, pool)

        names = shard_names(held)
        if self._workers == 1:
            for name in names:  # in their order, and none begun after one that failed
                merge_shard(name)
        else:
            for_each_shard(names, merge_shard, workers=self._workers, total_bytes=0, progress=None)
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
        """Remove every snapshot but the directories given."""
        for place in PLACES:  # what a link beside them leads to may be a base model of a user's
            for path in (self._directory / place).glob("*"):
                if path not in kept:
                    shutil.rmtree(path, ignore_errors=True)

    def discard(self, load: Load) -> None:
        """Remove what arrived of a load that failed."""
        for place in ("arriving", "merging"):
            shutil.rmtree(self._directory / place / load.identity, ignore_errors=True)

    def _files(self, identity: str) -> dict[str, int]:
        return self._bucket.files(identity)

    def _get_missing(self, identity: str, files: Mapping[str, int], staged: Path) -> None:
        for name, size in files.items():
            target = staged / name
            if not target.exists() or target.stat().st_size != size:
                self._get(identity, name, target, size)

    def _get(self, identity: str, name: str, target: Path, size_bytes: int) -> None:
        self._bucket.download(identity, name, target)

    def _merge_shard(
        self,
        load: Load,
        base: Path,
        delta: Path,
        out: Path,
        pool: Workers | None,
    ) -> None:
        apply_file(base, delta, out, pool=pool, with_sha256=False)
