"""Find the record of a snapshot in the store."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from hotload.clients.store import Store
from hotload.clients.store.records import read_snapshot_manifest
from hotload.publish.snapshot import SnapshotManifest
from tasks import RETRIED


@task(cache_policy=NO_CACHE, task_run_name="manifest-{identity}", **RETRIED)
async def find_manifest(store: Store, identity: str) -> SnapshotManifest | None:
    """Read a manifest as `read_manifest` does, again while the store does not answer."""
    return await read_snapshot_manifest(store, identity)
