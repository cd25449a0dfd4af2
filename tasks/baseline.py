"""Baseline: the full bytes of the served snapshot, kept here because a delta needs them as base.

A copy of ours, never the trainer's files in place. It is checked by digest before use, rebuilt from
the store when lost, and moves on only after every replica has confirmed.
"""

import asyncio
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.checkpoint.index_and_spec import SpecDtypeStyle
from hotload.clients.store import Store
from hotload.clients.store.records import read_snapshot_manifest
from hotload.directory.delta_codecs import ENVELOPES
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import (
    AnyFile,
    clone_file,
    copy_file,
    link_file,
    new_directory,
    remove_tree,
    sha256_file,
)
from hotload.directory.places import RemotePlace
from hotload.directory.relayout import CheckpointView, file_in, view_checkpoint
from hotload.directory.shards import apply_file
from hotload.errors import (
    BaselineLostError,
    DeltaError,
    InvalidCheckpointError,
    StoreError,
    StoreUnavailableError,
)
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import Foreseen, Shard, SnapshotManifest
from hotload.publish.workspace import Workspace
from hotload.records import FileDigest
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.validate import place_of

ROOM_BYTES = 64 << 20  # for the files beside the shards, and what else a disk needs


class Baseline:
    """The full bytes of snapshots in a workspace, built from what lies near: of every snapshot that
    a service of the cycle serves.

    Args:
        store: where snapshots and their manifests are read from.
        checkpoint: where the trainer's lies; its bytes are copied where their digests match.
        spec_dtype_style: as the cycle's.
        links: whether the trainer's files may be kept by hard link.
        files: the shards that are kept here. Empty keeps all.
    """

    def __init__(
        self,
        workspace: Workspace,
        store: Store,
        checkpoint: Path | RemotePlace,
        spec_dtype_style: SpecDtypeStyle = "torch",
        *,
        links: bool = False,
        files: Collection[str] = (),
    ) -> None:
        self.workspace, self.store, self.checkpoint = workspace, store, checkpoint
        self.view: Callable[[], CheckpointView] = partial(
            view_checkpoint, checkpoint, spec_dtype_style=spec_dtype_style
        )
        """Views the trainer's checkpoint as it is now."""
        self._style: SpecDtypeStyle = spec_dtype_style
        self.committed: SnapshotManifest | None = None
        """What the ranks of the trainer have put into the store, where there is no directory."""
        self.digests = FileDigests(workspace.digests)
        self._links, self._files = links, frozenset(files)
        self.foreseen: Mapping[str, Foreseen] | None = None
        """What a delta on each base would be, where the shards are placed on nodes, which keep the
        bases; None where they are kept here."""
        self.trouble: str | None = None
        """Why the baseline did not move on; the next snapshot is then a full one."""
        self.reserved: dict[str, frozenset[str]] = {}
        """What the replicas of a service know, by its name, until it has been published to: a base
        that is needed, now or by the next cycle."""
        self._held: dict[str, str] = {}
        """Digest of what is held here of every snapshot, by identity: not of the content as the
        trainer wrote it, which a delta restores with the headers and files of its base."""
        self._outgoing: set[str] = set()
        """What is held and no service serves any more: spent where the disk is short."""
        self._in_turn = asyncio.Lock()

    def take(self, committed: SnapshotManifest) -> None:
        """Go by what ranks have committed: its full bytes are made here, once they are needed."""
        self.committed, self.checkpoint = committed, self.workspace.baseline(committed.identity)
        self.view = partial(view_checkpoint, self.checkpoint, spec_dtype_style=self._style)

    async def hold(self, manifest: SnapshotManifest) -> Path:
        """Return the directory with the full bytes of `manifest`, every file checked by its digest.

        Built where it is missing or damaged: copied from the trainer's directory while that holds
        these bytes, else made from the nearest ancestor that is whole on this machine or from the
        chain's full snapshot, with our own deltas where their digests match and those in the store
        otherwise. What is not held here is removed afterwards.

        Raises:
            BaselineLostError: neither this machine nor the store has the bytes.
        """
        baseline, baselines = self.workspace.baseline(manifest.identity), self.workspace.baselines
        manifest = self._kept_of(manifest)
        async with self._in_turn:
            if not (
                await asyncio.to_thread(self._is_whole, baseline, manifest)
                or await asyncio.to_thread(self._link, manifest)
            ):
                view = await asyncio.to_thread(self._find_view)
                for step in reversed(await self._lineage(manifest, view)):
                    await self._build(step, view)
                    # A long chain is rebuilt in the room of two checkpoints.
                    await asyncio.to_thread(_keep_only, baselines, self._needed(step.identity))
            self._held[manifest.identity] = manifest.content.sha256
            await asyncio.to_thread(_keep_only, baselines, self._needed())
        return baseline

    def _needed(self, *identities: str) -> set[str]:
        return {*self._held, *identities}.union(*self.reserved.values())

    async def find(self, manifest: SnapshotManifest) -> Path | None:
        """Return the directory that `hold` would, if it is whole; builds and removes nothing."""
        baseline, manifest = self.workspace.baseline(manifest.identity), self._kept_of(manifest)
        return baseline if await asyncio.to_thread(self._is_whole, baseline, manifest) else None

    def _kept_of(self, manifest: SnapshotManifest) -> SnapshotManifest:
        """Name of what is stored only what is kept here."""
        if not self._files:
            return manifest
        kept = tuple(shard for shard in manifest.shards if shard.file in self._files)
        return manifest.model_copy(update={"shards": kept})

    async def keep(self, *identities: str) -> None:
        """Move the baseline on to what every replica of a service has confirmed, of each service.

        Deltas of other snapshots and results of finished steps go: publishing is over. Where the
        bytes cannot be had any more, the next snapshot will be a full one; this one is served all
        the same.

        Raises:
            StoreError: the store has no manifest of one.
        """
        manifests = [await self._manifest_of(identity) for identity in dict.fromkeys(identities)]
        self._outgoing = self._held.keys() - {*identities}.union(*self.reserved.values())
        for manifest in manifests:
            if manifest.kind is SnapshotKind.LORA:
                continue
            try:
                await self.hold(manifest)
            except (BaselineLostError, StoreUnavailableError) as error:
                # The replicas serve it all the same; the next cycle builds the baseline or goes
                # full.
                self.trouble = str(error)
                get_run_logger().warning("the baseline did not move on: %s", error)
        self._held = {one: held for one, held in self._held.items() if one in identities}
        if self._held and self.trouble is None:
            await asyncio.to_thread(_keep_only, self.workspace.baselines, self._needed())
        # What a full snapshot begins anew is read anew: once a chain, and after every doubt.
        held = [self.workspace.baseline(one) for one in self._held]
        if all(one.kind is SnapshotKind.DELTA for one in manifests):
            await asyncio.to_thread(self.digests.remember, held)
        else:
            await asyncio.to_thread(self.digests.doubt)
        await asyncio.to_thread(_keep_only, self.workspace.deltas, {*identities})
        await asyncio.to_thread(remove_tree, self.workspace.results)

    async def _manifest_of(self, identity: str) -> SnapshotManifest:
        manifest = await read_snapshot_manifest(self.store, identity)
        if manifest is None:
            raise StoreError(identity, "its manifest is gone from the store")
        return manifest

    def _find_view(self) -> CheckpointView | None:
        try:
            return self.view()
        except InvalidCheckpointError:
            return None  # the trainer has removed it, or writes there

    async def _lineage(
        self, manifest: SnapshotManifest, view: CheckpointView | None
    ) -> list[SnapshotManifest]:
        """List the snapshots to build, from `manifest` back to one that needs no other."""
        lineage = [manifest]
        while (previous := lineage[-1].previous) is not None:
            if view is not None and await asyncio.to_thread(self._is_whole, view, lineage[-1]):
                break
            try:
                step = await read_snapshot_manifest(self.store, previous)
            except StoreUnavailableError:
                raise
            except StoreError as error:
                raise BaselineLostError(previous, str(error)) from None
            if step is None:
                raise BaselineLostError(previous, "the store has no manifest of it")
            step = self._kept_of(step)
            if await asyncio.to_thread(self._is_whole, self.workspace.baseline(previous), step):
                break
            if len(lineage) > manifest.chain_length:
                raise BaselineLostError(manifest.identity, "its chain in the store does not end")
            lineage.append(step)
        return lineage

    async def _build(self, manifest: SnapshotManifest, view: CheckpointView | None) -> None:
        get_run_logger().info("building the baseline of %s", manifest.identity)
        baseline = self.workspace.baseline(manifest.identity)
        try:
            await asyncio.to_thread(remove_tree, baseline)
            await asyncio.to_thread(baseline.parent.mkdir, parents=True, exist_ok=True)
            is_short = await asyncio.to_thread(_is_short, baseline, manifest)
            if is_short:
                spare = (self._needed() - self._outgoing) | {manifest.previous or ""}
                await asyncio.to_thread(_keep_only, baseline.parent, spare)
            is_spent = is_short and manifest.previous in self._outgoing
            with new_directory(baseline) as staged:
                for side_file in manifest.side_files:
                    await self._fetch(manifest, side_file, view, staged / side_file.file)
                for shard in manifest.shards:
                    await self._restore(manifest, shard, view, staged / shard.file)
                    if is_spent:
                        base = self.workspace.baseline(str(manifest.previous))
                        (base / shard.file).unlink(missing_ok=True)
        except StoreUnavailableError:
            raise
        except (DeltaError, InvalidCheckpointError, OSError) as error:  # a full disk, too
            raise BaselineLostError(manifest.identity, str(error)) from error

    def _link(self, manifest: SnapshotManifest) -> bool:
        """Make the baseline of the files of another with the same bytes, which services serve under
        names of their own; False where there is none."""
        same = [one for one, held in self._held.items() if held == manifest.content.sha256]
        if not same:
            return False
        source = self.workspace.baseline(same[0])
        baseline = self.workspace.baseline(manifest.identity)
        try:
            remove_tree(baseline)
            with new_directory(baseline) as staged:
                names = [shard.file for shard in manifest.shards]
                for name in (*names, *(one.file for one in manifest.side_files)):
                    os.link(source / name, staged / name)
        except OSError:
            return False  # not on every file system
        return True

    async def _fetch(
        self,
        manifest: SnapshotManifest,
        file: Shard | FileDigest,
        view: CheckpointView | None,
        out: Path,
    ) -> None:
        """Fetch one stored file, from this machine where its digest matches."""
        for place in (view, self.workspace.delta(manifest.identity)):
            copy = partial(self._copy, place, file.file, file.size_bytes, file.sha256, out)
            if await asyncio.to_thread(copy):
                return
        owner = manifest.identity if isinstance(file, Shard) else manifest.side_files_at
        await self.store.get_file(f"{owner}/{file.file}", out)
        found = await asyncio.to_thread(sha256_file, out)
        if found != file.sha256:
            reason = f"sha256 is {found[:12]}…, the manifest says {file.sha256[:12]}…"
            raise StoreError(f"{owner}/{file.file}", reason)
        self.digests.note(out, found)

    async def _restore(
        self, manifest: SnapshotManifest, shard: Shard, view: CheckpointView | None, out: Path
    ) -> None:
        """Make one full shard: the trainer's, or the stored one, or what its delta restores.

        A trainer's that lies elsewhere comes last: a delta is here, or is less to fetch.
        """
        if manifest.previous is None:
            await self._fetch(manifest, shard, view, out)
            return
        base = self.workspace.baseline(manifest.previous) / shard.file
        size_bytes, digest = shard.content_size_bytes, shard.content_sha256
        copy = partial(self._copy, view, shard.file, size_bytes, digest, out)
        is_near = view is not None and isinstance(view.directory, Path)
        if (is_near or not base.exists()) and await asyncio.to_thread(copy):
            return
        try:
            await self._apply(manifest, shard, base, out)
        except (DeltaError, InvalidCheckpointError, StoreError):
            if is_near or not await asyncio.to_thread(copy):
                raise

    async def _apply(self, manifest: SnapshotManifest, shard: Shard, base: Path, out: Path) -> None:
        if not shard.size_bytes:  # unchanged, so not stored
            found = await asyncio.to_thread(copy_file, base, out)
        else:
            delta = out.with_name(f"{shard.file}.delta")
            await self._fetch(manifest, shard, None, delta)
            envelope = ENVELOPES["coreweave" if manifest.codec == "coreweave" else "arc_v2"]
            apply = partial(apply_file, base, delta, out, envelope=envelope)
            found = await asyncio.to_thread(apply)
            delta.unlink()
        if found != shard.content_sha256:
            said = shard.content_sha256
            reason = f"restored sha256 is {found[:12]}…, the manifest says {said[:12]}…"
            raise DeltaError(shard.file, reason)
        self.digests.note(out, found)

    def _copy(
        self,
        place: CheckpointView | Path | None,
        file: str,
        size_bytes: int,
        sha256: str,
        out: Path,
    ) -> bool:
        """Copy a file to `out` if it lies in `place` with that size and digest; False if not.

        What has been read before and stayed as it is gets copied without being read by us, which
        costs nothing where the file system lets files share their bytes.
        """
        try:
            source = file_in(place, file) if place else None
            if source is None or _size_of(source) != size_bytes:
                return False
        except (OSError, InvalidCheckpointError):
            return False
        known = self.digests.known(source)
        if known is not None and known != sha256:
            return False
        try:
            if known == sha256:
                if self._links and isinstance(source, Path):
                    link_file(source, out)
                else:
                    clone_file(source, out)
                if self.digests.known(source) == sha256:  # it did not change meanwhile either
                    self.digests.note(out, sha256)
                    return True
            if copy_file(source, out) != sha256:
                return False
        except InvalidCheckpointError:
            return False
        self.digests.note(out, sha256)
        return True

    def _is_whole(self, place: CheckpointView | Path, manifest: SnapshotManifest) -> bool:
        """Whether every file of the checkpoint that `manifest` stands for is in `place`.

        A baseline that is there and not whole is a doubt about all that is remembered.
        """
        expected = {shard.file: shard.content_sha256 for shard in manifest.shards}
        expected |= {side_file.file: side_file.sha256 for side_file in manifest.side_files}
        try:
            paths = [file_in(place, file) for file in expected]
            with ThreadPoolExecutor(os.cpu_count(), "digest") as pool:
                found = pool.map(self.digests.of, paths)
                is_whole = all(map(str.__eq__, found, expected.values()))
        except InvalidCheckpointError:
            is_whole = False  # a file is gone or cannot be read
        if not is_whole and isinstance(place, Path) and place.is_dir():
            self.digests.doubt()
        return is_whole


