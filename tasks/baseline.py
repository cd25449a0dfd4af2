"""Baseline: the full bytes of the served snapshot, kept here because a delta needs them as base.

A copy of ours, never the trainer's files in place. It is checked by digest before use, rebuilt from
the store when lost, and moves on only after every replica has confirmed.
"""

import asyncio
import shutil
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.clients.store.records import read_manifest
from hotload.directory.files import (
    apply_file,
    copy_file,
    remove_tree,
    replace_directory,
    sha256_file,
)
from hotload.errors import (
    BaselineLostError,
    DeltaError,
    InvalidCheckpointError,
    StoreError,
    StoreUnavailableError,
)
from hotload.identity import SnapshotKind
from hotload.publish.places import baseline_dir, delta_dir, results_dir
from hotload.publish.snapshot import Shard, SnapshotManifest
from hotload.records import FileDigest
from hotload.spec import CycleSpec
from tasks.retrying import RETRIED


@task(cache_policy=NO_CACHE, task_run_name="baseline-{identity}", **RETRIED)
async def keep_baseline(
    spec: CycleSpec, service: HotLoadClient, store: Store, identity: str
) -> None:
    """Move the baseline on to `identity`, which every replica has confirmed.

    Deltas of other snapshots and results of finished steps go: publishing is over. Where the bytes
    cannot be had any more, the next snapshot will be a full one; this one is served all the same.
    """
    manifest = await read_manifest(store, identity)
    if manifest is None:
        raise StoreError(identity, "its manifest is gone from the store")
    if manifest.kind is not SnapshotKind.LORA:
        try:
            await hold_baseline(spec, service, store, manifest)
        except (BaselineLostError, StoreUnavailableError) as error:
            # The replicas serve it all the same; the next cycle builds the baseline or goes full.
            get_run_logger().warning("the baseline did not move on: %s", error)
    await asyncio.to_thread(_keep_only, delta_dir(spec, service), identity)
    await asyncio.to_thread(remove_tree, results_dir(spec, service))


async def hold_baseline(
    spec: CycleSpec, service: HotLoadClient, store: Store, manifest: SnapshotManifest
) -> Path:
    """The directory with the full bytes of `manifest`, every file checked by its digest.

    Built, where it is missing or damaged, from the nearest ancestor that is whole on this machine,
    else from the chain's full snapshot; each file from the trainer's directory or our own deltas
    where their digests match, else from the store. Older baselines are removed afterwards.

    Raises:
        BaselineLostError: neither this machine nor the store has the bytes.
    """
    lineage: list[SnapshotManifest] = []
    step: SnapshotManifest | None = manifest
    root = baseline_dir(spec, service)
    while step and not await asyncio.to_thread(_is_whole, root / step.identity, step):
        lineage.append(step)
        if step.previous is None:
            break
        previous = step.previous
        step = await read_manifest(store, previous)
        if step is None:
            raise BaselineLostError(previous, "the store has no manifest of it")
        if len(lineage) > manifest.chain_length:
            raise BaselineLostError(manifest.identity, "its chain in the store does not end")
    for each in reversed(lineage):
        await _build(spec, service, store, each)
        # A long chain is rebuilt in the room of two checkpoints.
        await asyncio.to_thread(_keep_only, root, each.identity)
    await asyncio.to_thread(_keep_only, root, manifest.identity)
    return root / manifest.identity


async def _build(
    spec: CycleSpec, service: HotLoadClient, store: Store, manifest: SnapshotManifest
) -> None:
    root = baseline_dir(spec, service)
    staged = root / f"{manifest.identity}.tmp"
    await asyncio.to_thread(shutil.rmtree, staged, ignore_errors=True)
    await asyncio.to_thread(staged.mkdir, parents=True)
    get_run_logger().info("building the baseline of %s", manifest.identity)
    try:
        for side_file in manifest.side_files:
            await _fetch(spec, service, store, manifest, side_file, staged / side_file.file)
        for shard in manifest.shards:
            if manifest.kind is SnapshotKind.DELTA:
                await _restore(spec, service, store, manifest, shard, staged)
            else:
                await _fetch(spec, service, store, manifest, shard, staged / shard.file)
        await asyncio.to_thread(replace_directory, staged, root / manifest.identity)
    except StoreUnavailableError:
        raise
    except (DeltaError, InvalidCheckpointError, OSError) as error:  # a full disk, too
        raise BaselineLostError(manifest.identity, str(error)) from error
    finally:
        await asyncio.to_thread(shutil.rmtree, staged, ignore_errors=True)


async def _fetch(
    spec: CycleSpec,
    service: HotLoadClient,
    store: Store,
    manifest: SnapshotManifest,
    file: Shard | FileDigest,
    out: Path,
) -> None:
    """Bring one stored file here, from this machine where its digest matches."""
    for directory in (Path(spec.checkpoint), delta_dir(spec, service) / manifest.identity):
        if await asyncio.to_thread(_copied, directory / file.file, file, out):
            return
    await store.get_file(f"{manifest.identity}/{file.file}", out)
    found = await asyncio.to_thread(sha256_file, out)
    if found != file.sha256:
        reason = f"sha256 is {found[:12]}…, the manifest says {file.sha256[:12]}…"
        raise StoreError(f"{manifest.identity}/{file.file}", reason)


async def _restore(
    spec: CycleSpec,
    service: HotLoadClient,
    store: Store,
    manifest: SnapshotManifest,
    shard: Shard,
    staged: Path,
) -> None:
    """Rebuild one full shard from the previous baseline and its delta."""
    delta = staged / f"{shard.file}.delta"
    await _fetch(spec, service, store, manifest, shard, delta)
    base = baseline_dir(spec, service) / str(manifest.previous) / shard.file
    out = staged / shard.file
    found = await asyncio.to_thread(apply_file, base, delta, out)
    delta.unlink()
    if found != shard.content_sha256:
        reason = f"restored sha256 is {found[:12]}…, the manifest says {shard.content_sha256[:12]}…"
        raise DeltaError(shard.file, reason)


def _copied(source: Path, file: Shard | FileDigest, out: Path) -> bool:
    """Whether `source` is what the manifest says of `file`; `out` is then a copy of it."""
    try:
        if source.stat().st_size != file.size_bytes or sha256_file(source) != file.sha256:
            return False
    except (OSError, InvalidCheckpointError):
        return False
    return copy_file(source, out) == file.sha256


def _is_whole(directory: Path, manifest: SnapshotManifest) -> bool:
    expected = {shard.file: shard.content_sha256 for shard in manifest.shards}
    expected |= {side_file.file: side_file.sha256 for side_file in manifest.side_files}
    try:
        return all(sha256_file(directory / file) == digest for file, digest in expected.items())
    except InvalidCheckpointError:
        return False  # a file is gone or cannot be read


def _keep_only(parent: Path, identity: str) -> None:
    if parent.is_dir():
        for directory in parent.iterdir():
            if directory.name != identity:
                shutil.rmtree(directory, ignore_errors=True)
