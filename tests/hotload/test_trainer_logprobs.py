"""A trainer's log-probabilities on delivered rows, and which of them make a drift."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from hotload.dataset.logprob_drift import drifts_of

FRAME = pl.DataFrame(
    {
        "token_ids": [[1, 2], [], [3, 4, 5], [6]],
        "sampling_logprobs": [[-1.0, -2.0], [], [-1.0, 0.0, -1.0], [-1.0]],
        "loss_mask": [[True, True], [], [True, False, True], [False]],
    }
)


def test_a_drift_for_each_run_of_rows() -> None:
    given = [np.array([-1.5, -2.0]), [], (-1.0, -9.0, math.nan), [0.0]]
    first, second = drifts_of(given, FRAME, [2, 2])
    assert first is not None
    assert (first.token_count, first.k1, first.max_abs) == (2, 0.25, 0.5)
    assert second is not None
    assert (second.token_count, second.not_finite_count, second.k1) == (1, 1, 0.0)
    assert drifts_of(given, FRAME, [1, 1, 1, 1])[1::2] == [None, None]


def test_rows_that_were_not_given() -> None:
    (found,) = drifts_of([None, None, [-1.0, 0.0, -2.0], None], FRAME, [4])
    assert found is not None
    assert (found.token_count, found.k1) == (2, 0.5)
    assert drifts_of([None] * 4, FRAME, [4]) == [None]
    assert drifts_of([], FRAME.head(0), []) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([None] * 3, r"found 3 rows, expected 4"),
        ([None, None, [-1.0, -1.0], None], r"row 2: found shape \(2,\), expected \(3,\)"),
        (np.zeros((4, 3)), r"row 0: found shape \(3,\), expected \(2,\)"),
        ([-1.0, None, None, None], r"row 0: found shape \(\)"),
        ([["a", "b"], None, None, None], r"could not convert"),
    ],
)
def test_what_does_not_fit_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        drifts_of(given, FRAME, [4])
