"""The manifest of a rollout that an earlier run of its cycle has left."""

from hotload.clients.store.records import read_rollout_manifest
from hotload.clients.store.store import Store
from hotload.dataset.rollout_plan import RolloutManifest, RolloutPart, RolloutPlan
from hotload.errors import StoreError, StoreUnavailableError


async def named_parts(store: Store, plan: RolloutPlan) -> dict[str, RolloutPart]:
    """Read the entries of the rollout's manifest by file, if there is one by now.

    Raises:
        StoreError: the store refuses.
    """
    manifest = await usable_manifest(store, plan.directory)
    return {part.file: part for part in manifest.parts} if manifest else {}


async def usable_manifest(store: Store, directory: str) -> RolloutManifest | None:
    """Read the manifest, unless there is none that can be read: one of another schema is written
    over.
    """
    try:
        return await read_rollout_manifest(store, directory)
    except StoreUnavailableError:
        raise
    except StoreError:
        return None
