"""Schemas of tables: rollouts, as a cycle hands them back; the tensors of a snapshot and the
ledger of publications, for whoever analyses them.

Each `…_frame` makes a table from values, each `check_…` returns it if it keeps its schema.
Importing this brings pandera and polars, so `hotload` itself does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import pandera.polars as pa
import polars as pl
from pandera.api.polars.types import PolarsData

from hotload.parts import RolloutPart
from hotload.snapshot import SnapshotKind, SnapshotManifest
from hotload.trajectories import ScoredGroup, Weights

if TYPE_CHECKING:
    from hotload.shards import ShardHeader

UtcMoment = Annotated[pl.Datetime, "us", "UTC"]


class _Table(pa.DataFrameModel):
    """Columns are exactly those named, of exactly their types."""

    class Config:
        strict = True
        ordered = True
        coerce = False


class Tensors(_Table):
    """One row per tensor of a snapshot; offsets in bytes from the end of the shard's header, end
    exclusive.
    """

    file: pl.String
    tensor: pl.String
    dtype: pl.String
    shape: pl.List(pl.Int64)  # type: ignore[valid-type]
    start: pl.Int64 = pa.Field(ge=0)
    end: pl.Int64 = pa.Field(ge=0)

    @pa.dataframe_check(error="end lies before start")
    def _in_order(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805 - pandera binds the class
        return data.lazyframe.select(pl.col("end") >= pl.col("start"))

    @pa.dataframe_check(error="a tensor is named twice")
    def _once(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        return data.lazyframe.select(~pl.col("tensor").is_duplicated())


class Rollouts(_Table):
    """One row per sample, failed ones included: tokens, reward, advantage, and which weights made
    it.

    `token_ids`, `loss_mask` and `sampling_logprobs` have the same length. `identity` is what was
    confirmed at dispatch, `weights` how the answer's own words compare with it. Without a reward
    there is a `failure`.
    """

    identity: pl.String
    policy_version: pl.Int64 = pa.Field(ge=0)
    problem_id: pl.String
    sample_number: pl.Int32 = pa.Field(ge=0)
    seed: pl.Int64 = pa.Field(ge=0)
    prompt_token_ids: pl.List(pl.Int32)  # type: ignore[valid-type]
    token_ids: pl.List(pl.Int32)  # type: ignore[valid-type]
    loss_mask: pl.List(pl.Boolean)  # type: ignore[valid-type]
    sampling_logprobs: pl.List(pl.Float32)  # type: ignore[valid-type]
    text: pl.String
    finish_reason: pl.String = pa.Field(nullable=True)
    reward: pl.Float64 = pa.Field(nullable=True)
    advantage: pl.Float64 = pa.Field(nullable=True)
    failure: pl.String = pa.Field(nullable=True)
    detail: pl.String
    weights: pl.String = pa.Field(isin=[each.value for each in Weights])
    first_identity: pl.String = pa.Field(nullable=True)
    last_identity: pl.String = pa.Field(nullable=True)
    identities: pl.List(pl.String)  # type: ignore[valid-type]
    replica: pl.String = pa.Field(nullable=True)
    request_id: pl.String
    session_id: pl.String
    response_id: pl.String = pa.Field(nullable=True)
    attempts: pl.Int32 = pa.Field(ge=0)
    latency_seconds: pl.Float64 = pa.Field(ge=0)
    cached_prompt_token_count: pl.Int64 = pa.Field(ge=0)

    @pa.dataframe_check(error="token_ids, loss_mask and sampling_logprobs differ in length")
    def _same_length(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        tokens = pl.col("token_ids").list.len()
        return data.lazyframe.select(
            (tokens == pl.col("loss_mask").list.len())
            & (tokens == pl.col("sampling_logprobs").list.len())
        )

    @pa.dataframe_check(
        error="reward and advantage are finite, or a failure says why there is none"
    )
    def _scored_or_failed(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        has_reward = pl.col("reward").is_not_null()
        return data.lazyframe.select(
            (has_reward == pl.col("failure").is_null())
            & (has_reward == pl.col("advantage").is_not_null())
            & pl.col("reward").is_finite().fill_null(True)
            & pl.col("advantage").is_finite().fill_null(True)
        )

    @pa.dataframe_check(error="a sample occurs twice")
    def _once(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        return data.lazyframe.select(~pl.struct("problem_id", "sample_number").is_duplicated())


class Ledger(_Table):
    """One row per published snapshot, oldest first; sizes in bytes."""

    identity: pl.String = pa.Field(unique=True)
    policy_version: pl.Int64 = pa.Field(ge=0)
    kind: pl.String = pa.Field(isin=[each.value for each in SnapshotKind])
    previous: pl.String = pa.Field(nullable=True)
    anchor: pl.String
    chain_length: pl.Int64 = pa.Field(ge=0)
    reason: pl.String
    content_sha256: pl.String
    size_bytes: pl.Int64 = pa.Field(ge=0)
    content_size_bytes: pl.Int64 = pa.Field(ge=0)
    created_at: UtcMoment

    @pa.dataframe_check(error="a delta, and only a delta, has a previous identity")
    def _lineage(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        is_delta = pl.col("kind") == SnapshotKind.DELTA.value
        return data.lazyframe.select(is_delta == pl.col("previous").is_not_null())


def _frame(schema: type[_Table], columns: dict[str, list[object]]) -> pl.DataFrame:
    types = {name: column.dtype.type for name, column in schema.to_schema().columns.items()}
    return pl.DataFrame(columns, schema=types)


def tensors_frame(shards: Iterable[ShardHeader]) -> pl.DataFrame:
    """The tensors of a snapshot, in the order of shards and offsets; keeps `Tensors`."""
    rows = [(shard.file, tensor) for shard in shards for tensor in shard.tensors]
    return _frame(
        Tensors,
        {
            "file": [file for file, _ in rows],
            "tensor": [tensor.name for _, tensor in rows],
            "dtype": [tensor.dtype for _, tensor in rows],
            "shape": [list(tensor.shape) for _, tensor in rows],
            "start": [tensor.start for _, tensor in rows],
            "end": [tensor.end for _, tensor in rows],
        },
    )


def rollouts_frame(groups: Sequence[ScoredGroup], *, policy_version: int) -> pl.DataFrame:
    """The samples of scored groups, group by group in sample order; keeps `Rollouts`."""
    samples = [sample for group in groups for sample in group.trajectories_G]
    origins = [sample.provenance for sample in samples]
    return _frame(
        Rollouts,
        {
            "identity": [origin.identity for origin in origins],
            "policy_version": [policy_version] * len(samples),
            "problem_id": [sample.problem_id for sample in samples],
            "sample_number": [sample.sample_number for sample in samples],
            "seed": [sample.seed for sample in samples],
            "prompt_token_ids": [sample.prompt_token_ids for sample in samples],
            "token_ids": [sample.token_ids_T for sample in samples],
            "loss_mask": [sample.loss_mask_T for sample in samples],
            "sampling_logprobs": [sample.sampling_logprobs_T for sample in samples],
            "text": [sample.text for sample in samples],
            "finish_reason": [sample.finish_reason for sample in samples],
            "reward": [reward for group in groups for reward in group.rewards_G],
            "advantage": [each for group in groups for each in group.advantages_G],
            "failure": [sample.failure for sample in samples],
            "detail": [sample.detail for sample in samples],
            "weights": [sample.weights.value for sample in samples],
            "first_identity": [origin.first for origin in origins],
            "last_identity": [origin.last for origin in origins],
            "identities": [origin.observed for origin in origins],
            "replica": [origin.replica for origin in origins],
            "request_id": [origin.request_id for origin in origins],
            "session_id": [origin.session_id for origin in origins],
            "response_id": [origin.response_id for origin in origins],
            "attempts": [origin.attempts for origin in origins],
            "latency_seconds": [sample.latency_seconds for sample in samples],
            "cached_prompt_token_count": [sample.cached_prompt_token_count for sample in samples],
        },
    )


def ledger_frame(manifests: Iterable[SnapshotManifest]) -> pl.DataFrame:
    """What was published, oldest first; keeps `Ledger`."""
    ordered = sorted(manifests, key=lambda manifest: manifest.created_at)
    return _frame(
        Ledger,
        {
            "identity": [each.identity for each in ordered],
            "policy_version": [each.policy_version for each in ordered],
            "kind": [each.kind.value for each in ordered],
            "previous": [each.previous for each in ordered],
            "anchor": [each.anchor for each in ordered],
            "chain_length": [each.chain_length for each in ordered],
            "reason": [each.reason for each in ordered],
            "content_sha256": [each.content_sha256 for each in ordered],
            "size_bytes": [each.size_bytes for each in ordered],
            "content_size_bytes": [each.content_size_bytes for each in ordered],
            "created_at": [each.created_at for each in ordered],
        },
    )


def check_tensors(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame itself, if it keeps `Tensors`; otherwise pandera's SchemaErrors, naming every
    breach.
    """
    return Tensors.validate(frame, lazy=True)


