"""Upload: shards first, then the files beside them, then our manifest (design, rule 2)."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from hotload.clients.store import Store
from hotload.clients.store.rank_records import count_attempts, read_committed
from hotload.clients.store.records import read_snapshot_manifest, write_manifest
from hotload.clients.store.side_files import in_order, put_again
from hotload.clock import monotonic, utc_now
from hotload.delta.dialects import Lineage
from hotload.directory.delta_codecs import write_delta_index
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import refuse_file
from hotload.directory.relayout import CheckpointView, file_in
from hotload.errors import IdentityConflictError, LayoutMismatchError
from hotload.publish.snapshot import (
    CheckpointContent,
    Shard,
    ShardBatch,
    SnapshotManifest,
    SnapshotPlan,
    adopted_plan,
)
from hotload.quantities import plural, size
from hotload.records import FileDigest
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.validate import changed_since_validation, view_of

# Where files to put lie: deltas in a directory of ours, all else in the trainer's checkpoint.
Source = Path | CheckpointView


def upload_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Make the cache key: store, identity, and the digest of every file as stored."""
    facts = [
        ["upload", 2, parameters["store"].url, parameters["identity"]],
        [[shard.file, shard.sha256] for shard in parameters["batch"].shards],
    ]
    return "upload-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@task(
    cache_key_fn=upload_key,
    persist_result=True,
    result_serializer="json",
    task_run_name="upload-{batch.shards[0].file}",
    **RETRIED,
)
async def upload_shards(
    store: Store, identity: str, source: Source, batch: ShardBatch, digests: FileDigests
) -> ShardBatch:
    """Put shards under `identity`; a shard is complete in the store or not visible.

    What `digests` knows, and has not changed since, is not read again for its digest.

    Raises:
        InvalidCheckpointError: a file is not what its digest says.
        StoreError: the store refuses.
    """
    start = monotonic()
    for shard in batch.shards:
        if shard.size_bytes:
            await put_file(store, identity, source, shard, digests)
    seconds = monotonic() - start
    sent = sum(shard.size_bytes for shard in batch.shards)
    get_run_logger().info("%s in %.1f s, %d shards", size(sent), seconds, len(batch.shards))
    return batch.model_copy(update={"upload_seconds": seconds})


async def upload_once(
    store: Store,
    identity: str,
    source: Source,
    batch: ShardBatch,
    results: Path,
    digests: FileDigests,
) -> ShardBatch:
    """Run `upload_shards`, or take its cached result where the store still has files of these
    sizes.
    """
    upload = upload_shards.with_options(result_storage=results)
    # Prefect's types do not know that an asynchronous task's state is awaited, too.
    state = await upload(store, identity, source, batch, digests, return_state=True)  # type: ignore[misc]
    uploaded: ShardBatch = await state.aresult()
    if state.name == "Cached" and not await are_stored(store, identity, batch.shards):
        again = upload.with_options(refresh_cache=True)
        uploaded = await again(store, identity, source, batch, digests)
    return batch.model_copy(update={"upload_seconds": uploaded.upload_seconds})


@task(cache_policy=NO_CACHE, task_run_name="stored-{shards[0].file}", **RETRIED)
async def are_stored(store: Store, identity: str, shards: tuple[Shard, ...]) -> bool:
    """Tell whether the store still has every one of `shards` under `identity`, by size."""
    put = [shard for shard in shards if shard.size_bytes]
    sizes = await asyncio.gather(*(store.size(f"{identity}/{shard.file}") for shard in put))
    return all(size == shard.size_bytes for size, shard in zip(sizes, put, strict=True))


@task(cache_policy=NO_CACHE, task_run_name="manifests-{plan.identity}", **RETRIED)
async def upload_manifests(
    store: Store,
    view: CheckpointView,
    plan: SnapshotPlan,
    content: CheckpointContent,
    shards: tuple[Shard, ...],
    digests: FileDigests,
    indexed: Path | None = None,
) -> SnapshotManifest:
    """Put the files beside the shards, index last, then record the snapshot as published.

    `view` is of the trainer's checkpoint. A delta carries the files that are served: where the
    trainer has saved one again in other words, the one of `previous`. One whose shards lie in
    `indexed` carries an index of its own instead, which says what it follows.

    Raises:
        InvalidCheckpointError: the trainer changed a file since it was validated.
        BaselineLostError: the store has lost a file of `previous`.
        LayoutMismatchError: `indexed`, and there is nothing to put.
        StoreError: the store refuses.
    """
    previous = plan.previous and await read_snapshot_manifest(store, plan.previous)
    side_files = previous.side_files if previous else content.side_files
    delta_index = None
    if indexed and plan.previous:
        files = [shard.file for shard in shards if shard.size_bytes]
        if not files:
            raise LayoutMismatchError("nothing has changed, and the service takes no empty delta")
        lineage = Lineage(plan.identity, plan.previous)
        delta_index = await asyncio.to_thread(write_delta_index, indexed, lineage, files)
        await put_file(store, plan.identity, indexed, delta_index, digests)
    for side_file in () if delta_index else in_order(side_files):
        if side_file in content.side_files:
            await put_file(store, plan.identity, view, side_file, digests)
        elif previous:
            await put_again(store, plan.identity, previous.side_files_at, side_file)
    manifest = SnapshotManifest.of(
        plan, content, shards, created_at=utc_now(), delta_index=delta_index
    )
    manifest = manifest.model_copy(update={"side_files": side_files})
    await write_manifest(store, manifest)
    return manifest


