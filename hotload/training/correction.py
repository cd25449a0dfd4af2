"""Correction for what trainer and sampler disagree on: truncated importance sampling."""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from hotload.dataset.logprob_drift import LOG_RATIO_LIMIT
from hotload.training.loss_inputs import PerToken, means_of_samples
from hotload.training.settings import TrainingPart


class Correction(TrainingPart):
    """How a token is weighted by the trainer's probability over the sampler's, without gradient."""

    level: Literal["token", "sequence"] = "token"
    """One weight per token, or one per sample from the mean log-ratio of its tokens in the loss."""
    cap: float = Field(5.0, gt=0, le=1e6)
    """A weight is at most this."""
    icepop: float | None = Field(None, ge=1, le=1e6)
    """t: a token whose ratio is outside [1/t, t] gets weight 0. Token level only; empty is off."""

    @model_validator(mode="after")
    def _of_one_level(self) -> Self:
        if self.icepop is not None and self.level == "sequence":
            raise ValueError("icepop has no effect with level sequence: remove one of them")
        return self


def correction_weights(
    correction: Correction,
    anchor_logprobs_T: PerToken,
    sampling_logprobs_T: PerToken,
    loss_mask_T: NDArray[np.bool_],
    lengths: NDArray[np.int64],
) -> tuple[PerToken, NDArray[np.bool_]]:
    """Weigh every token, and tell which weights were capped or set to 0.

    Masked tokens have weight 1 and are in no mean; the arrays hold 0 there.
    """
    log_ratio_T = anchor_logprobs_T - sampling_logprobs_T
    if correction.level == "sequence":
        means = means_of_samples(log_ratio_T, loss_mask_T, lengths)
        log_ratio_T = np.where(loss_mask_T, np.repeat(means, lengths), 0.0)
    ratio_T = np.exp(np.clip(log_ratio_T, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    is_cut_T = (ratio_T > correction.cap) & loss_mask_T
    weights_T = np.where(is_cut_T, correction.cap, ratio_T)
    if correction.icepop is not None:
        is_outside_T = np.abs(log_ratio_T) > math.log(correction.icepop)
        weights_T[is_outside_T] = 0.0
        is_cut_T |= is_outside_T
    return weights_T, is_cut_T
