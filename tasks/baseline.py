"""Baseline: the full bytes of the served snapshot, kept here because a delta needs them as base.

A copy of ours, never the trainer's files in place. It is checked by digest before use, rebuilt from
the store when lost, and moves on only after every replica has confirmed.
"""

import asyncio
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.store import Store
from hotload.clients.store.records import read_snapshot_manifest
from hotload.directory.files import (
    FileDigests,
    clone_file,
    copy_file,
    new_directory,
    remove_tree,
    sha256_file,
)
from hotload.directory.shards import apply_file
from hotload.errors import (
    BaselineLostError,
    DeltaError,
    InvalidCheckpointError,
    StoreError,
    StoreUnavailableError,
)
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import Shard, SnapshotManifest
from hotload.publish.workspace import Workspace
from hotload.records import FileDigest
from tasks import RETRIED


class Baseline:
    """The full bytes of snapshots in a workspace, built from what lies near.

    Args:
        store: where snapshots and their manifests are read from.
        checkpoint: the trainer's directory; its files are copied where their digests match.
    """

    def __init__(self, workspace: Workspace, store: Store, checkpoint: Path) -> None:
        self.workspace, self.store, self.checkpoint = workspace, store, checkpoint
        self.digests = FileDigests()

    async def hold(self, manifest: SnapshotManifest) -> Path:
        """Return the directory with the full bytes of `manifest`, every file checked by its digest.

        Built where it is missing or damaged: copied from the trainer's directory while that holds
        these bytes, else made from the nearest ancestor that is whole on this machine or from the
        chain's full snapshot, with our own deltas where their digests match and those in the store
        otherwise. Older baselines are removed afterwards.

        Raises:
            BaselineLostError: neither this machine nor the store has the bytes.
        """
        baseline = self.workspace.baseline(manifest.identity)
        if not await asyncio.to_thread(self._is_whole, baseline, manifest):
            for step in reversed(await self._lineage(manifest)):
                await self._build(step)
                # A long chain is rebuilt in the room of two checkpoints.
                await asyncio.to_thread(_keep_only, self.workspace.baselines, step.identity)
        await asyncio.to_thread(_keep_only, self.workspace.baselines, manifest.identity)
        return baseline

    async def keep(self, identity: str) -> None:
        """Move the baseline on to `identity`, which every replica has confirmed.

        Deltas of other snapshots and results of finished steps go: publishing is over. Where the
        bytes cannot be had any more, the next snapshot will be a full one; this one is served all
        the same.

        Raises:
            StoreError: the store has no manifest of it.
        """
        manifest = await read_snapshot_manifest(self.store, identity)
        if manifest is None:
            raise StoreError(identity, "its manifest is gone from the store")
        if manifest.kind is not SnapshotKind.LORA:
            try:
                await self.hold(manifest)
            except (BaselineLostError, StoreUnavailableError) as error:
                # The replicas serve it all the same; the next cycle builds the baseline or goes
                # full.
                get_run_logger().warning("the baseline did not move on: %s", error)
        await asyncio.to_thread(_keep_only, self.workspace.deltas, identity)
        await asyncio.to_thread(remove_tree, self.workspace.results)

    async def _lineage(self, manifest: SnapshotManifest) -> list[SnapshotManifest]:
        """List the snapshots to build, from `manifest` back to one that needs no other."""
        lineage = [manifest]
        while (previous := lineage[-1].previous) is not None:
            if await asyncio.to_thread(self._is_whole, self.checkpoint, lineage[-1]):
                break
            step = await read_snapshot_manifest(self.store, previous)
            if step is None:
                raise BaselineLostError(previous, "the store has no manifest of it")
            if await asyncio.to_thread(self._is_whole, self.workspace.baseline(previous), step):
                break
            if len(lineage) > manifest.chain_length:
                raise BaselineLostError(manifest.identity, "its chain in the store does not end")
            lineage.append(step)
        return lineage

    async def _build(self, manifest: SnapshotManifest) -> None:
        get_run_logger().info("building the baseline of %s", manifest.identity)
        baseline = self.workspace.baseline(manifest.identity)
        try:
            await asyncio.to_thread(remove_tree, baseline)
            await asyncio.to_thread(baseline.parent.mkdir, parents=True, exist_ok=True)
            with new_directory(baseline) as staged:
                for side_file in manifest.side_files:
                    await self._fetch(manifest, side_file, staged / side_file.file)
                for shard in manifest.shards:
                    await self._restore(manifest, shard, staged / shard.file)
        except StoreUnavailableError:
            raise
        except (DeltaError, InvalidCheckpointError, OSError) as error:  # a full disk, too
            raise BaselineLostError(manifest.identity, str(error)) from error

    async def _fetch(self, manifest: SnapshotManifest, file: Shard | FileDigest, out: Path) -> None:
        """Fetch one stored file, from this machine where its digest matches."""
        for directory in (self.checkpoint, self.workspace.delta(manifest.identity)):
            source = directory / file.file
            if await asyncio.to_thread(self._copy, source, file.size_bytes, file.sha256, out):
                return
        await self.store.get_file(f"{manifest.identity}/{file.file}", out)
        found = await asyncio.to_thread(sha256_file, out)
        if found != file.sha256:
            reason = f"sha256 is {found[:12]}…, the manifest says {file.sha256[:12]}…"
            raise StoreError(f"{manifest.identity}/{file.file}", reason)

    async def _restore(self, manifest: SnapshotManifest, shard: Shard, out: Path) -> None:
        """Make one full shard: the trainer's, or the stored one, or what its delta restores."""
        if manifest.previous is None:
            await self._fetch(manifest, shard, out)
            return
        source, digest = self.checkpoint / shard.file, shard.content_sha256
        if await asyncio.to_thread(self._copy, source, shard.content_size_bytes, digest, out):
            return
        base = self.workspace.baseline(manifest.previous) / shard.file
        delta = out.with_name(f"{shard.file}.delta")
        await self._fetch(manifest, shard, delta)
        found = await asyncio.to_thread(apply_file, base, delta, out)
        delta.unlink()
        if found != digest:
            reason = f"restored sha256 is {found[:12]}…, the manifest says {digest[:12]}…"
            raise DeltaError(shard.file, reason)

    def _copy(self, source: Path, size_bytes: int, sha256: str, out: Path) -> bool:
        """Copy `source` to `out` if it has that size and digest; False if not.

        What has been read before and stayed as it is gets copied without being read by us, which
        costs nothing where the file system lets files share their bytes.
        """
        try:
            if source.stat().st_size != size_bytes:
                return False
        except OSError:
            return False
        known = self.digests.known(source)
        if known is not None and known != sha256:
            return False
        try:
            if known == sha256:
                clone_file(source, out)
                if self.digests.known(source) == sha256:
                    return True  # it did not change meanwhile either
            return copy_file(source, out) == sha256
        except InvalidCheckpointError:
            return False

    def _is_whole(self, directory: Path, manifest: SnapshotManifest) -> bool:
        """Whether every file of the checkpoint that `manifest` stands for is in `directory`."""
        expected = {shard.file: shard.content_sha256 for shard in manifest.shards}
        expected |= {side_file.file: side_file.sha256 for side_file in manifest.side_files}
        paths = [directory / file for file in expected]
        try:
            with ThreadPoolExecutor(os.cpu_count(), "digest") as pool:
                return all(map(str.__eq__, pool.map(self.digests.of, paths), expected.values()))
        except InvalidCheckpointError:
            return False  # a file is gone or cannot be read


@task(cache_policy=NO_CACHE, task_run_name="baseline-{identity}", **RETRIED)
async def keep_baseline(baseline: Baseline, identity: str) -> None:
    """Keep the baseline as `Baseline.keep` does, tried again while the store does not answer."""
    await baseline.keep(identity)


def _keep_only(parent: Path, identity: str) -> None:
    if parent.is_dir():
        for directory in parent.iterdir():
            if directory.name != identity:
                shutil.rmtree(directory, ignore_errors=True)