@task(cache_policy=NO_CACHE, task_run_name="adopt-{identity}", **RETRIED)
async def adopt_snapshot(
    store: Store,
    content: CheckpointContent,
    spec: CycleSpec,
    identity: str,
    digests: FileDigests,
) -> SnapshotManifest:
    """Put what the store lacks of the checkpoint under `identity`, then the manifest that names it.

    What lies there already is somebody else's and stays as it is.

    Raises:
        IdentityConflictError: it is recorded with other content, or a file there has another size.
        InvalidCheckpointError: the trainer changed a file since it was validated.
        StoreError: the store refuses.
    """
    if manifest := await read_snapshot_manifest(store, identity):
        if not manifest.is_of(content.sha256):
            found = f"sha256 {manifest.content_sha256[:12]}…, now {content.sha256[:12]}…"
            raise IdentityConflictError(identity, f"recorded with other content ({found})")
        return manifest
    files = (*content.shards, *content.side_files)
    missing = [file for file in files if await _is_missing(store, identity, file)]
    view = await view_of(spec)
    for file in missing:
        await put_file(store, identity, view, file, digests)
    plan = adopted_plan(identity, spec.run_id, spec.policy_version)
    shards = ShardBatch.as_written(content.shards).shards
    manifest = SnapshotManifest.of(plan, content, shards, created_at=utc_now())
    await write_manifest(store, manifest)
    get_run_logger().info("%s is adopted; %d of its files were put", identity, len(missing))
    return manifest


@task(cache_policy=NO_CACHE, task_run_name="adopt-{spec.name}", **RETRIED)
async def adopt_committed(store: Store, spec: CycleSpec) -> SnapshotManifest:
    """Take what the ranks of the trainer committed for this version as published: it is in the
    store, whole, and only the signal is missing.

    Raises:
        InvalidCheckpointError: no attempt was committed, or its files are gone.
        StoreError: the store refuses.
    """
    manifest = await read_committed(store, spec.name)
    if manifest is None:
        found = f"{plural(await count_attempts(store, spec.name), 'attempt')}, none committed"
        expected = "rank 0 commits before it triggers the cycle"
        refuse_file("not_committed", spec.name, found, expected)
    if await read_snapshot_manifest(store, manifest.identity) is None:
        # Rank 0 died after it had committed, or retention has removed the snapshot since.
        for file in manifest.stored_files:
            if await _is_missing(store, manifest.identity, file):
                expected = "what the ranks put: publish this version from a checkpoint"
                refuse_file("missing_file", f"{manifest.identity}/{file.file}", "none", expected)
        await write_manifest(store, manifest)
    return manifest


async def _is_missing(store: Store, identity: str, file: Shard | FileDigest) -> bool:
    stored = await store.size(f"{identity}/{file.file}")
    if stored in (None, file.size_bytes):
        return stored is None
    reason = (
        f"{file.file} lies in the store with {stored} bytes, the checkpoint's has"
        f" {file.size_bytes}: name the directory that the base was made from"
    )
    raise IdentityConflictError(identity, reason)


async def put_file(
    store: Store,
    identity: str,
    source: Source,
    file: Shard | FileDigest,
    digests: FileDigests,
) -> None:
    """Put one file of `source` under `identity`.

    Raises:
        InvalidCheckpointError: it is not what its digest says.
        StoreError: the store refuses.
    """
    path = file_in(source, file.file)
    await store.put_file(path, f"{identity}/{file.file}")
    # Looked at after it was read for the upload, so a change before or during it shows.
    found = await asyncio.to_thread(digests.of, path)
    if found != file.sha256:
        raise changed_since_validation(file.file, file.sha256, found)
