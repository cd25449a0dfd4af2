"""Upload: shards first, then the files beside them, then our manifest (design, rule 2)."""

import asyncio
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from hotload.clients.store import Store
from hotload.clients.store.records import write_manifest
from hotload.directory.files import sha256_file
from hotload.publish.snapshot import (
    CheckpointContent,
    Shard,
    ShardBatch,
    SnapshotManifest,
    SnapshotPlan,
)
from hotload.quantities import size
from hotload.records import FileDigest
from tasks import RETRIED
from tasks.validate import changed_since_validation

# Read by whoever looks for a snapshot's names, so they follow everything they name.
MANIFESTS_LAST = ("config.json", "model.weight.spec.json", "model.safetensors.index.json")


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
    store: Store, identity: str, directory: str, batch: ShardBatch
) -> ShardBatch:
    """Put shards from `directory` under `identity`; a shard is complete in the store or not
    visible.

    Raises:
        InvalidCheckpointError: a file is not what its digest says.
        StoreError: the store refuses.
    """
    start = monotonic()
    for shard in batch.shards:
        await _put(store, identity, Path(directory), shard)
    seconds = monotonic() - start
    sent = sum(shard.size_bytes for shard in batch.shards)
    get_run_logger().info("%s in %.1f s, %d shards", size(sent), seconds, len(batch.shards))
    return batch.model_copy(update={"upload_seconds": seconds})


async def upload_once(
    store: Store, identity: str, directory: Path, batch: ShardBatch, results: Path
) -> ShardBatch:
    """Run `upload_shards`, or take its cached result where the store still has files of these
    sizes.
    """
    upload = upload_shards.with_options(result_storage=results)
    # Prefect's types do not know that an asynchronous task's state is awaited, too.
    state = await upload(store, identity, str(directory), batch, return_state=True)  # type: ignore[misc]
    uploaded: ShardBatch = await state.aresult()
    if state.name == "Cached" and not await are_stored(store, identity, batch.shards):
        again = upload.with_options(refresh_cache=True)
        uploaded = await again(store, identity, str(directory), batch)
    return batch.model_copy(update={"upload_seconds": uploaded.upload_seconds})


@task(cache_policy=NO_CACHE, task_run_name="stored-{shards[0].file}", **RETRIED)
async def are_stored(store: Store, identity: str, shards: tuple[Shard, ...]) -> bool:
    """Tell whether the store still has every one of `shards` under `identity`, by size."""
    sizes = await asyncio.gather(*(store.size(f"{identity}/{shard.file}") for shard in shards))
    return all(size == shard.size_bytes for size, shard in zip(sizes, shards, strict=True))


@task(cache_policy=NO_CACHE, task_run_name="manifests-{plan.identity}", **RETRIED)
async def upload_manifests(
    store: Store,
    directory: Path,
    plan: SnapshotPlan,
    content: CheckpointContent,
    shards: tuple[Shard, ...],
) -> SnapshotManifest:
    """Put the files beside the shards, index last, then record the snapshot as published.

    `directory` is the trainer's.

    Raises:
        InvalidCheckpointError: the trainer changed a file since it was validated.
        StoreError: the store refuses.
    """
    order = {name: rank for rank, name in enumerate(MANIFESTS_LAST, start=1)}
    for side_file in sorted(content.side_files, key=lambda one: (order.get(one.file, 0), one.file)):
        await _put(store, plan.identity, directory, side_file)
    manifest = SnapshotManifest.of(plan, content, shards, created_at=datetime.now(UTC))
    await write_manifest(store, manifest)
    return manifest


async def _put(store: Store, identity: str, directory: Path, file: Shard | FileDigest) -> None:
    path = directory / file.file
    await store.put_file(path, f"{identity}/{file.file}")
    # Hashed after it was read for the upload, so a change before or during it shows.
    found = await asyncio.to_thread(sha256_file, path)
    if found != file.sha256:
        raise changed_since_validation(file.file, file.sha256, found)
