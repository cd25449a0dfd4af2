"""Where a policy version's rollouts lie and what the logs of their parts say, without a lease."""

from __future__ import annotations

import asyncio
import re

from blocks.checkpoint_store import CheckpointStore
from hotload.claims import CLAIM_LIMIT_BYTES, CLAIMS, Claim, Holding, claim_file, claims_path
from hotload.drift import LogprobDrift, merged_drift
from hotload.parts import MANIFEST_FILE, PARTS, RolloutManifest, RolloutPart
from hotload.snapshot import MANIFEST_LIMIT_BYTES, version_of

READ_CONCURRENCY = 16


async def find_rollouts(store: CheckpointStore, run_id: str, policy_version: int) -> str | None:
    """The directory of this version's rollouts, once it has a manifest.

    They lie below the version's own identity, or, if it was not published, below that of an
    earlier one.
    """
    for identity, version in (await _newest_published(store, run_id, policy_version)).items():
        directory = f"{PARTS}/{identity}"
        if version < policy_version:
            directory += f"/{policy_version:06d}"
        if await store.size(f"{directory}/{MANIFEST_FILE}") is not None:
            return directory
    return None


async def version_before(store: CheckpointStore, run_id: str, policy_version: int) -> int | None:
    """The newest version before this one that has rollouts."""
    published = await _newest_published(store, run_id, policy_version - 1)
    found = set(published.values())
    for identity in published:
        names = await store.names(f"{PARTS}/{identity}")
        found |= {int(name) for name in names if re.fullmatch(r"[0-9]{6,9}", name)}
    return max((version for version in found if version < policy_version), default=None)


async def _newest_published(
    store: CheckpointStore, run_id: str, policy_version: int
) -> dict[str, int]:
    """The newest version up to this one that has an identity of its own, by its identities."""
    names = {name: version_of(name, run_id) for name in await store.names(PARTS)}
    versions = {identity: version for identity, version in names.items() if version is not None}
    newest = max((v for v in versions.values() if v <= policy_version), default=None)
    return {identity: version for identity, version in versions.items() if version == newest}


async def read_manifest(store: CheckpointStore, directory: str) -> RolloutManifest:
    """The manifest of the rollouts in `directory`.

    Raises:
        StoreError: there is none, or it is not one.
    """
    path = f"{directory}/{MANIFEST_FILE}"
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    return RolloutManifest.parse(data, path=path)


async def read_log(store: CheckpointStore, path: str, log: list[Claim]) -> None:
    """Add to a part's `log` the entries at `path` that came after it.

    Raises:
        StoreError: an entry is none.
    """
    names = set(await store.names(path))
    while (name := claim_file(len(log))) in names:
        data = await store.read_bytes(f"{path}/{name}", limit_bytes=CLAIM_LIMIT_BYTES)
        log.append(Claim.parse(data, path=f"{path}/{name}"))


async def acknowledged_drift(
    store: CheckpointStore, run_id: str, policy_version: int
) -> LogprobDrift | None:
    """The drift over all acknowledgements of this version that told one; `None` where none did.

    Raises:
        StoreError: what lies there cannot be read, or the store refuses.
    """
    directory = await find_rollouts(store, run_id, policy_version)
    if directory is None:
        return None
    manifest = await read_manifest(store, directory)
    begun = set(await store.names(f"{directory}/{CLAIMS}"))
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def drifts_of(part: RolloutPart) -> tuple[LogprobDrift, ...]:
        path, log = claims_path(directory, part), list[Claim]()
        if path.rpartition("/")[2] in begun:
            async with gate:
                await read_log(store, path, log)
        return Holding.of(log).drifts

    found = await asyncio.gather(*map(drifts_of, manifest.parts))
    return merged_drift(drift for drifts in found for drift in drifts)
