"""Where a policy version's rollouts lie and what the logs of their parts say, without a lease.

A version that is published again, under another identity, has rollouts in two places. One
supersedes the other; what was acknowledged of either is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import NamedTuple

import polars as pl

from blocks.checkpoint_store import CheckpointStore
from hotload.dataset.claims import (
    CLAIM_LIMIT_BYTES,
    CLAIMS,
    Claim,
    Holding,
    claim_file,
    claims_path,
)
from hotload.dataset.logprob_drift import LogprobDrift, merged_drift
from hotload.dataset.parquet import parse_rollouts
from hotload.dataset.rollout_plan import (
    MANIFEST_FILE,
    PARTS,
    RolloutManifest,
    RolloutPart,
    rollout_directory,
)
from hotload.errors import StoreError
from hotload.identity import version_of
from hotload.publish.snapshot import MANIFEST_LIMIT_BYTES

READ_CONCURRENCY = 16


class FoundRollouts(NamedTuple):
    """A directory with rollouts of a version, and its manifest."""

    directory: str
    manifest: RolloutManifest

    @property
    def group_count(self) -> int:
        """Groups that are there so far."""
        return sum(part.group_count for part in self.manifest.parts)


async def find_rollouts(
    store: CheckpointStore, run_id: str, policy_version: int
) -> list[FoundRollouts]:
    """This version's rollouts that have a manifest: those that count, then those they supersede.

    Complete ones come before others, then those whose manifest was written last: only the cycle's
    last run writes any. They lie below the version's own identities or, where it was not published,
    below those of an earlier one.

    Raises:
        StoreError: a manifest is none, or the store refuses.
    """
    published = await _published(store, run_id)
    before = max((each for each in published.values() if each < policy_version), default=None)
    found = []
    for identity, version in published.items():
        if version not in (policy_version, before):
            continue
        directory = rollout_directory(identity, run_id, policy_version)
        manifest = await read_manifest(store, directory)
        found += [] if manifest is None else [FoundRollouts(directory, manifest)]
    by_age = sorted(found, key=lambda each: each.manifest.created_at, reverse=True)
    return sorted(by_age, key=lambda each: not each.manifest.is_complete)


async def version_before(store: CheckpointStore, run_id: str, policy_version: int) -> int | None:
    """The newest version before this one that has rollouts."""
    published = await _published(store, run_id)
    newest = max((each for each in published.values() if each < policy_version), default=None)
    if newest is None:
        return None
    found = {newest}
    for identity, version in published.items():
        names = await store.names(f"{PARTS}/{identity}") if version == newest else []
        found |= {int(name) for name in names if re.fullmatch(r"[0-9]{6,9}", name)}
    return max(version for version in found if version < policy_version)


async def _published(store: CheckpointStore, run_id: str) -> dict[str, int]:
    """The versions that have rollouts below an identity of their own, by identity."""
    versions = {name: version_of(name, run_id) for name in await store.names(PARTS)}
    return {identity: version for identity, version in versions.items() if version is not None}


async def read_manifest(store: CheckpointStore, directory: str) -> RolloutManifest | None:
    """The manifest of the rollouts in `directory`, once there is one.

    Raises:
        StoreError: it is none of this schema, or the store refuses.
    """
    path = f"{directory}/{MANIFEST_FILE}"
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    return RolloutManifest.parse(data, path=path)


async def read_groups(
    store: CheckpointStore, directory: str, part: RolloutPart
) -> dict[str, pl.DataFrame]:
    """The rows of a part's groups, by problem and in order.

    Raises:
        StoreError: the part is not what the manifest says, or the store refuses.
    """
    path = f"{directory}/{part.file}"
    data = await store.read_bytes(path, limit_bytes=part.size_bytes)
    return await asyncio.to_thread(_parse, data, part.sha256, path)


def _parse(data: bytes, sha256: str, path: str) -> dict[str, pl.DataFrame]:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreError(path, "its SHA-256 is not the manifest's")
    frame, _ = parse_rollouts(data, path=path)
    return {
        str(rows["problem_id"][0]): rows
        for rows in frame.partition_by("problem_id", maintain_order=True)
    }


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
    rollouts = await find_rollouts(store, run_id, policy_version)
    holdings = [one for each in rollouts for one in await read_holdings(store, *each)]
    return merged_drift(drift for holding in holdings for drift in holding.drifts)


async def read_holdings(
    store: CheckpointStore, directory: str, manifest: RolloutManifest
) -> list[Holding]:
    """What the logs of these rollouts' parts come to now.

    Raises:
        StoreError: one cannot be read, or the store refuses.
    """
    begun = set(await store.names(f"{directory}/{CLAIMS}"))
    gate = asyncio.Semaphore(READ_CONCURRENCY)

    async def holding_of(part: RolloutPart) -> Holding:
        path, log = claims_path(directory, part), list[Claim]()
        if path.rpartition("/")[2] in begun:
            async with gate:
                await read_log(store, path, log)
        return Holding.of(log)

    return await asyncio.gather(*map(holding_of, manifest.parts))
