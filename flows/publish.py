"""Publish: one snapshot from the checkpoint to every replica; and the full one when that failed."""

from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.errors import FullSnapshotFailedError, NeedsFullSnapshotError
from hotload.identity import SnapshotKind
from hotload.publish.lease import Lease
from hotload.publish.publication import Published
from hotload.publish.snapshot import CheckpointContent, ShardBatch, SnapshotPlan, batches
from hotload.publish.workspace import Workspace
from hotload.records import FileDigest
from hotload.sampling.concurrently import overlap
from hotload.spec import CycleSpec, LedgerReset
from tasks.announce import hint_shards, reset_ledger, signal_snapshot
from tasks.encode import DeltaEncoder, encode_once
from tasks.plan import plan_fallback
from tasks.progress import Progress
from tasks.records import find_manifest
from tasks.upload import upload_manifests, upload_once
from tasks.wait import wait_until_ready

# Every task run costs the server work (about 30 ms), so many shards share one.
BATCHES = 25
FULLS_TRIED = 2


@flow(name="publish-snapshot", flow_run_name="{plan.kind.value}-{plan.identity}")
async def publish_snapshot(
    spec: CycleSpec,
    content: CheckpointContent,
    plan: SnapshotPlan,
    lease: Lease,
    expected_replica_count: int | None,
) -> Published:
    """Carry the planned snapshot to every replica.

    Shards durable, then manifests, then the signal (design, rule 2). Every step finds what an
    earlier run of it has done, so a killed publication goes on where it was.

    Raises:
        NeedsFullSnapshotError: a full snapshot under a new identity can still succeed.
    """
    service = (await HotLoadService.load(spec.service)).open()
    store = (await CheckpointStore.load(spec.store)).open()
    started, began_at = monotonic(), datetime.now(UTC)
    manifest = await find_manifest(store, plan.identity)
    carried: list[ShardBatch] = []
    if manifest is None:
        checkpoint = Path(spec.checkpoint)
        workspace = Workspace(Path(spec.work_dir), service.account_id, service.deployment_id)
        progress = await Progress.start(f"{plan.kind.value} {plan.identity}", content.size_bytes)
        with DeltaEncoder(workspace, checkpoint, plan) as encoder:
            carried = await overlap(
                _carry(encoder, service, store, batch, progress)
                for batch in batches(content.shards, BATCHES)
            )
        shards = tuple(shard for batch in carried for shard in batch.shards)
        manifest = await upload_manifests(store, checkpoint, plan, content, shards)
    published_at = monotonic()
    warnings = await signal_snapshot(service, store, manifest, lease)
    signalled_at = monotonic()
    convergence = await wait_until_ready(service, manifest, spec.readiness, expected_replica_count)
    seconds = {
        "publish": published_at - started,
        "signal": signalled_at - published_at,
        "converge": monotonic() - signalled_at,
    }
    return Published.of(
        manifest, plan.reason, carried, convergence, warnings, seconds, began_at=began_at
    )


async def _carry(
    encoder: DeltaEncoder,
    service: HotLoadClient,
    store: Store,
    files: tuple[FileDigest, ...],
    progress: Progress,
) -> ShardBatch:
    """Encode, upload and hint one batch, while other batches are at other steps."""
    plan, directory = encoder.plan, encoder.checkpoint
    batch = ShardBatch.as_written(files)
    if plan.kind is SnapshotKind.DELTA:
        batch, directory = await encode_once(encoder, files), encoder.directory
    batch = await upload_once(store, plan.identity, directory, batch, encoder.workspace.results)
    if service.hint_body_template is not None:
        batch = await hint_shards(service, store, plan, batch)
    await progress.advance(sum(file.size_bytes for file in files))
    return batch


@flow(name="full-snapshot", flow_run_name="full-for-{spec.name}")
async def full_snapshot(
    spec: CycleSpec,
    content: CheckpointContent,
    reason: str,
    lease: Lease,
    expected_replica_count: int | None,
) -> Published:
    """The fallback: publish a full snapshot under a new identity because of `reason`.

    The ladder of protocol §18: a full, one more full, and where the spec allows it a ledger reset
    and a last full. A full that the service refuses by validation ends the ladder at once.

    Raises:
        FullSnapshotFailedError: the ladder has no more rungs.
        SnapshotRejectedError: the service refuses the checkpoint itself.
    """
    may_reset = spec.snapshot.ledger_reset is LedgerReset.ON_FAILURE
    for rung in range(FULLS_TRIED + may_reset):
        service = (await HotLoadService.load(spec.service)).open()
        store = (await CheckpointStore.load(spec.store)).open()
        if rung == FULLS_TRIED:
            await reset_ledger(service)
        plan = await plan_fallback(store, content, reason, spec.run_id, spec.policy_version)
        try:
            return await publish_snapshot(spec, content, plan, lease, expected_replica_count)
        except NeedsFullSnapshotError as error:
            reason = str(error)
    raise FullSnapshotFailedError(plan.identity, reason)
