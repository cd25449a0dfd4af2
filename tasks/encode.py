"""Encode: delta shards against the baseline, every frame decoded again before it may travel."""

import asyncio
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.context import TaskRunContext

from hotload.clock import monotonic
from hotload.delta.encode import DeltaStats
from hotload.directory.delta_codecs import ENVELOPES
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import AnyFile, sha256_file
from hotload.directory.relayout import CheckpointView
from hotload.directory.shards import encode_file, open_shard
from hotload.errors import (
    BaselineLostError,
    DeltaError,
    InvalidCheckpointError,
    SelfCheckError,
)
from hotload.publish.doors.api_dialect import DeltaCodec
from hotload.publish.snapshot import Shard, ShardBatch, SnapshotPlan
from hotload.publish.workspace import Workspace
from hotload.quantities import size
from hotload.records import FileDigest
from tasks import RETRIED
from tasks.validate import changed_since_validation

SHA256_OF_NOTHING = hashlib.sha256().hexdigest()


class DeltaEncoder:
    """Encodes the deltas of one plan, on one thread a core for as long as it is open.

    Args:
        digests: what they know of the checkpoint, and stays as it is, is not summed again.
        codec: which deltas the service takes.
    """

    def __init__(
        self,
        workspace: Workspace,
        view: CheckpointView,
        plan: SnapshotPlan,
        digests: FileDigests,
        codec: DeltaCodec = "arc_v2",
    ) -> None:
        self.workspace, self.view, self.plan, self.digests = workspace, view, plan, digests
        self.codec: DeltaCodec = codec
        # numpy and zstd release the interpreter lock, so threads use every core there is.
        self._pool = ThreadPoolExecutor(os.cpu_count(), "encode")

    def __enter__(self) -> "DeltaEncoder":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def directory(self) -> Path:
        """Where the deltas lie."""
        return self.workspace.delta(self.plan.identity)

    async def encode(self, batch: tuple[FileDigest, ...]) -> ShardBatch:
        """Encode the shards of `batch` one after the other; see `encode_shards`."""
        ended = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._encode, batch, ended)
        finally:
            ended.set()  # when another batch has failed, its thread stops at the next shard

    def _encode(self, batch: tuple[FileDigest, ...], ended: threading.Event) -> ShardBatch:
        previous = str(self.plan.previous)
        base, out = self.workspace.baseline(previous), self.directory
        out.mkdir(parents=True, exist_ok=True)
        shards: list[Shard] = []
        start = monotonic()
        for shard in batch:
            if ended.is_set():
                raise asyncio.CancelledError
            source = self.view.file(shard.file)
            _require_base(base / shard.file, previous)
            try:
                delta = self._encode_file(base / shard.file, source, out / shard.file)
            except DeltaError as error:
                raise SelfCheckError(shard.file, str(error)) from error
            if delta.target_sha256 != shard.sha256:
                raise changed_since_validation(shard.file, shard.sha256, delta.target_sha256)
            is_left_out = not (ENVELOPES[self.codec].has_every_tensor or delta.has_changed)
            if is_left_out:
                (out / shard.file).unlink()
            shards.append(
                Shard(
                    file=shard.file,
                    size_bytes=0 if is_left_out else delta.size_bytes,
                    sha256=SHA256_OF_NOTHING if is_left_out else delta.sha256,
                    content_size_bytes=delta.content_size_bytes,
                    content_sha256=delta.content_sha256,
                )
            )
        return ShardBatch(shards=tuple(shards), encode_seconds=monotonic() - start)

    def _encode_file(self, base: Path, target: AnyFile, out: Path) -> DeltaStats:
        encode = partial(
            encode_file, base, target, out, envelope=ENVELOPES[self.codec], self_check=True
        )
        known = self.digests.known(target)
        delta = encode(target_sha256=known)
        if known is not None and self.digests.known(target) != known:  # it was touched meanwhile
            delta = encode()
        return delta


def encode_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Make the cache key: service, identity, previous, codec, digest of every shard's content."""
    encoder: DeltaEncoder = parameters["encoder"]
    workspace, plan = encoder.workspace, encoder.plan
    facts = [
        ["encode", 3, workspace.account_id, workspace.deployment_id],
        [plan.identity, plan.previous, encoder.codec],
        [[shard.file, shard.sha256] for shard in parameters["batch"]],
    ]
    return "encode-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@task(
    cache_key_fn=encode_key,
    persist_result=True,
    result_serializer="json",
    task_run_name="encode-{batch[0].file}",
    **RETRIED,
)
async def encode_shards(encoder: DeltaEncoder, batch: tuple[FileDigest, ...]) -> ShardBatch:
    """Encode shards of the checkpoint against the baseline of the previous identity (wire-format
    §2).

    Every frame is decoded again and compared with what went into it, bit for bit, while that is in
    memory (protocol §18, self-check). Written to a temporary file and renamed.

    Raises:
        InvalidCheckpointError: the trainer changed a file since it was validated.
        BaselineLostError, SelfCheckError: a delta cannot be had; a full snapshot can.
    """
    encoded = await encoder.encode(batch)
    sent = sum(shard.size_bytes for shard in encoded.shards)
    full = sum(shard.content_size_bytes for shard in encoded.shards)
    get_run_logger().info("%s of %s in %d shards", size(sent), size(full), len(batch))
    return encoded


async def encode_once(encoder: DeltaEncoder, batch: tuple[FileDigest, ...]) -> ShardBatch:
    """Run `encode_shards`, or take its cached result where the files are still what it says."""
    encode = encode_shards.with_options(result_storage=encoder.workspace.results)
    encoded = await encode(encoder, batch)
    if not await asyncio.to_thread(_lie_in, encoder.directory, encoded.shards):
        encoded = await encode.with_options(refresh_cache=True)(encoder, batch)
    return encoded


def _require_base(path: Path, identity: str) -> None:
    """Return if the base can be read; if not that is ours to mend, not the trainer's."""
    try:
        with open_shard(path):
            return
    except InvalidCheckpointError as error:
        raise BaselineLostError(identity, str(error)) from error


def _lie_in(directory: Path, shards: tuple[Shard, ...]) -> bool:
    return all(
        (directory / shard.file).is_file() and sha256_file(directory / shard.file) == shard.sha256
        for shard in shards
        if shard.size_bytes
    )
