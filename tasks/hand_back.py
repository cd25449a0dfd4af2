"""Hand back: scored groups as Parquet parts in the store, the manifest after all of them (design,
rule 2).

    _hotload/rollouts/<identity>/
        part-00000.parquet …    one per chunk of problems, whole or not there
        manifest.json           last; names the parts, their counts and digests
"""

import asyncio
import hashlib
import io
from collections.abc import Sequence
from datetime import UTC, datetime

import polars as pl
from pandera.errors import SchemaErrors
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.checkpoint_store import CheckpointStore
from hotload.errors import StoreError
from hotload.frames import check_rollouts, part_facts, rollouts_frame
from hotload.parts import (
    PartPlan,
    RolloutManifest,
    RolloutPart,
    RolloutPlan,
    summarize,
)
from hotload.report import RolloutSummary
from hotload.snapshot import MANIFEST_LIMIT_BYTES
from hotload.trajectories import ScoredGroup
from tasks.retrying import RETRIED

PART_LIMIT_BYTES = 4 << 30
DIGEST_KEY = "hotload.digest"


async def write_part(
    store: CheckpointStore, plan: RolloutPlan, part: PartPlan, groups: Sequence[ScoredGroup]
) -> RolloutPart:
    """Write one part, after its rows kept their schema.

    Raises:
        StoreError: the store refuses.
    """
    facts, data = await asyncio.to_thread(_render, plan, part, groups)
    await store.put_bytes(data, plan.path(part.file))
    return facts


def _render(
    plan: RolloutPlan, part: PartPlan, groups: Sequence[ScoredGroup]
) -> tuple[RolloutPart, bytes]:
    frame = check_rollouts(rollouts_frame(groups, policy_version=plan.policy_version))
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={DIGEST_KEY: part.digest})
    data = buffer.getvalue()
    return _facts(frame, part, data), data


def _facts(frame: pl.DataFrame, part: PartPlan, data: bytes) -> RolloutPart:
    return part_facts(
        frame,
        file=part.file,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        digest=part.digest,
    )


async def read_part(
    store: CheckpointStore, plan: RolloutPlan, part: PartPlan
) -> RolloutPart | None:
    """What an earlier run of this cycle wrote for this part; `None` if it asked for something
    else.
    """
    path = plan.path(part.file)
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=PART_LIMIT_BYTES)
    return await asyncio.to_thread(_parse, part, data)


def _parse(part: PartPlan, data: bytes) -> RolloutPart | None:
    try:
        if pl.read_parquet_metadata(io.BytesIO(data)).get(DIGEST_KEY) != part.digest:
            return None
        frame = check_rollouts(pl.read_parquet(io.BytesIO(data)))
    except (pl.exceptions.PolarsError, SchemaErrors):
        return None  # not a part of ours: it is sampled again and replaced
    return _facts(frame, part, data)


# Tasks take no plan: Prefect walks through what a task is given, and a plan holds every problem.
@task(cache_policy=NO_CACHE, **RETRIED)
async def find_rollout(store: CheckpointStore, path: str, digest: str) -> RolloutSummary | None:
    """The summary of a rollout that was handed back whole, by the plan with this digest.

    Raises:
        StoreError: the store refuses.
    """
    if await store.size(path) is None:
        return None
    data = await store.read_bytes(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    try:
        manifest = RolloutManifest.parse(data, path=path)
    except StoreError:
        return None  # of another schema: it is written again
    return manifest.summary if manifest.digest == digest else None


def sum_up(
    store: CheckpointStore, plan: RolloutPlan, parts: Sequence[RolloutPart], seconds: float
) -> RolloutManifest:
    """The manifest of a rollout whose parts all lie in the store; `seconds` is its wall time."""
    return RolloutManifest(
        identity=plan.identity,
        policy_version=plan.policy_version,
        digest=plan.digest,
        parts=tuple(parts),
        summary=summarize(
            plan.identity, parts, parts_uri=f"{store.url}/{plan.directory}", seconds=seconds
        ),
        created_at=datetime.now(UTC),
    )


@task(cache_policy=NO_CACHE, task_run_name="hand-back-{manifest.identity}", **RETRIED)
async def hand_back(store: CheckpointStore, manifest: RolloutManifest, path: str) -> RolloutSummary:
    """Write the manifest that names every part. From now on a reader may rely on it.

    Raises:
        StoreError: the store refuses.
    """
    await store.put_bytes(manifest.render(), path)
    return manifest.summary
