"""The table of rollouts, as a cycle hands them back.

Importing this brings pandera and polars, so `hotload` itself does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandera.polars as pa
import polars as pl
from pandera.api.polars.types import PolarsData

from hotload.identity import version_of
from hotload.rollout.routing import ITEM
from hotload.rollout.trajectory import Problem, ScoredGroup, Segment, Trajectory, Weights

IDENTITY_RUN = {"start": pl.Int32, "identity": pl.String}
REWARD_PART = {"name": pl.String, "value": pl.Float64}


class Rollouts(pa.DataFrameModel):
    """One row per segment of a sample, failed samples included: tokens, reward, advantage, and
    which weights made them.

    A segment is one sequence to train on; a sample of several turns has more than one where a later
    prompt does not repeat the tokens so far. What is known of the sample as a whole (reward, text,
    latency, …) stands in each of its rows. In the first alone stand `transcript` and, of the
    problem, `prompt` (text, or messages as JSON; null if it was token ids) and `answer` (as JSON).
    With every change of a column, `parquet.ROWS_SCHEMA_NUMBER` grows.

    `token_ids`, `loss_mask` and `sampling_logprobs` have the same length. `identity` is what was
    confirmed at dispatch, `policy_version` the version it names, `weights` how the answer's own
    words compare with it, `identity_runs` which weights made the tokens from `start` (of this
    row's, from 0) on. `routes` are those of hotload.rollout.routing, over the row's prompt and
    completion, flat. Without a reward there is a `failure`; `mark` says what became of a group that
    is not simply complete. A row without an advantage is not to be trained on.
    """

    identity: pl.String
    policy_version: pl.Int64 = pa.Field(ge=0)
    problem_id: pl.String
    sample_number: pl.Int32 = pa.Field(ge=0)
    segment_number: pl.Int32 = pa.Field(ge=0)
    segment_count: pl.Int32 = pa.Field(ge=1)
    turn_count: pl.Int32 = pa.Field(ge=0)
    seed: pl.Int64 = pa.Field(ge=0)
    prompt_token_ids: pl.List(pl.Int32)  # type: ignore[valid-type]
    token_ids: pl.List(pl.Int32)  # type: ignore[valid-type]
    loss_mask: pl.List(pl.Boolean)  # type: ignore[valid-type]
    sampling_logprobs: pl.List(pl.Float32)  # type: ignore[valid-type]
    routes: pl.List(pl.Int16) = pa.Field(nullable=True)  # type: ignore[valid-type]
    prompt: pl.String = pa.Field(nullable=True)
    answer: pl.String = pa.Field(nullable=True)
    text: pl.String
    transcript: pl.String = pa.Field(nullable=True)
    finish_reason: pl.String = pa.Field(nullable=True)
    reward: pl.Float64 = pa.Field(nullable=True)
    reward_parts: pl.List(pl.Struct(REWARD_PART))  # type: ignore[valid-type]
    advantage: pl.Float64 = pa.Field(nullable=True)
    mark: pl.String = pa.Field(nullable=True)
    failure: pl.String = pa.Field(nullable=True)
    detail: pl.String
    weights: pl.String = pa.Field(isin=[each.value for each in Weights])
    first_identity: pl.String = pa.Field(nullable=True)
    last_identity: pl.String = pa.Field(nullable=True)
    identities: pl.List(pl.String)  # type: ignore[valid-type]
    identity_runs: pl.List(pl.Struct(IDENTITY_RUN))  # type: ignore[valid-type]
    replica: pl.String = pa.Field(nullable=True)
    request_id: pl.String
    session_id: pl.String
    response_id: pl.String = pa.Field(nullable=True)
    is_hedge: pl.Boolean
    attempts: pl.Int32 = pa.Field(ge=0)
    latency_seconds: pl.Float64 = pa.Field(ge=0)
    prompt_token_count: pl.Int64 = pa.Field(ge=0)
    cached_prompt_token_count: pl.Int64 = pa.Field(ge=0)
    completion_token_count: pl.Int64 = pa.Field(ge=0)

    class Config:
        # Exactly these columns, of exactly these types.
        strict = True
        ordered = True
        coerce = False

    @pa.dataframe_check(error="token_ids, loss_mask and sampling_logprobs differ in length")
    def _same_length(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        tokens = pl.col("token_ids").list.len()
        return data.lazyframe.select(
            (tokens == pl.col("loss_mask").list.len())
            & (tokens == pl.col("sampling_logprobs").list.len())
        )

    @pa.dataframe_check(error="routes that are not of the tokens but the last")
    def _routed(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        rows = pl.col("prompt_token_ids").list.len() + pl.col("token_ids").list.len() - 1
        count = pl.col("routes").list.len()
        is_whole = (rows > 0) & (count > 0) & (count % rows == 0)
        return data.lazyframe.select(count.is_null() | is_whole)

    @pa.dataframe_check(
        error="reward and advantage are finite, or a failure says why there is none, or a mark"
    )
    def _scored_or_failed(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        has_reward = pl.col("reward").is_not_null()
        has_advantage = pl.col("advantage").is_not_null()
        return data.lazyframe.select(
            (has_reward == pl.col("failure").is_null())
            & (has_reward | ~has_advantage)
            & (has_advantage | ~has_reward | pl.col("mark").is_not_null())
            & pl.col("reward").is_finite().fill_null(True)
            & pl.col("advantage").is_finite().fill_null(True)
        )

    @pa.dataframe_check(error="a segment occurs twice")
    def _once(cls, data: PolarsData) -> pl.LazyFrame:  # noqa: N805
        row = pl.struct("problem_id", "sample_number", "segment_number")
        return data.lazyframe.select(~row.is_duplicated())


def rollouts_frame(
    groups: Sequence[ScoredGroup], *, run_id: str, policy_version: int
) -> pl.DataFrame:
    """Lay out the segments of scored groups, group by group in sample order; keeps `Rollouts`.

    Args:
        policy_version: the cycle's, for samples whose identity names no version of `run_id`.
    """
    types = {name: column.dtype.type for name, column in Rollouts.to_schema().columns.items()}
    columns: dict[str, list[object]] = {name: [] for name in types}
    for group in groups:
        parts_G = group.reward_parts_G or ({},) * len(group.trajectories_G)
        scored = zip(
            group.trajectories_G, group.rewards_G, group.advantages_G, parts_G, strict=True
        )
        for sample, reward, advantage, parts in scored:
            origin = sample.provenance
            confirmed = version_of(origin.identity, run_id)
            shared = {
                "identity": origin.identity,
                "policy_version": policy_version if confirmed is None else confirmed,
                "problem_id": sample.problem_id,
                "sample_number": sample.sample_number,
                "segment_count": len(sample.segments),
                "turn_count": sample.turn_count,
                "seed": sample.seed,
                "text": sample.text,
                "finish_reason": sample.finish_reason,
                "reward": reward,
                "reward_parts": [{"name": name, "value": parts[name]} for name in sorted(parts)],
                "advantage": advantage,
                "mark": group.mark,
                "failure": sample.failure,
                "detail": sample.detail,
                "weights": sample.weights.value,
                "first_identity": origin.first,
                "last_identity": origin.last,
                "identities": list(origin.observed),
                "replica": origin.replica,
                "request_id": origin.request_id,
                "session_id": origin.session_id,
                "response_id": origin.response_id,
                "is_hedge": sample.is_hedge,
                "attempts": origin.attempts,
                "latency_seconds": sample.latency_seconds,
                "prompt_token_count": sample.prompt_token_count,
                "cached_prompt_token_count": sample.cached_prompt_token_count,
                "completion_token_count": sample.completion_token_count,
            }
            for own in _segment_columns(group.problem, sample):
                for name, value in (shared | own).items():
                    columns[name].append(value)
    # Told its type, polars would go through a list of arrays number by number.
    routes = pl.Series(columns.pop("routes")).cast(types["routes"])
    return pl.DataFrame(columns | {"routes": routes}, schema=types)


def _segment_columns(problem: Problem, sample: Trajectory) -> Iterable[dict[str, object]]:
    start = 0
    for number, segment in enumerate(sample.segments):
        is_first = number == 0
        yield {
            "segment_number": number,
            "prompt_token_ids": segment.prompt_token_ids,
            "token_ids": segment.token_ids_T,
            "loss_mask": segment.loss_mask_T,
            "sampling_logprobs": segment.sampling_logprobs_T,
            "routes": segment.routes and pl.Series(np.frombuffer(segment.routes, ITEM)),
            "identity_runs": _runs_of(segment, start, sample.provenance.runs),
            "prompt": _prompt(problem) if is_first else None,
            "answer": None if problem.answer is None or not is_first else _json(problem.answer),
            "transcript": _json(sample.transcript) if is_first and sample.transcript else None,
        }
        start += len(segment.token_ids_T)


def _runs_of(
    segment: Segment, start: int, runs: Sequence[tuple[int, str]]
) -> list[dict[str, object]]:
    """The part of a sample's runs that lies in the segment whose first token has number `start`."""
    length = len(segment.token_ids_T)
    bounds = [*(first - start for first, _ in runs), length]
    return [
        {"start": max(bounds[i], 0), "identity": identity}
        for i, (_, identity) in enumerate(runs)
        if max(bounds[i], 0) < min(bounds[i + 1], length)
    ]


def _prompt(problem: Problem) -> str | None:
    if problem.messages is not None:
        return _json(problem.messages)
    return problem.prompt if isinstance(problem.prompt, str) else None


def _json(value: object) -> str:
    def plain(other: object) -> object:
        return dict(other) if isinstance(other, Mapping) else str(other)

    return json.dumps(value, ensure_ascii=False, default=plain)


def check_rollouts(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the frame if it keeps `Rollouts`; otherwise raise pandera's SchemaErrors, naming every
    breach.
    """
    return Rollouts.validate(frame, lazy=True)
