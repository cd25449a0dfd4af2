"""What a cycle's rewards, advantages and log-probabilities look like, and how far the trainer's
log-probabilities lie from the sampler's on the same tokens.

Everything is counted over what is there: samples without a reward and tokens the policy did not
sample are left out. Log-probabilities are natural, so entropy and divergence are in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ± this before they are raised to a power (protocol §17)."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram of `count` numbers: `counts` between `edges`, one more than counts, the last bin
    closed. `std` is that of the population."""

    count: int
    mean: float
    std: float
    least: float
    greatest: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogprobDrift:
    """Trainer's against sampler's log-probabilities over `token_count` sampled tokens, in nats.

    With `d = trainer − sampler`: `k1` is the mean of `−d` and `k3` of `exp(d) − 1 − d`, both
    estimates of KL(sampler ‖ trainer), the second never below 0. `not_finite_count` tokens, where
    either is not a number or infinite, are in none of the figures.
    """

    token_count: int
    not_finite_count: int
    k1: float
    k3: float
    mean_abs: float
    max_abs: float


def distribution(values: ArrayLike, *, bin_count: int = 20) -> Distribution | None:
    """The distribution of finite `values`; `None` where there are none.

    Values that are all the same make one bin of width 0.
    """
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if numbers.size == 0:
        return None
    least, greatest = float(numbers.min()), float(numbers.max())
    if least == greatest:
        same = (least, greatest)
        return Distribution(numbers.size, least, 0.0, least, greatest, same, (numbers.size,))
    # Numbers that hardly differ leave no room for so many edges.
    edges = np.unique(np.linspace(least, greatest, bin_count + 1))
    counts, _ = np.histogram(numbers, edges)
    return Distribution(
        numbers.size,
        float(numbers.mean()),
        float(numbers.std()),
        least,
        greatest,
        tuple(edges.tolist()),
        tuple(counts.tolist()),
    )


def uniform_share(rewards_P_G: Iterable[Sequence[float | None]]) -> float | None:
    """Share of the groups with a reward whose rewards are all the same, a group of one among them:
    they teach nothing (protocol §17). `None` where no group has a reward.
    """
    distinct = [len({reward for reward in group if reward is not None}) for group in rewards_P_G]
    scored = [count for count in distinct if count]
    return sum(count == 1 for count in scored) / len(scored) if scored else None


def entropy_nats(logprobs_T: ArrayLike, loss_mask_T: ArrayLike) -> float | None:
    """The policy's entropy per token, estimated from its own samples: the mean of `−logprob` over
    tokens where the mask is true. `None` where there are none.

    Args:
        logprobs_T: under the distribution really sampled, of any number of samples end to end.
    """
    sampled = _floats(logprobs_T)[_mask(loss_mask_T)]
    return -float(sampled.mean()) if sampled.size else None


def logprob_drift(
    trainer_logprobs_T: ArrayLike, sampling_logprobs_T: ArrayLike, loss_mask_T: ArrayLike
) -> LogprobDrift | None:
    """How far the trainer's log-probabilities are from the sampler's, over tokens where the mask is
    true; `None` where there are none.

    The three are one number per completion token, of any number of samples end to end.

    Raises:
        ValueError: they differ in length (a trainer gives one less than it has tokens, echoed
            inference as many with the first empty: compare from the second on, protocol §12); or
            not one token has two finite log-probabilities.
    """
    trainer, sampler = _floats(trainer_logprobs_T), _floats(sampling_logprobs_T)
    mask = _mask(loss_mask_T)
    if not trainer.shape == sampler.shape == mask.shape:
        sizes = f"{trainer.size}, {sampler.size} and {mask.size}"
        raise ValueError(f"log-probabilities and mask differ in length: {sizes}")
    trainer, sampler = trainer[mask], sampler[mask]
    is_finite = np.isfinite(trainer) & np.isfinite(sampler)
    difference = trainer[is_finite] - sampler[is_finite]
    if not mask.any():
        return None
    if difference.size == 0:
        raise ValueError(f"no finite log-probabilities on any of {int(mask.sum())} tokens")
    clamped = np.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return LogprobDrift(
        token_count=difference.size,
        not_finite_count=int(mask.sum()) - difference.size,
        k1=-float(difference.mean()),
        k3=float((np.expm1(clamped) - clamped).mean()),
        mean_abs=float(np.abs(difference).mean()),
        max_abs=float(np.abs(difference).max()),
    )


def _floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).ravel()


def _mask(values: ArrayLike) -> NDArray[np.bool_]:
    return np.asarray(values, dtype=np.bool_).ravel()
