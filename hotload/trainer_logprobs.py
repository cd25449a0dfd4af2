"""A trainer's log-probabilities on the rows that it got: whether they fit, and their drift."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from hotload.drift import LogprobDrift, logprob_drift


def drifts_of(
    trainer_logprobs: Sequence[ArrayLike | None], frame: pl.DataFrame, row_counts: Sequence[int]
) -> list[LogprobDrift | None]:
    """The drift of each run of `frame`'s rows, over the tokens in the loss of the rows that are
    given; `None` where there are none.

    Args:
        trainer_logprobs: for each row of `frame` one number per completion token, or `None`: not
            given.
        frame: rows of `frames.Rollouts`.
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
    given = frame.filter(pl.Series(has_tokens, dtype=pl.Boolean))
    if given.is_empty():
        return None
    return logprob_drift(
        np.concatenate([row for row in rows if row is not None]),
        given["sampling_logprobs"].explode().to_numpy(),
        given["loss_mask"].explode().to_numpy(),
    )
