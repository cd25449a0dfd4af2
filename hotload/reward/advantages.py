"""Rewards of a group → advantages of a group (protocol §17)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

EPSILON = 1e-8

AdvantageMethod = Literal["grpo", "leave_one_out", "mean_only"]


def advantages(
    rewards_G: Sequence[float | None], method: AdvantageMethod = "grpo"
) -> tuple[float | None, ...]:
    """Compute an advantage per sample, over the samples that have a reward.

    `grpo` is `(r − mean) / (std + 1e-8)` with the unbiased standard deviation, which counts as 1
    below 1e-8; `mean_only` is `r − mean`; `leave_one_out` is `r` minus the mean of the others. A
    group of one gets 0. A sample without a reward (`None`) gets no advantage and does not count.
    Rewards are finite.
    """
    present = np.array([reward for reward in rewards_G if reward is not None], dtype=np.float64)
    if present.size < 2:
        return tuple(None if reward is None else 0.0 for reward in rewards_G)
    # Scaled first: the squares of large finite rewards must not overflow.
    scale = float(np.abs(present).max()) or 1.0
    deviations = present / scale - (present / scale).mean()
    factor = scale
    if method == "leave_one_out":
        factor = scale * present.size / (present.size - 1)
    elif method == "grpo":
        std = float(np.sqrt((deviations**2).sum() / (present.size - 1))) * scale
        factor = scale / (1.0 if std < EPSILON else std + EPSILON)
    centred = iter((deviations * factor).tolist())
    return tuple(None if reward is None else next(centred) for reward in rewards_G)
