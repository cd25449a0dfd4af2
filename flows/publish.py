"""Publish: the policy to every replica by one snapshot, and by a full one when a delta failed."""

from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store, publisher_lease
from hotload.errors import FullSnapshotFailedError, NeedsFullSnapshotError
from hotload.identity import SnapshotKind
from hotload.options import LedgerReset
from hotload.publish.lease import Lease
from hotload.publish.publication import Publication, Published
from hotload.publish.snapshot import CheckpointContent, ShardBatch, SnapshotPlan, batches
from hotload.publish.workspace import Workspace
from hotload.records import FileDigest
from hotload.sampling.concurrently import overlap
from hotload.spec import CycleSpec
from tasks.announce import hint_shards, reset_ledger, signal_snapshot
from tasks.baseline import Baseline, keep_baseline
from tasks.encode import DeltaEncoder, encode_once
from tasks.plan import plan_fallback, plan_snapshot
from tasks.preflight import preflight_service
from tasks.publication import find_publication, record_publication
from tasks.records import find_manifest
from tasks.show import Progress, emit_fallback, emit_served
from tasks.upload import upload_manifests, upload_once
from tasks.validate import validate_checkpoint, validate_rollouts
from tasks.wait import wait_for_replicas, wait_until_ready

# Every task run costs the server work (about 30 ms), so many shards share one.
BATCHES = 25
FULLS_TRIED = 2


async def publish_policy(
    spec: CycleSpec, service: HotLoadClient, baseline: Baseline, right_to_publish: AsyncExitStack
) -> Publication:
    """Publish this policy version, or find what an earlier run of the cycle published.

    On-policy the right to publish stays held when this returns, so that no other cycle changes the
    weights that the caller samples. Where the spec lets the next cycle publish meanwhile, the right
    is given back, and the record of the publication lets a cycle that is killed go on sampling.

    Args:
        right_to_publish: holds the publisher's lease; its owner gives it back.

    Raises:
        LeaseLostError: another cycle publishes to this service.
        InvalidCheckpointError, InvalidProblemsError, RewardError, RolloutFunctionError: the
            caller's input; nothing was uploaded.
        FullSnapshotFailedError, SnapshotRejectedError: as `full_snapshot`.
    """
    if not spec.sampling.may_overlap:
        return await _publish(spec, service, baseline, right_to_publish)
    store = baseline.store
    if publication := await find_publication(store, spec.name, baseline.checkpoint):
        return publication
    publication = await _publish(spec, service, baseline, right_to_publish)
    await keep_baseline(baseline, publication.snapshot.identity)
    await record_publication(store, spec.name, publication)
    await right_to_publish.aclose()
    return publication


async def _publish(
    spec: CycleSpec, service: HotLoadClient, baseline: Baseline, right_to_publish: AsyncExitStack
) -> Publication:
    """Publish what the plan says, and by a full snapshot where that cannot be loaded."""
    store, readiness = baseline.store, spec.readiness
    content = await validate_checkpoint(spec, service, baseline.digests)
    await validate_rollouts(spec)
    lease = await right_to_publish.enter_async_context(publisher_lease(store, spec.name))
    expected = await preflight_service(spec.name, service, store, readiness.replica_count)
    await wait_for_replicas(spec.name, service, readiness, expected)
    plan = await plan_snapshot(spec, service, baseline, content)
    fallback = None
    try:
        snapshot = await publish_snapshot(spec, service, store, content, plan, lease, expected)
    except NeedsFullSnapshotError as reason:
        fallback = str(reason)
        emit_fallback(spec, plan, fallback)
        snapshot = await full_snapshot(spec, content, fallback, lease, expected)
    return Publication(content=content, snapshot=snapshot, fallback=fallback)


async def publish_snapshot(
    spec: CycleSpec,
    service: HotLoadClient,
    store: Store,
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
    started, began_at = monotonic(), datetime.now(UTC)
    manifest = await find_manifest(store, plan.identity)
    carried: list[ShardBatch] = []
    if manifest is None:
        checkpoint = Path(spec.checkpoint)
        workspace = Workspace(Path(spec.work_dir), service.account_id, service.deployment_id)
        progress = Progress(f"{plan.kind.value} {plan.identity}", content.size_bytes)
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
    published = Published.of(
        manifest, plan.reason, carried, convergence, warnings, seconds, began_at=began_at
    )
    emit_served(spec, published)
    return published


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


# A flow run of its own, with the reason among its parameters: a fallback is to be seen. Blocks are
# loaded again, because Prefect would store a flow's parameters.
@flow(name="full-snapshot", flow_run_name="full-for-{spec.name}")
async def full_snapshot(
    spec: CycleSpec,
    content: CheckpointContent,
    reason: str,
    lease: Lease,
    expected_replica_count: int | None,
) -> Published:
    """Publish a full snapshot under a new identity because of `reason`: the fallback.

    The ladder of protocol §18: a full, one more full, and where the spec allows it a ledger reset
    and a last full. A full that the service refuses by validation ends the ladder at once.

    Raises:
        FullSnapshotFailedError: the ladder has no more rungs.
        SnapshotRejectedError: the service refuses the checkpoint itself.
    """
    service = (await HotLoadService.load(spec.service)).open()
    store = (await CheckpointStore.load(spec.store)).open()
    may_reset = spec.snapshot.ledger_reset is LedgerReset.ON_FAILURE
    for rung in range(FULLS_TRIED + may_reset):
        if rung == FULLS_TRIED:
            await reset_ledger(service)
        plan = await plan_fallback(store, content, reason, spec.run_id, spec.policy_version)
        try:
            return await publish_snapshot(
                spec, service, store, content, plan, lease, expected_replica_count
            )
        except NeedsFullSnapshotError as error:
            reason = str(error)
    raise FullSnapshotFailedError(plan.identity, reason)
