"""Validate: the trainer's checkpoint against every layout rule, and its digests."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.index_and_spec import SpecDtypeStyle
from hotload.checkpoint.names import CONFIG_FILE
from hotload.checkpoint.rules import check_full, check_lora, refuse_errors
from hotload.checkpoint.safetensors import ShardHeader, read_json_object
from hotload.clients.service import HotLoadClient
from hotload.directory.files import FileDigests
from hotload.directory.shards import read_checkpoint
from hotload.errors import Finding, IdentityConflictError, InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import CheckpointContent
from hotload.records import FileDigest
from hotload.sampling.concurrently import overlap
from hotload.sampling.draw import load_rollout
from hotload.sampling.problems import read_problems
from hotload.sampling.reward.scorer import open_scorer
from hotload.spec import CycleSpec
from tasks.show import Progress


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="validate-{spec.name}")
async def validate_checkpoint(
    spec: CycleSpec, service: HotLoadClient, digests: FileDigests
) -> CheckpointContent:
    """Read the checkpoint's files and their digests, and check every rule of wire-format §6.

    Never cached, since only reading shows what the trainer wrote; `digests` remembers what was
    read for later steps of this process.

    Raises:
        InvalidCheckpointError: with one finding per broken rule.
    """
    directory = Path(spec.checkpoint)
    checkpoint = await asyncio.to_thread(read_checkpoint, directory)
    style = spec.snapshot.spec_dtype_style
    findings = await asyncio.to_thread(_check, checkpoint, service, spec.base_model, style)
    warnings = tuple(str(finding) for finding in refuse_errors(findings))
    for warning in warnings:
        get_run_logger().warning(warning)
    return await _read_content(spec.name, directory, checkpoint, digests, warnings)


async def _read_content(
    name: str,
    directory: Path,
    checkpoint: Checkpoint,
    digests: FileDigests,
    warnings: tuple[str, ...] = (),
) -> CheckpointContent:
    """Read every byte of the shards for their digests, on one thread a core.

    Raises:
        InvalidCheckpointError: a file cannot be read.
    """
    progress = Progress(f"reading {name}", sum(shard.size_bytes for shard in checkpoint.shards))
    loop = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(os.cpu_count(), "digest")

    async def read(shard: ShardHeader) -> FileDigest:
        digest = await loop.run_in_executor(pool, digests.of, directory / shard.file)
        await progress.advance(shard.size_bytes)
        return FileDigest(file=shard.file, size_bytes=shard.size_bytes, sha256=digest)

    try:
        shards = await overlap(read(shard) for shard in checkpoint.shards)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return CheckpointContent(
        kind=SnapshotKind.LORA if checkpoint.is_lora else SnapshotKind.FULL,
        shards=tuple(shards),
        side_files=checkpoint.side_files,
        warnings=warnings,
    )


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="problems-{spec.name}")
async def validate_rollouts(spec: CycleSpec) -> int:
    """Count the problems, once they, the reward and the rollout function are known to be usable.

    Looked at before anything is published, so that a typing mistake costs no upload.

    Raises:
        InvalidProblemsError: the problem file cannot be read, is empty, or has a malformed row.
        RewardError: the reward cannot be imported.
        RolloutFunctionError: the rollout function cannot be used.
    """
    problems = await asyncio.to_thread(read_problems, spec.problems.dataset)
    if spec.sampling.rollout is not None:
        load_rollout(spec.sampling.rollout)
    async with open_scorer(spec.reward):
        return len(problems)


def _check(
    checkpoint: Checkpoint,
    service: HotLoadClient,
    base_model: str | None,
    spec_dtype_style: SpecDtypeStyle,
) -> tuple[Finding, ...]:
    if checkpoint.is_lora:
        return check_lora(checkpoint, base_model=service.base_model)
    base_config, base_shapes = _read_base_model(base_model) if base_model else (None, None)
    return check_full(
        checkpoint,
        base_config=base_config,
        base_shapes=base_shapes,
        extra_fields_ignore=service.extra_fields_ignore,
        spec_dtype_style=spec_dtype_style,
    )


def _read_base_model(directory: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...] | None]]:
    """Read config and shapes of the served base model."""
    base = read_checkpoint(Path(directory))
    config = read_json_object(base.documents.get(CONFIG_FILE, b""), file=f"base {CONFIG_FILE}")
    return config, {tensor.name: tensor.shape for _, tensor in base.tensors}


def changed_since_validation(file: str, expected: str, found: str) -> InvalidCheckpointError:
    """Make the error for a file whose SHA-256 is no longer what validation read."""
    finding = Finding(
        "changed_while_read",
        file,
        None,
        f"sha256 {found[:12]}…",
        f"sha256 {expected[:12]}…, as validated: a published checkpoint stays as it is",
    )
    return InvalidCheckpointError((finding,))


async def require_content(name: str, directory: Path, sha256: str, what_it_did: str) -> None:
    """Return if the checkpoint is what this cycle had before, or is gone, as a trainer may do.

    Raises:
        IdentityConflictError: it is another, under the same run and version.
    """
    if not await asyncio.to_thread(directory.exists):
        return
    checkpoint = await asyncio.to_thread(read_checkpoint, directory)
    found = (await _read_content(name, directory, checkpoint, FileDigests())).sha256
    if found != sha256:
        digests = f"(sha256 {sha256[:12]}…, now {found[:12]}…)"
        raise IdentityConflictError(name, f"the cycle has {what_it_did} other content {digests}")
