"""Publication: the record that a cycle has published, kept while it samples and others may publish.

Without it a cycle that was killed while sampling would be refused when it starts again: the
service may serve a later version by then.
"""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from hotload.clients.store import Store
from hotload.publish.publication import Publication
from hotload.publish.snapshot import MANIFEST_LIMIT_BYTES
from tasks import RETRIED
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