async def baseline_of(
    spec: CycleSpec, workspace: Workspace, store: Store, files: Collection[str] = ()
) -> Baseline:
    """Open the baseline of a cycle in a workspace, all of it or these shards."""
    return Baseline(
        workspace,
        store,
        await place_of(spec),
        spec.snapshot.spec_dtype_style,
        links=spec.snapshot.link_baseline,
        files=files,
    )


@task(cache_policy=NO_CACHE, task_run_name="baseline-{identity}", **RETRIED)
async def keep_baseline(baseline: Baseline, identity: str, *others: str) -> None:
    """Keep the baseline as `Baseline.keep` does, tried again while the store does not answer.

    `others` are what the cycle's other services serve.
    """
    await baseline.keep(identity, *others)


async def with_checkpoint(spec: CycleSpec, baseline: Baseline, identity: str) -> CycleSpec:
    """Return the cycle with a directory from which a snapshot can be carried: where ranks have put
    another one than `identity` into the store, or replicas are probed, the one in which its full
    bytes are made now.

    Raises:
        BaselineLostError: neither this machine nor the store has them.
    """
    committed = baseline.committed
    if committed is None or (committed.identity == identity and not spec.readiness.probe_sessions):
        return spec
    directory = await restore_snapshot(baseline, committed)
    return spec.model_copy(update={"checkpoint": str(directory)})


@task(cache_policy=NO_CACHE, task_run_name="restore-{manifest.identity}", **RETRIED)
async def restore_snapshot(baseline: Baseline, manifest: SnapshotManifest) -> Path:
    """Restore the checkpoint that a stored snapshot stands for; returns its directory.

    Raises:
        BaselineLostError: the store does not have all of its bytes.
    """
    return await baseline.hold(manifest)


def _size_of(source: AnyFile) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.size_bytes


def _is_short(baseline: Path, manifest: SnapshotManifest) -> bool:
    """Whether the disk has no room for a baseline beside those that are there."""
    size_bytes = sum(one.content_size_bytes for one in manifest.shards)
    return shutil.disk_usage(baseline.parent).free < size_bytes + ROOM_BYTES


def _keep_only(parent: Path, identities: set[str]) -> None:
    if parent.is_dir():
        for directory in parent.iterdir():
            if directory.name not in identities:
                shutil.rmtree(directory, ignore_errors=True)
