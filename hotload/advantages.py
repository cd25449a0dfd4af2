"""Rewards of a group → advantages of a group (protocol §17)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-8


def advantages(rewards_G: Sequence[float | None]) -> tuple[float | None, ...]:
    """`(r − mean) / (std + 1e-8)` per sample, over the samples that have a reward.

    The standard deviation is the unbiased one; below 1e-8 it counts as 1, and a group of one gets
    0. A sample without a reward (`None`) gets no advantage and does not count. Rewards are finite.
    """
    present = np.array([reward for reward in rewards_G if reward is not None], dtype=np.float64)
    if present.size < 2:
        return tuple(None if reward is None else 0.0 for reward in rewards_G)
    # Scaled first: the squares of large finite rewards must not overflow.
    scale = float(np.abs(present).max()) or 1.0
    deviations = present / scale - (present / scale).mean()
    std = float(np.sqrt((deviations**2).sum() / (present.size - 1))) * scale
    divisor = 1.0 if std < EPSILON else std + EPSILON
    centred = iter((deviations * (scale / divisor)).tolist())
    return tuple(None if reward is None else next(centred) for reward in rewards_G)
