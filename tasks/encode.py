"""Encode: delta shards against the baseline, each decoded again before it may travel."""

import asyncio
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

from prefect import get_run_logger, task
from prefect.context import TaskRunContext

from hotload.clients.service import HotLoadClient
from hotload.directory.files import encode_file, open_shard, sha256_file, verify_file
from hotload.errors import (
    BaselineLostError,
    DeltaError,
    InvalidCheckpointError,
    SelfCheckError,
)
from hotload.publish.places import baseline_dir, delta_dir, results_dir
from hotload.publish.snapshot import Shard, SnapshotPlan
from hotload.quantities import size
from hotload.records import FileDigest, Record
from hotload.spec import CycleSpec
from tasks.validate import changed_since_validation

# numpy and zstd release the interpreter lock, so threads use every core there is.
ENCODERS = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="encode")


class EncodedBatch(Record):
    """Delta shards that lie finished and verified on this machine."""

    shards: tuple[Shard, ...]
    encode_seconds: float
    verify_seconds: float

    @classmethod
    def as_is(cls, batch: tuple[FileDigest, ...]) -> "EncodedBatch":
        """The shards of a full snapshot: stored as the trainer wrote them."""
        shards = tuple(
            Shard(
                file=shard.file,
                size_bytes=shard.size_bytes,
                sha256=shard.sha256,
                content_size_bytes=shard.size_bytes,
                content_sha256=shard.sha256,
            )
            for shard in batch
        )
        return cls(shards=shards, encode_seconds=0, verify_seconds=0)


def encode_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Cache key: service, identity, previous, codec, and the digest of every shard's content."""
    service, plan = parameters["service"], parameters["plan"]
    facts = [
        ["encode", 1, service.account_id, service.deployment_id],
        [plan.identity, plan.previous, "arc_v2"],
        [[shard.file, shard.sha256] for shard in parameters["batch"]],
    ]
    return "encode-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@task(
    cache_key_fn=encode_key,
    persist_result=True,
    result_serializer="json",
    task_run_name="encode-{batch[0].file}",
)
async def encode_shards(
    spec: CycleSpec, service: HotLoadClient, plan: SnapshotPlan, batch: tuple[FileDigest, ...]
) -> EncodedBatch:
    """Delta shards of `batch` against the baseline of `plan.previous` (wire-format §2).

    Every delta is decoded with its base and compared with the target bit for bit before it is
    believed (protocol §18, self-check). Written to a temporary file and renamed.

    Raises:
        InvalidCheckpointError: the trainer changed a file since it was validated.
        BaselineLostError, SelfCheckError: a delta cannot be had; a full snapshot can.
    """
    ended = threading.Event()
    loop = asyncio.get_running_loop()
    try:
        encoded = await loop.run_in_executor(ENCODERS, _encode, spec, service, plan, batch, ended)
    finally:
        ended.set()  # when another batch has failed, its thread stops at the next shard
    sent = sum(shard.size_bytes for shard in encoded.shards)
    full = sum(shard.content_size_bytes for shard in encoded.shards)
    get_run_logger().info("%s of %s in %d shards", size(sent), size(full), len(batch))
    return encoded


async def encode_once(
    spec: CycleSpec, service: HotLoadClient, plan: SnapshotPlan, batch: tuple[FileDigest, ...]
) -> EncodedBatch:
    """`encode_shards`, or its cached result where the files it names are still what it says."""
    encode = encode_shards.with_options(result_storage=results_dir(spec, service))
    encoded = await encode(spec, service, plan, batch)
    directory = delta_dir(spec, service) / plan.identity
    if not await asyncio.to_thread(_lie_in, directory, encoded.shards):
        encoded = await encode.with_options(refresh_cache=True)(spec, service, plan, batch)
    return encoded


def _encode(
    spec: CycleSpec,
    service: HotLoadClient,
    plan: SnapshotPlan,
    batch: tuple[FileDigest, ...],
    ended: threading.Event,
) -> EncodedBatch:
    base = baseline_dir(spec, service) / str(plan.previous)
    target = Path(spec.checkpoint)
    out = delta_dir(spec, service) / plan.identity
    out.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    encode_seconds = verify_seconds = 0.0
    for shard in batch:
        if ended.is_set():
            raise asyncio.CancelledError
        _require_base(base / shard.file, plan)
        start = monotonic()
        delta = encode_file(
            base / shard.file,
            target / shard.file,
            out / shard.file,
        )
        encode_seconds += monotonic() - start
        if delta.target_sha256 != shard.sha256:
            raise changed_since_validation(shard.file, shard.sha256, delta.target_sha256)
        start = monotonic()
        try:
            verify_file(base / shard.file, out / shard.file, target / shard.file)
        except DeltaError as error:
            raise SelfCheckError(shard.file, str(error)) from error
        verify_seconds += monotonic() - start
        shards.append(
            Shard(
                file=shard.file,
                size_bytes=delta.size_bytes,
                sha256=delta.sha256,
                content_size_bytes=delta.content_size_bytes,
                content_sha256=delta.content_sha256,
            )
        )
    return EncodedBatch(
        shards=tuple(shards), encode_seconds=encode_seconds, verify_seconds=verify_seconds
    )


def _require_base(path: Path, plan: SnapshotPlan) -> None:
    """A base that cannot be read is ours to mend, not the trainer's."""
    try:
        with open_shard(path):
            return
    except InvalidCheckpointError as error:
        raise BaselineLostError(str(plan.previous), str(error)) from error


def _lie_in(directory: Path, shards: tuple[Shard, ...]) -> bool:
    return all(
        (directory / shard.file).is_file() and sha256_file(directory / shard.file) == shard.sha256
        for shard in shards
    )
