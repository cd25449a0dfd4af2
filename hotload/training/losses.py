"""The seven policy losses per token: loss and derivative by the policy's log-probability.

Symbols as in docs/losses.md: π `logprobs_T`, o `anchor_logprobs_T`, q `sampling_logprobs_T`, A
`advantages_T`, w `correction_T`. All arrays are [T] and 0 where the loss mask is false, w is 1
there; so a masked token has loss 0 and derivative 0. Every function gives a `TokenTerms`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hotload.dataset.logprob_drift import LOG_RATIO_LIMIT
from hotload.training.loss_inputs import PerToken, means_of_samples

GSPO_LOG_CAP = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class TokenTerms:
    """Loss, its derivative, and the ratio it was taken with, [T]; where clipping has an effect."""

    losses_T: PerToken
    coefficients_T: PerToken
    ratios_T: PerToken
    is_clipped_T: NDArray[np.bool_]


def clipped_ratio_terms(
    logprobs_T: PerToken,
    anchor_logprobs_T: PerToken,
    advantages_T: PerToken,
    correction_T: PerToken,
    *,
    eps_clip: float,
    eps_clip_high: float,
    dual_clip: float | None = None,
    log_cap: float = LOG_RATIO_LIMIT,
) -> TokenTerms:
    """Compute `grpo` and `dapo`: max(−rA, −clip(r)A)·w with r = e^(π−o)."""
    ratios_T, is_capped_T = _ratios(logprobs_T - anchor_logprobs_T, log_cap)
    terms = _clipped(ratios_T, advantages_T, correction_T, eps_clip, eps_clip_high, dual_clip)
    return _stopped(terms, is_capped_T)


def importance_sampling_terms(
    logprobs_T: PerToken,
    anchor_logprobs_T: PerToken,
    advantages_T: PerToken,
    correction_T: PerToken,
    *,
    log_cap: float = LOG_RATIO_LIMIT,
) -> TokenTerms:
    """Compute −rAw with r = e^(π−o). `reinforce` is the same with q in place of o and without w."""
    ratios_T, is_capped_T = _ratios(logprobs_T - anchor_logprobs_T, log_cap)
    losses_T = -ratios_T * advantages_T * correction_T
    terms = TokenTerms(losses_T, losses_T, ratios_T, np.zeros(ratios_T.shape, dtype=np.bool_))
    return _stopped(terms, is_capped_T)


def dro_terms(
    logprobs_T: PerToken,
    anchor_logprobs_T: PerToken,
    advantages_T: PerToken,
    correction_T: PerToken,
    *,
    beta: float,
) -> TokenTerms:
    """Compute direct reward optimisation: −(πAw − ½β(π−o)²)."""
    apart_T = logprobs_T - anchor_logprobs_T
    coefficients_T = beta * apart_T
    losses_T = 0.5 * coefficients_T * apart_T
    weighted_T = advantages_T * correction_T
    losses_T -= logprobs_T * weighted_T
    coefficients_T -= weighted_T
    ratios_T, _ = _ratios(apart_T, LOG_RATIO_LIMIT)
    nowhere_T = np.zeros(apart_T.shape, dtype=np.bool_)
    return TokenTerms(losses_T, coefficients_T, ratios_T, nowhere_T)


def gspo_terms(
    logprobs_T: PerToken,
    anchor_logprobs_T: PerToken,
    advantages_T: PerToken,
    correction_T: PerToken,
    *,
    loss_mask_T: NDArray[np.bool_],
    lengths: NDArray[np.int64],
    eps_clip: float,
    eps_clip_high: float,
) -> TokenTerms:
    """Compute max(−sA, −clip(s)A)·w with one s = e^(mean of π−o) per sample.

    The derivative is that of GSPO-token: each token's as if it carried the whole ratio. It is 0
    where the mean is above 10, the cap of the exponent.
    """
    means = means_of_samples(logprobs_T - anchor_logprobs_T, loss_mask_T, lengths)
    per_sample = np.exp(np.minimum(means, GSPO_LOG_CAP))
    terms = _clipped(
        np.repeat(per_sample, lengths), advantages_T, correction_T, eps_clip, eps_clip_high, None
    )
    is_capped = means > GSPO_LOG_CAP
    return _stopped(terms, np.repeat(is_capped, lengths) if is_capped.any() else None)


def cispo_terms(
    logprobs_T: PerToken,
    anchor_logprobs_T: PerToken,
    advantages_T: PerToken,
    correction_T: PerToken,
    *,
    eps_clip: float,
    eps_clip_high: float,
) -> TokenTerms:
    """Compute −clip(r)·π·A·w, the clipped ratio r = e^(π−o) without gradient."""
    ratios_T, _ = _ratios(logprobs_T - anchor_logprobs_T, LOG_RATIO_LIMIT)
    bounded_T = np.clip(ratios_T, 1 - eps_clip, 1 + eps_clip_high)
    is_clipped_T = bounded_T != ratios_T
    is_clipped_T &= advantages_T != 0
    coefficients_T = -bounded_T * advantages_T * correction_T
    return TokenTerms(coefficients_T * logprobs_T, coefficients_T, ratios_T, is_clipped_T)


def _ratios(log_ratios_T: PerToken, cap: float) -> tuple[PerToken, NDArray[np.bool_] | None]:
    """e to the log-ratios clipped to ± cap, and where that clips; None where it does nowhere."""
    if not log_ratios_T.size or (log_ratios_T.max() <= cap and log_ratios_T.min() >= -cap):
        return np.exp(log_ratios_T), None
    return np.exp(np.clip(log_ratios_T, -cap, cap)), np.abs(log_ratios_T) > cap


def _clipped(
    ratios_T: PerToken,
    advantages_T: PerToken,
    correction_T: PerToken,
    eps_clip: float,
    eps_clip_high: float,
    dual_clip: float | None,
) -> TokenTerms:
    """max(−rA, −clip(r)A)·w: r may rise to 1+ε⁺ where A > 0 and fall to 1−ε⁻ where A < 0."""
    least = np.maximum(ratios_T, 1 - eps_clip)
    if dual_clip is not None:
        np.minimum(least, dual_clip, out=least)
    bounded_T = np.where(advantages_T > 0, np.minimum(ratios_T, 1 + eps_clip_high), least)
    losses_T = -bounded_T * advantages_T * correction_T
    is_clipped_T = bounded_T != ratios_T  # at equality the gradient flows
    is_clipped_T &= advantages_T != 0
    coefficients_T = np.where(is_clipped_T, 0.0, losses_T)
    return TokenTerms(losses_T, coefficients_T, ratios_T, is_clipped_T)


def _stopped(terms: TokenTerms, is_capped_T: NDArray[np.bool_] | None) -> TokenTerms:
    """Let no gradient flow where the ratio's exponent was clipped."""
    if is_capped_T is None:
        return terms
    return TokenTerms(
        terms.losses_T,
        np.where(is_capped_T, 0.0, terms.coefficients_T),
        terms.ratios_T,
        terms.is_clipped_T | (is_capped_T & (terms.losses_T != 0)),
    )