def check_rollouts(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame itself, if it keeps `Rollouts`; otherwise pandera's SchemaErrors, naming every
    breach.
    """
    return Rollouts.validate(frame, lazy=True)


def check_ledger(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame itself, if it keeps `Ledger`; otherwise pandera's SchemaErrors, naming every
    breach.
    """
    return Ledger.validate(frame, lazy=True)


def part_facts(
    frame: pl.DataFrame, *, file: str, size_bytes: int, sha256: str, digest: str
) -> RolloutPart:
    """What a part's rows come to. Samples that straddle a swap count under `first → … → last`."""
    identities: Counter[str] = Counter()
    columns = frame.select("weights", "identity", "identities").iter_rows()
    for weights, identity, observed in columns:
        if weights == Weights.ASSUMED.value:
            identities[f"{identity} (assumed)"] += 1
        elif weights != Weights.NONE.value:
            identities[" → ".join(observed)] += 1
    failures = Counter(failure for failure in frame["failure"] if failure is not None)
    rewards = frame["reward"].drop_nulls()
    return RolloutPart(
        file=file,
        size_bytes=size_bytes,
        sha256=sha256,
        digest=digest,
        group_count=frame["problem_id"].n_unique(),
        sample_count=frame.height,
        failed_samples=dict(failures),
        samples_by_identity=dict(identities),
        reward_count=len(rewards),
        reward_sum=float(rewards.sum()),
        completion_token_count=int(frame["token_ids"].list.len().sum()),
    )
