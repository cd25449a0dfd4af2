"""Publication: the record that a cycle has published, kept while it samples and others may publish,
and the events that tell an automation of it.

Without the record a cycle that was killed while sampling would be refused when it starts again: the
service may serve a later version by then.
"""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from hotload.clients.store import Store
from hotload.publish.publication import Publication, Published
from hotload.publish.snapshot import MANIFEST_LIMIT_BYTES, SnapshotPlan
from hotload.spec import CycleSpec
from tasks.retrying import RETRIED
from tasks.validate import require_content

PUBLICATIONS = "_hotload/publications"


@task(cache_policy=NO_CACHE, task_run_name="publication-{name}", **RETRIED)
async def find_publication(store: Store, name: str, checkpoint: Path) -> Publication | None:
    """Find what cycle `name` has published, if an earlier run of it came so far.

    The checkpoint is compared with it while there is one; a trainer may have removed it since.

    Raises:
        IdentityConflictError: it published other content under the same run and version.
        StoreError: the record cannot be read.
    """
    path = f"{PUBLICATIONS}/{name}.json"
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    publication = Publication.parse(data, path=path)
    await require_content(name, checkpoint, publication.content.sha256, "published")
    return publication


@task(cache_policy=NO_CACHE, task_run_name="published-{name}", **RETRIED)
async def record_publication(store: Store, name: str, publication: Publication) -> None:
    """Record that the replicas serve what cycle `name` published. Written under its lease.

    Raises:
        StoreError: the store refuses.
    """
    await store.put_bytes(
        publication.model_dump_json(indent=1).encode(), f"{PUBLICATIONS}/{name}.json"
    )


def emit_served(spec: CycleSpec, snapshot: Published) -> None:
    """Emit `hotload.snapshot.served`: every replica serves `snapshot`."""
    emit_event(
        "hotload.snapshot.served",
        resource=run_resource(spec.run_id),
        payload={
            "policy_version": snapshot.policy_version,
            "identity": snapshot.identity,
            "kind": snapshot.kind.value,
            "previous": snapshot.previous,
            "size_bytes": snapshot.size_bytes,
            "replica_count": snapshot.replica_count,
        },
    )


def emit_fallback(spec: CycleSpec, plan: SnapshotPlan, reason: str) -> None:
    """Emit `hotload.cycle.fell-back`: the plan cannot be loaded, a full snapshot follows."""
    emit_event(
        "hotload.cycle.fell-back",
        resource=run_resource(spec.run_id),
        payload={
            "policy_version": spec.policy_version,
            "identity": plan.identity,
            "kind": plan.kind.value,
            "reason": reason,
        },
    )


def run_resource(run_id: str) -> dict[str, str]:
    """The training run, as events name what they are about."""
    return {"prefect.resource.id": f"hotload.run.{run_id}", "prefect.resource.name": run_id}
