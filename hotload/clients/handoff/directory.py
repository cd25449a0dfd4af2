"""Where a policy version's rollouts lie and what the logs of their parts say, without a lease.

A version that is published again, under another identity, has rollouts in two places. One
supersedes the other; what was acknowledged of either is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple

from hotload.clients.store.lease_log import LeaseLog
from hotload.clients.store.records import read_rollout_manifest
from hotload.clients.store.store import Store
from hotload.dataset.claims import (
    CLAIM_LIMIT_BYTES,
    CLAIMS,
    NUMBER_DIGITS,
    Claim,
    Holding,
    claims_path,
)
from hotload.dataset.logprob_drift import LogprobDrift, merged_drift
from hotload.dataset.rollout_plan import (
    PARTS,
    RolloutManifest,
    RolloutPart,
    rollout_directory,
)
from hotload.errors import StoreError
from hotload.identity import version_of

if TYPE_CHECKING:
    import polars as pl

READ_CONCURRENCY = 16


class StoredRollouts(NamedTuple):
    """Rollouts of a version as they lie in the store: their directory and their manifest."""

    directory: str
    manifest: RolloutManifest

    @property
    def group_count(self) -> int:
        """Count the groups that are there so far."""
        return sum(part.group_count for part in self.manifest.parts)


async def find_rollouts(store: Store, run_id: str, policy_version: int) -> list[StoredRollouts]:
    """Find a version's rollouts that have a manifest: those that count, then those they supersede.

    Complete ones come before others, then those whose manifest was written last: only the cycle's
    last run writes any. They lie below the version's own identities or, where it was not published,
    below those of an earlier one.

    Raises:
        StoreError: a manifest cannot be read, or the store refuses.
    """
    published = await _published(store, run_id)
    earlier = [version for version in published.values() if version < policy_version]
    before = max(earlier, default=None)
    rollouts = []
    for identity, version in published.items():
        if version not in (policy_version, before):
            continue
        directory = rollout_directory(identity, run_id, policy_version)
        manifest = await read_rollout_manifest(store, directory)
        rollouts += [] if manifest is None else [StoredRollouts(directory, manifest)]
    rollouts.sort(key=lambda one: (one.manifest.is_complete, one.manifest.created_at), reverse=True)
    return rollouts


async def version_before(store: Store, run_id: str, policy_version: int) -> int | None:
    """Find the newest version before this one that has rollouts."""
    published = await _published(store, run_id)
    earlier = [version for version in published.values() if version < policy_version]
    if not earlier:
        return None
    newest = max(earlier)
    versions = {newest}
    for identity, version in published.items():
        names = await store.names(f"{PARTS}/{identity}") if version == newest else []
        versions |= {int(name) for name in names if re.fullmatch(r"[0-9]{6,9}", name)}
    return max(version for version in versions if version < policy_version)


async def _published(store: Store, run_id: str) -> dict[str, int]:
    """List the versions that have rollouts below an identity of their own, by identity."""
    versions = {name: version_of(name, run_id) for name in await store.names(PARTS)}
    return {identity: version for identity, version in versions.items() if version is not None}


async def read_groups(store: Store, directory: str, part: RolloutPart) -> dict[str, pl.DataFrame]:
    """Read the rows of a part's groups, by problem and in order.

    Raises:
        StoreError: the part is not what the manifest says, or the store refuses.
    """
    path = f"{directory}/{part.file}"
    data = await store.read_bytes(path, limit_bytes=part.size_bytes)
    return await asyncio.to_thread(_parse, data, part.sha256, path)


def _parse(data: bytes, sha256: str, path: str) -> dict[str, pl.DataFrame]:
    # Data frames are slow to import, and this is the first function that needs them.
    from hotload.dataset.parquet import parse_rollouts

    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreError(path, "its SHA-256 is not the manifest's")
    frame, _ = parse_rollouts(data, path=path)
    return {
        str(rows["problem_id"][0]): rows
        for rows in frame.partition_by("problem_id", maintain_order=True)
    }


def claims_log(store: Store, path: str) -> LeaseLog:
    """Name the log of a part's claims that lies at `path`."""
    return LeaseLog(store, path, first=0, digits=NUMBER_DIGITS, limit_bytes=CLAIM_LIMIT_BYTES)


async def read_claims(store: Store, path: str, log: list[Claim]) -> None:
    """Add to a part's `log` the entries at `path` that came after it.

    Raises:
        StoreError: an entry cannot be read.
    """
    async for place, data in claims_log(store, path).read_from(len(log)):
        log.append(Claim.parse(data, path=place))


async def acknowledged_drift(store: Store, run_id: str, policy_version: int) -> LogprobDrift | None:
    """Merge the drift of all acknowledgements of this version that have one; `None` without any.

    Raises:
        StoreError: what lies there cannot be read, or the store refuses.
    """
    rollouts = await find_rollouts(store, run_id, policy_version)
    holdings = [one for stored in rollouts for one in await read_holdings(store, *stored)]
    return merged_drift(drift for holding in holdings for drift in holding.drifts)


async def read_holdings(store: Store, directory: str, manifest: RolloutManifest) -> list[Holding]:
    """Sum up the logs of these rollouts' parts as they are now.

    Raises:
        StoreError: one cannot be read, or the store refuses.
    """
    begun = set(await store.names(f"{directory}/{CLAIMS}"))
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def holding_of(part: RolloutPart) -> Holding:
        path, log = claims_path(directory, part), list[Claim]()
        if path.rpartition("/")[2] in begun:
            async with gate:
                await read_claims(store, path, log)
        return Holding.of(log)

    return await asyncio.gather(*map(holding_of, manifest.parts))
