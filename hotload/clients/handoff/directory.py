"""Where a policy version's rollouts lie and what the logs of their parts say, without a lease.

A version that is published again, under another identity, has rollouts in two places. One
supersedes the other; what was acknowledged of either is used.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, NamedTuple

from hotload.clients.store.lease_log import LeaseLog
from hotload.clients.store.records import read_lines, read_rollout_manifest
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
    AGAIN,
    PARTS,
    RolloutManifest,
    RolloutPart,
    rollout_directory,
)
from hotload.errors import StoreError
from hotload.identity import NamedVersion, read_cycle_name, read_identity
from hotload.publish.lines import Lines

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


async def find_version(store: Store, run_id: str, policy_version: int) -> NamedVersion:
    """Find the line that this version of the run is of, as things stand."""
    lines = await read_lines(store, run_id)
    return NamedVersion(run_id, lines.line_at(policy_version), policy_version)


async def find_rollouts(store: Store, version: NamedVersion) -> list[StoredRollouts]:
    """Find a version's rollouts that have a manifest: those that count, then those they supersede.

    Complete ones come before others, then those whose manifest was written last: only the cycle's
    last run writes any. They lie below the version's own identities or, where it was not published,
    below those of an earlier one.

    Raises:
        StoreError: a manifest cannot be read, or the store refuses.
    """
    lines = (await read_lines(store, version.run_id)).until(version.line)
    published = await _published(store, version, lines)
    before = max((one for one in published.values() if one < version), default=None)
    rollouts = []
    for identity, one in published.items():
        if one not in (version, before):
            continue
        own = rollout_directory(identity, version)
        again = [f"{own}/{name}" for name in await store.names(own) if name.startswith(AGAIN)]
        for directory in (own, *again):
            manifest = await read_rollout_manifest(store, directory)
            rollouts += [] if manifest is None else [StoredRollouts(directory, manifest)]
    rollouts.sort(key=lambda one: (one.manifest.is_complete, one.manifest.created_at), reverse=True)
    return rollouts


async def version_before(store: Store, version: NamedVersion) -> NamedVersion | None:
    """Find the newest version with rollouts that this one came after: before the first of its line,
    one of a line before."""
    lines = (await read_lines(store, version.run_id)).until(version.line)
    published = await _published(store, version, lines)
    newest = max((one for one in published.values() if one < version), default=None)
    if newest is None:
        return None
    versions = {newest}
    for identity, one in published.items():
        names = await store.names(f"{PARTS}/{identity}") if one == newest else []
        not_due = (read_cycle_name(f"{one.run_id}-{name}") for name in names)
        versions |= {found for found in not_due if found and _leads_to(version, found, lines)}
    return max(one for one in versions if one < version)


async def _published(store: Store, version: NamedVersion, lines: Lines) -> dict[str, NamedVersion]:
    """List, by identity, the versions that have rollouts below an identity of their own, as far as
    they lead to this one."""
    named = {name: read_identity(name) for name in await store.names(PARTS)}
    return {name: one for name, one in named.items() if one and _leads_to(version, one, lines)}


def _leads_to(version: NamedVersion, other: NamedVersion, lines: Lines) -> bool:
    """Whether the other, where it is earlier, is a version that this one came after: not where a
    line between them superseded it."""
    is_of_run = other.run_id == version.run_id
    return is_of_run and not lines.is_superseded(other.line, other.policy_version)


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


async def acknowledged_drift(store: Store, version: NamedVersion) -> LogprobDrift | None:
    """Merge the drift of all acknowledgements of this version that have one; `None` without any.

    Raises:
        StoreError: what lies there cannot be read, or the store refuses.
    """
    rollouts = await find_rollouts(store, version)
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
