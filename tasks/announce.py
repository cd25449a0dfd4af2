"""Announce: hint each file as it arrives, signal the snapshot when it is whole (protocol §4,
§6)."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store, check_lease
from hotload.clients.store.records import mark_signalled
from hotload.errors import LoadFailedError, ServiceRefusedError, SnapshotRejectedError
from hotload.identity import SnapshotKind
from hotload.publish.chain import may_signal
from hotload.publish.lease import Lease
from hotload.publish.snapshot import ShardBatch, SnapshotManifest, SnapshotPlan
from tasks import RETRIED


@task(cache_policy=NO_CACHE, task_run_name="hint-{batch.shards[0].file}{service.label}")
async def hint_shards(
    service: HotLoadClient, store: Store, plan: SnapshotPlan, batch: ShardBatch
) -> ShardBatch:
    """Give the service early notice of shards and count those it took. Best effort: never fails a
    cycle.
    """
    taken = 0
    for shard in batch.shards:
        taken += await service.hint(
            identity=plan.identity,
            file=shard.file,
            uri=f"{store.url}/{plan.identity}/{shard.file}",
            size_bytes=shard.size_bytes,
            kind=plan.kind,
            previous=plan.previous,
        )
    return batch.model_copy(update={"hint_count": taken})


@task(cache_policy=NO_CACHE, task_run_name="signal-{manifest.identity}{service.label}", **RETRIED)
async def signal_snapshot(
    service: HotLoadClient, store: Store, manifest: SnapshotManifest, lease: Lease
) -> tuple[str, ...]:
    """Tell the service that the snapshot is complete, and return its warnings.

    The status is read first, also on a retry after an unclear answer, so a snapshot that the
    service has accepted is not signalled twice (protocol §4). The lease is checked last of all.

    Raises:
        ChainBrokenError: it is a delta and a replica is not on its previous identity.
        LoadFailedError: the service refuses the delta, or a replica reports an error for it.
        SnapshotRejectedError: the service refuses the full snapshot itself.
        LeaseLostError: another publisher has taken over.
    """
    if not may_signal(await service.observe(), manifest, service.access.api.codec):
        get_run_logger().info("%s was accepted before", manifest.identity)
        return ()
    # Before the mark too: a publisher that lost the lease must not make its delta doubtful.
    await check_lease(store, lease)
    await mark_signalled(store, service.access.service, manifest.identity)
    await check_lease(store, lease)
    try:
        return await service.signal(manifest)
    except SnapshotRejectedError as error:
        if error.status_code == 409 and (await service.observe()).mentions(manifest.identity):
            return ()
        # A refused full is about its files or its names, and the next full would have the same.
        if manifest.kind is SnapshotKind.DELTA:
            raise LoadFailedError(manifest.identity, str(error)) from None
        raise
    except ServiceRefusedError as error:
        # The names were right a moment ago, so this 404 is about the snapshot that a delta follows.
        if manifest.kind is SnapshotKind.DELTA and error.status_code == 404:
            raise LoadFailedError(manifest.identity, str(error)) from None
        raise


@task(cache_policy=NO_CACHE, task_run_name="reset-ledger{service.label}", **RETRIED)
async def reset_ledger(service: HotLoadClient) -> None:
    """Make the service forget every hot-loaded snapshot; base weights answer until the next
    full."""
    await service.reset_ledger()
