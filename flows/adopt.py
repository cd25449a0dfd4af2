"""Adopt: record as ours the base that every replica serves under a name somebody else gave.

After it the next version is a delta on that base, which some doors demand: they take no other full
snapshot (docs/decisions/0018-other-doors.md).
"""

from contextlib import AsyncExitStack
from pathlib import Path

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from flows.publish import hold_services, load_services
from hotload.identity import check_identity
from hotload.publish.snapshot import SnapshotManifest
from hotload.spec import CycleSpec
from tasks.baseline import baseline_of, keep_baseline
from tasks.preflight import preflight_service, require_served
from tasks.upload import adopt_snapshot
from tasks.validate import validate_checkpoint


@flow(name="adopt-base", flow_run_name="adopt-{identity}-for-{spec.name}")
async def adopt_base(spec: CycleSpec, identity: str) -> SnapshotManifest:
    """Record the checkpoint of `spec` as what every replica serves under `identity`.

    Publishes and signals nothing. That the service's bytes are the checkpoint's is the caller's
    word, since no call reads them; the checksums of the first delta hold it to that.

    Raises:
        InvalidIdentityError: not every replica of every service serves it.
        IdentityConflictError: it is recorded, or lies in the store, with other content.
        InvalidCheckpointError: the checkpoint breaks a layout rule.
        LeaseLostError: a cycle publishes to one of the services.
    """
    check_identity(identity)
    services = await load_services(spec)
    store = (await CheckpointStore.load(spec.store)).open()
    workspace = services[spec.service].access.workspace(Path(spec.work_dir))
    baseline = await baseline_of(spec, workspace, store)
    content = await validate_checkpoint(spec, services.values(), baseline.digests)
    async with AsyncExitStack() as right_to_publish:
        await hold_services(right_to_publish, services, store, spec.name)
        for service in services.values():
            declared = spec.readiness.replica_count
            expected = await preflight_service(spec.name, service, store, declared)
            await require_served(service, identity, expected)
        manifest = await adopt_snapshot(store, content, spec, identity, baseline.digests)
        await keep_baseline(baseline, identity)
    return manifest
