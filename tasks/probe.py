"""Probe: ask every replica about fixed tokens, after all of them report the snapshot."""

import asyncio
from pathlib import Path
from typing import NoReturn

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.checkpoint.names import CONFIG_FILE
from hotload.checkpoint.safetensors import read_json_object
from hotload.checkpoint.sub_configs import vocab_size
from hotload.clients.inference.client import InferenceClient
from hotload.clock import monotonic
from hotload.directory.places import Directory, RemotePlace
from hotload.directory.shards import DOCUMENT_LIMIT_BYTES, read_document
from hotload.errors import (
    Finding,
    InvalidCheckpointError,
    LoadFailedError,
    ServiceError,
    ServiceRefusedError,
    StoreError,
)
from hotload.options import ReadinessPolicy
from hotload.publish.probe import (
    PROBE_FILE,
    PROBE_LIMIT_BYTES,
    Probe,
    ProbeAnswer,
    what_differs,
)
from hotload.publish.snapshot import SnapshotManifest


@task(cache_policy=NO_CACHE, task_run_name="probe-{manifest.identity}")
async def probe_replicas(
    client: InferenceClient,
    probe: Probe | None,
    manifest: SnapshotManifest,
    readiness: ReadinessPolicy,
    replica_count: int,
) -> tuple[str, ...]:
    """Compare the replicas' answers with each other and with the trainer's figures.

    A replica cannot be addressed: up to `probe_sessions` sessions are asked, within
    `weight_sync_timeout` seconds, until as many replicas have answered as there are. Requests may
    fail right after a swap; the next is sent after a pause. What could not be compared is a
    warning, and returned.

    Raises:
        LoadFailedError: one differs, or answers by other weights than it reports.
        ServiceRefusedError: the key or the account is wrong.
    """
    if probe is None:
        return ("not probed: config.json names no vocab_size, and there is no probe.json",)
    answers: list[ProbeAnswer] = []
    failure, deadline = "", monotonic() + readiness.weight_sync_timeout
    for number in range(readiness.probe_sessions):
        if monotonic() >= deadline:
            failure = f"{readiness.weight_sync_timeout:g} s were over"
            break
        try:
            session = f"probe-{manifest.identity}-{number}"
            answer = await client.ask_logprobs(probe.token_ids, session)
        except ServiceError as error:
            if isinstance(error, ServiceRefusedError) and error.status_code != 404:
                raise
            failure = str(error)
            await asyncio.sleep(readiness.poll_interval_seconds)
            continue
        if answer.identity not in (None, manifest.identity):
            # Every replica that counts has just reported ours; a fraction of them may be enough.
            reason = f"probe: {answer.name} answers by {answer.identity}"
            if readiness.min_ready_fraction == 1:
                raise LoadFailedError(manifest.identity, reason)
            failure = reason
            continue
        if different := what_differs(answer, answers, probe, readiness.probe_tolerance):
            raise LoadFailedError(manifest.identity, different)
        answers.append(answer)
        if len({one.replica for one in answers} - {None}) >= replica_count:
            break
    seen = len({one.replica for one in answers} - {None})
    get_run_logger().info("probe: %d answers of %d replicas agree", len(answers), seen)
    if seen >= replica_count:
        return ()
    said = f"probe: {len(answers)} answers agree, of {seen} of {replica_count} replicas by name"
    return (f"{said}{failure and f'; {failure}'}",)


async def read_probe(checkpoint: Path | RemotePlace, *, has_figures: bool) -> Probe | None:
    """Read the trainer's `probe.json`, or make a probe over the vocabulary of its model; None where
    the config names none.

    Args:
        has_figures: whether the checkpoint is what is served; else its figures are left out.

    Raises:
        InvalidCheckpointError: `probe.json` is not a probe, or of another vocabulary.
    """
    return await asyncio.to_thread(_read_probe, checkpoint, has_figures)


def _read_probe(checkpoint: Path | RemotePlace, has_figures: bool) -> Probe | None:
    directory = checkpoint if isinstance(checkpoint, Path) else checkpoint.look()
    config = _document(directory, CONFIG_FILE) or b"{}"
    size = vocab_size(read_json_object(config, file=CONFIG_FILE))
    try:
        data = _document(directory, PROBE_FILE, PROBE_LIMIT_BYTES)
        if data is None:
            return None if size is None else Probe.over(size)
        probe = Probe.parse(data, path=PROBE_FILE)
    except StoreError as error:
        _refuse(error.reason, "token_ids, and logprobs one fewer, as docs/cycle.md shows")
    if size is not None and max(probe.token_ids) >= size:
        _refuse(f"token id {max(probe.token_ids)}", f"ids below config.json's vocab_size {size}")
    return probe if has_figures else probe.without_figures()


def _document(
    directory: Directory, name: str, limit_bytes: int = DOCUMENT_LIMIT_BYTES
) -> bytes | None:
    try:
        return read_document(directory / name, limit_bytes)
    except InvalidCheckpointError as error:
        if error.findings[0].rule == "missing_file":
            return None
        raise


def _refuse(found: str, expected: str) -> NoReturn:
    raise InvalidCheckpointError((Finding("probe", PROBE_FILE, None, found, expected),))
