"""How far the trainer's log-probabilities lie from the sampler's on the same tokens.

Tokens the policy did not sample are left out. Log-probabilities are natural, so divergence is in
nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from hotload.records import Record
from hotload.rollout.trajectory import LOGPROB_RANGE

if TYPE_CHECKING:  # claims import this: a trainer pays for no data frame before it has rows
    import polars as pl

LOG_RATIO_LIMIT = 20.0


"""Log-ratios are clamped to ± this before they are raised to a power (protocol §17)."""


Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LogprobDrift(Record):
    """Trainer's against sampler's log-probabilities over `token_count` sampled tokens, in nats.

    With `d = trainer − sampler`: `k1` is the mean of `−d` and `k3` of `exp(d) − 1 − d`, both
    estimates of KL(sampler ‖ trainer), the second never below 0. `not_finite_count` tokens, where
    either is no number, infinite or beyond ± 10⁶, are in none of the figures. The figures are
    `None` where no token is left for them.
    """

    token_count: int = Field(ge=0)
    not_finite_count: int = Field(ge=0)
    k1: Finite | None = None
    k3: NotNegative | None = None
    mean_abs: NotNegative | None = None
    max_abs: NotNegative | None = None

    @model_validator(mode="after")
    def _has_figures_of_tokens(self) -> Self:
        figures = (self.k1, self.k3, self.mean_abs, self.max_abs)
        if any((each is None) == (self.token_count > 0) for each in figures):
            raise ValueError("figures are there if tokens are, and only then")
        return self


@dataclass(frozen=True, slots=True)
class TrainedAgainst:
    """The policy version for whose samples a trainer gave log-probabilities, and their drift."""

    policy_version: int
    drift: LogprobDrift


def measure_drift(
    trainer_logprobs_T: ArrayLike, sampling_logprobs_T: ArrayLike, loss_mask_T: ArrayLike
) -> LogprobDrift | None:
    """Measure how far the trainer's log-probabilities are from the sampler's, over tokens where the
    mask is true; `None` where there are none.

    The three are one number per completion token, of any number of samples end to end.

    Raises:
        ValueError: they differ in length (a trainer gives one less than it has tokens, echoed
            inference as many with the first empty: compare from the second on, protocol §12).
    """
    trainer, sampler = _floats(trainer_logprobs_T), _floats(sampling_logprobs_T)
    mask = _mask(loss_mask_T)
    if not trainer.shape == sampler.shape == mask.shape:
        sizes = f"{trainer.size}, {sampler.size} and {mask.size}"
        raise ValueError(f"log-probabilities and mask differ in length: {sizes}")
    if not mask.any():
        return None
    trainer, sampler = trainer[mask], sampler[mask]
    limit = -LOGPROB_RANGE[0]
    is_finite = (np.abs(trainer) <= limit) & (np.abs(sampler) <= limit)
    difference = trainer[is_finite] - sampler[is_finite]
    not_finite_count = trainer.size - difference.size
    if difference.size == 0:
        return LogprobDrift(token_count=0, not_finite_count=not_finite_count)
    clamped = np.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return LogprobDrift(
        token_count=difference.size,
        not_finite_count=not_finite_count,
        k1=-float(difference.mean()),
        # Rounded, a term may come out below its lower bound.
        k3=float(np.maximum(np.expm1(clamped) - clamped, 0).mean()),
        mean_abs=float(np.abs(difference).mean()),
        max_abs=float(np.abs(difference).max()),
    )


def merged_drift(drifts: Iterable[LogprobDrift]) -> LogprobDrift | None:
    """Merge drifts into that over the tokens of all of them, as if measured at once; `None` of
    none.
    """
    drifts = tuple(drifts)
    if not drifts:
        return None
    counted = [each for each in drifts if each.token_count]
    token_count = sum(each.token_count for each in counted)
    not_finite_count = sum(each.not_finite_count for each in drifts)
    if not counted:
        return LogprobDrift(token_count=0, not_finite_count=not_finite_count)

    def mean(figure: str) -> float:
        return math.fsum(each.token_count * getattr(each, figure) for each in counted) / token_count

    return LogprobDrift(
        token_count=token_count,
        not_finite_count=not_finite_count,
        k1=mean("k1"),
        k3=mean("k3"),
        mean_abs=mean("mean_abs"),
        max_abs=max(each.max_abs for each in counted if each.max_abs is not None),
    )


def _floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).ravel()


def _mask(values: ArrayLike) -> NDArray[np.bool_]:
    return np.asarray(values, dtype=np.bool_).ravel()


def drifts_of(
    trainer_logprobs: Sequence[ArrayLike | None], frame: pl.DataFrame, row_counts: Sequence[int]
) -> list[LogprobDrift | None]:
    """Measure the drift of each run of `frame`'s rows, over the tokens in the loss of the rows that
    are given; `None` where there are none.

    Args:
        trainer_logprobs: for each row of `frame` one number per completion token, or `None`: not
            given.
        frame: rows of `table.Rollouts`.
        row_counts: the rows of each run, in order; together they are the frame.

    Raises:
        ValueError: a row is missing or too many, or its numbers are not one per token.
    """
    rows = _checked(trainer_logprobs, frame)
    ends = accumulate(row_counts, initial=0)
    return [_drift(rows[start:end], frame[start:end]) for start, end in pairwise(ends)]


def _checked(
    trainer_logprobs: Sequence[ArrayLike | None], frame: pl.DataFrame
) -> list[NDArray[np.float64] | None]:
    if len(trainer_logprobs) != frame.height:
        raise ValueError(
            f"trainer_logprobs: found {len(trainer_logprobs)} rows, expected {frame.height}, "
            "one for each row of the delivery's frame"
        )
    lengths = frame["token_ids"].list.len().to_list()
    rows: list[NDArray[np.float64] | None] = []
    for number, (given, length) in enumerate(zip(trainer_logprobs, lengths, strict=True)):
        row = None if given is None else np.asarray(given, dtype=np.float64)
        if row is not None and row.shape != (length,):
            raise ValueError(
                f"trainer_logprobs, row {number}: found shape {row.shape}, expected ({length},), "
                "one number per completion token"
            )
        rows.append(row)
    return rows


def _drift(rows: list[NDArray[np.float64] | None], frame: pl.DataFrame) -> LogprobDrift | None:
    # A list that is empty would explode to a null.
    has_tokens = [row is not None and row.size > 0 for row in rows]
    import polars as pl

    given = frame.filter(pl.Series(has_tokens, dtype=pl.Boolean))
    if given.is_empty():
        return None
    return measure_drift(
        np.concatenate([row for row in rows if row is not None]),
        given["sampling_logprobs"].explode().to_numpy(),
        given["loss_mask"].explode().to_numpy(),
    )
