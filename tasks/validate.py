"""Validate: the checkpoint against every layout rule, its digests, and what is to be sampled."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from blocks.checkpoint_store import CheckpointStore
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.index_and_spec import SpecDtypeStyle
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from hotload.checkpoint.rules import check_full, check_lora, refuse_errors
from hotload.checkpoint.safetensors import ShardHeader, read_json_object
from hotload.clients.remote_checkpoint import RemoteCheckpoint
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import ComposedFile, refuse_file
from hotload.directory.relayout import CheckpointView, view_checkpoint
from hotload.directory.shards import read_checkpoint
from hotload.directory.supplied_digests import DIGESTS_FILE, read_supplied_digests
from hotload.errors import (
    Finding,
    HotLoadError,
    IdentityConflictError,
    InvalidCheckpointError,
    InvalidProblemsError,
    RewardError,
    RolloutFunctionError,
    raise_together,
)
from hotload.identity import SnapshotKind
from hotload.publish.lines import raise_line
from hotload.publish.snapshot import CheckpointContent
from hotload.records import FileDigest
from hotload.reward.answers import check_answers
from hotload.rollout.trajectory import Problem
from hotload.sampling.draw import load_rollout
from hotload.sampling.problems import read_declared
from hotload.sampling.reward.scorer import open_scorer
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.probe import read_probe
from tasks.show import Progress

ReadElsewhere = Callable[[Sequence[str]], Awaitable[Sequence[FileDigest]]]
"""Reads shards by their names where they are placed; returns their digests in that order."""


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="validate-{spec.name}", **RETRIED)
async def validate_checkpoint(
    spec: CycleSpec,
    services: Collection[HotLoadClient],
    digests: FileDigests,
    elsewhere: ReadElsewhere | None = None,
) -> CheckpointContent:
    """View the checkpoint as it would be published, check every rule of wire-format §6, as each of
    the services has it, and read the digests of its files.

    Never cached, since only reading shows what the trainer wrote; `digests` remembers what was
    read for later steps of this process.

    Args:
        elsewhere: has the shards read by the nodes that they are placed on, instead of here.

    Raises:
        InvalidCheckpointError: with one finding per broken rule.
    """
    view = await view_of(spec)
    checkpoint = view.checkpoint
    style = spec.snapshot.spec_dtype_style
    found = [
        await asyncio.to_thread(_check, checkpoint, service, spec.base_model, style)
        for service in services
    ]
    if not checkpoint.is_lora:
        found.append(await asyncio.to_thread(view.check_heads))
    findings = tuple(dict.fromkeys(finding for each in found for finding in each))
    warnings = tuple(str(finding) for finding in refuse_errors(findings))
    for warning in warnings:
        get_run_logger().warning(warning)
    if spec.readiness.probe_sessions:
        await read_probe(await place_of(spec), has_figures=True)
    if view.plan is not None:
        get_run_logger().info("%s", view.describe())
    if quantized := view.describe_quantization():
        get_run_logger().info("quantized: %s", quantized)
    if elsewhere is not None:
        shards = await elsewhere([shard.file for shard in checkpoint.shards])
        content = _content_of(checkpoint, shards, warnings)
    else:
        content = await read_content(
            spec.name, view, digests, warnings, is_trusted=spec.snapshot.trust_digests
        )
    if not checkpoint.is_lora:
        return content
    adapter = read_json_object(checkpoint.documents[ADAPTER_CONFIG_FILE], file=ADAPTER_CONFIG_FILE)
    return content.model_copy(update={"adapted_model": adapter["base_model_name_or_path"]})


async def place_of(spec: CycleSpec, location: str | None = None) -> Path | RemoteCheckpoint:
    """Find where the checkpoint of a cycle lies, with the options of a block where it is a URL.

    Args:
        location: another path or URL that is opened alike, such as of all checkpoints of the run.
    """
    location = location or spec.checkpoint
    if "://" not in location:
        return Path(location)
    store = (await CheckpointStore.load(spec.checkpoint_store or spec.store)).open()
    options = store.options if spec.checkpoint_store else store.options_for(location)
    return RemoteCheckpoint(location, options)


async def view_of(spec: CycleSpec) -> CheckpointView:
    """View the checkpoint of a cycle as it is published, whatever layout it is in.

    Raises:
        InvalidCheckpointError, StoreUnavailableError: as `view_checkpoint`.
    """
    style, place = spec.snapshot.spec_dtype_style, await place_of(spec)
    return await asyncio.to_thread(view_checkpoint, place, spec_dtype_style=style)


async def read_content(
    name: str,
    view: CheckpointView,
    digests: FileDigests,
    warnings: tuple[str, ...] = (),
    *,
    is_trusted: bool = False,
) -> CheckpointContent:
    """Read every byte of the shards for their digests, as `digest_shards` does.

    Raises:
        InvalidCheckpointError: as `digest_shards`.
    """
    checkpoint = view.checkpoint
    shards = await digest_shards(name, view, checkpoint.shards, digests, is_trusted=is_trusted)
    return _content_of(checkpoint, shards, warnings)


async def digest_shards(
    name: str,
    view: CheckpointView,
    headers: Sequence[ShardHeader],
    digests: FileDigests,
    *,
    is_trusted: bool = False,
) -> tuple[FileDigest, ...]:
    """Digest these shards, reading every byte of them, on one thread a core.

    Args:
        is_trusted: the digests beside them are believed; only what those do not tell is read.

    Raises:
        InvalidCheckpointError: a file cannot be read, or is not what its digest says.
    """
    if is_trusted:
        await asyncio.to_thread(_take_digests, view, headers, digests)
    progress = Progress(f"reading {name}", sum(shard.size_bytes for shard in headers))
    loop = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(os.cpu_count(), "digest")

    async def read(shard: ShardHeader) -> FileDigest:
        digest = await loop.run_in_executor(pool, digests.of, view.file(shard.file))
        await progress.advance(shard.size_bytes)
        return FileDigest(file=shard.file, size_bytes=shard.size_bytes, sha256=digest)

    try:
        return tuple(await overlap(read(shard) for shard in headers))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _content_of(
    checkpoint: Checkpoint, shards: Sequence[FileDigest], warnings: tuple[str, ...]
) -> CheckpointContent:
    return CheckpointContent(
        kind=SnapshotKind.LORA if checkpoint.is_lora else SnapshotKind.FULL,
        shards=tuple(shards),
        side_files=checkpoint.side_files,
        warnings=warnings,
    )


def _take_digests(
    view: CheckpointView, headers: Sequence[ShardHeader], digests: FileDigests
) -> None:
    supplied = read_supplied_digests(view.directory)
    for shard in headers:
        path = view.file(shard.file)
        if isinstance(path, ComposedFile) or path.name not in supplied:
            continue  # one of the served layout's, of which the trainer knows nothing
        expected, found = supplied[path.name], digests.known(path)
        if found not in (None, expected):
            refuse_file("digests", path.name, f"sha256 {found}", f"{expected}, as {DIGESTS_FILE}")
        digests.note(path, expected)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="problems-{spec.name}", **RETRIED)
async def validate_rollouts(spec: CycleSpec, store: Store) -> int:
    """Count the problems, once they, their answers, the reward and the rollout function are known
    to be usable.

    Looked at before anything is published, so that a typing mistake costs no upload.

    Args:
        store: whose options open a dataset that lies in the same bucket.

    Raises:
        InvalidProblemsError: the dataset cannot be read, is empty, has a malformed row, or answers
            that the reward cannot use.
        RewardError: the reward cannot be used.
        RolloutFunctionError: the rollout function cannot be used.
        InvalidInputError: several of them.
    """
    faults: list[HotLoadError] = []
    declared, problems = spec.to_sample, tuple[Problem, ...]()
    try:
        problems = await read_declared(declared, store)
        _check_offers(spec, problems)
    except InvalidProblemsError as error:
        faults.append(error)
    if spec.sampling.rollout is not None:
        try:
            load_rollout(spec.sampling.rollout)
        except RolloutFunctionError as error:
            faults.append(error)
    try:
        async with open_scorer(spec.reward):
            await asyncio.to_thread(check_answers, declared, problems, spec.reward)
    except (InvalidProblemsError, RewardError) as error:
        faults.append(error)
    raise_together(faults)
    return len(problems)


def _check_offers(spec: CycleSpec, problems: Sequence[Problem]) -> None:
    """Refuse tools that would not be offered: a chat alone can have them.

    Raises:
        InvalidProblemsError: naming a row.
    """
    if spec.sampling.rollout is not None:
        return  # it may make a chat of the prompt
    for number, problem in enumerate(problems, 1):
        if problem.messages is None and problem.extra.get("tools"):
            reason = "`tools`: only a chat is offered tools; give the prompt as `messages`"
            raise InvalidProblemsError(spec.to_sample.dataset, number, reason)


async def check_both(
    checkpoint: Coroutine[Any, Any, CheckpointContent], rollouts: Coroutine[Any, Any, int]
) -> CheckpointContent:
    """Run both validations to their ends, so that the faults of all are told at once.

    Raises:
        As `validate_checkpoint` and `validate_rollouts`; InvalidInputError for several.
    """
    content, count = await asyncio.gather(checkpoint, rollouts, return_exceptions=True)
    faults = [one for one in (content, count) if isinstance(one, BaseException)]
    ours = [fault for fault in faults if isinstance(fault, HotLoadError)]
    if len(ours) < len(faults):
        raise next(fault for fault in faults if not isinstance(fault, HotLoadError))
    raise_together(ours)
    assert isinstance(content, CheckpointContent)
    return content


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


async def require_content(spec: CycleSpec, line: int, sha256: str, what_it_did: str) -> None:
    """Return if the checkpoint is what this cycle had before, or is gone, as a trainer may do.

    Args:
        line: the newest line of the run.

    Raises:
        IdentityConflictError: it is another, under the same run and version.
    """
    if spec.is_of_ranks:  # committed once, so it cannot differ
        return
    try:
        view = await view_of(spec)
    except InvalidCheckpointError as error:
        if error.findings[0].rule == "missing_directory":
            return
        raise
    is_trusted = spec.snapshot.trust_digests
    found = (await read_content(spec.name, view, FileDigests(), is_trusted=is_trusted)).sha256
    if found != sha256:
        digests = f"(sha256 {sha256[:12]}…, now {found[:12]}…)"
        reason = f"the cycle has {what_it_did} other content {digests}"
        raise IdentityConflictError(spec.name, f"{reason}; {raise_line(line)}")
