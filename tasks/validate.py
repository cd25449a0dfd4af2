"""Validate: the trainer's checkpoint against every layout rule, and its digests."""

import asyncio
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from blocks.hot_load_service import HotLoadService
from hotload.checkpoint.names import CONFIG_FILE
from hotload.checkpoint.rules import check_full, check_lora, refuse_errors
from hotload.checkpoint.safetensors import Checkpoint, read_json_object
from hotload.directory.files import read_checkpoint, sha256_file
from hotload.errors import Finding, IdentityConflictError, InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import CheckpointContent
from hotload.records import FileDigest
from hotload.sampling.draw import load_rollout
from hotload.sampling.problems import read_problems
from hotload.sampling.reward.scorer import open_scorer
from hotload.spec import CycleSpec
from tasks.progress import Progress


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="validate-{spec.name}")
async def validate_checkpoint(spec: CycleSpec, service: HotLoadService) -> CheckpointContent:
    """The checkpoint's files with their digests, if it breaks no rule of wire-format §6.

    Reads every byte once; never cached, since only reading shows what the trainer wrote.

    Raises:
        InvalidCheckpointError: with one finding per broken rule.
    """
    checkpoint = await asyncio.to_thread(read_checkpoint, Path(spec.checkpoint))
    findings = await asyncio.to_thread(_check, spec, checkpoint, service)
    warnings = tuple(str(finding) for finding in refuse_errors(findings))
    for warning in warnings:
        get_run_logger().warning(warning)
    return await read_content(spec, checkpoint, warnings)


async def read_content(
    spec: CycleSpec, checkpoint: Checkpoint, warnings: tuple[str, ...] = ()
) -> CheckpointContent:
    """The checkpoint's files with their digests; reads every byte of its shards.

    Raises:
        InvalidCheckpointError: a file cannot be read.
    """
    total = sum(shard.size_bytes for shard in checkpoint.shards)
    progress = Progress(f"reading {spec.name}", total)
    shards = []
    for shard in checkpoint.shards:
        digest = await asyncio.to_thread(sha256_file, Path(spec.checkpoint) / shard.file)
        shards.append(FileDigest(file=shard.file, size_bytes=shard.size_bytes, sha256=digest))
        await progress.advance(shard.size_bytes)
    return CheckpointContent(
        kind=SnapshotKind.LORA if checkpoint.is_lora else SnapshotKind.FULL,
        shards=tuple(shards),
        side_files=checkpoint.side_files,
        warnings=warnings,
    )


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="problems-{spec.name}")
async def validate_rollouts(spec: CycleSpec) -> int:
    """How many problems there are, once they, the reward and the rollout function are known to be
    usable.

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


def _check(spec: CycleSpec, checkpoint: Checkpoint, service: HotLoadService) -> tuple[Finding, ...]:
    if checkpoint.is_lora:
        return check_lora(checkpoint, base_model=service.base_model)
    base_config, base_shapes = _base_model(spec)
    return check_full(
        checkpoint,
        base_config=base_config,
        base_shapes=base_shapes,
        extra_fields_ignore=service.extra_fields_ignore,
        spec_dtype_style=spec.snapshot.spec_dtype_style,
    )


def _base_model(
    spec: CycleSpec,
) -> tuple[dict[str, Any] | None, dict[str, tuple[int, ...] | None] | None]:
    """Config and shapes of the served base model, where the spec says where it lies."""
    if spec.base_model is None:
        return None, None
    base = read_checkpoint(Path(spec.base_model))
    config = read_json_object(base.documents.get(CONFIG_FILE, b""), file=f"base {CONFIG_FILE}")
    return config, {tensor.name: tensor.shape for _, tensor in base.tensors}


def changed_since_validation(file: str, expected: str, found: str) -> InvalidCheckpointError:
    """The error for a file whose SHA-256 is no longer what validation read."""
    finding = Finding(
        "changed_while_read",
        file,
        None,
        f"sha256 {found[:12]}…",
        f"sha256 {expected[:12]}…, as validated: a published checkpoint stays as it is",
    )
    return InvalidCheckpointError((finding,))


async def require_content(spec: CycleSpec, sha256: str, what_it_did: str) -> None:
    """Return if the checkpoint is what this cycle had before, or is gone, as a trainer may do.

    Raises:
        IdentityConflictError: it is another, under the same run and version.
    """
    if not await asyncio.to_thread(Path(spec.checkpoint).exists):
        return
    checkpoint = await asyncio.to_thread(read_checkpoint, Path(spec.checkpoint))
    found = (await read_content(spec, checkpoint)).sha256
    if found != sha256:
        digests = f"(sha256 {sha256[:12]}…, now {found[:12]}…)"
        raise IdentityConflictError(
            spec.name, f"the cycle has {what_it_did} other content {digests}"
        )
