"""What holds the policy to its reference: k2 or k3 in the loss, or a KL in the reward."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hotload.dataset.logprob_drift import LOG_RATIO_LIMIT
from hotload.training.loss_inputs import PerToken

KlEstimator = Literal["k2", "k3", "reward"]


def kl_k2(logprobs_T: PerToken, reference_logprobs_T: PerToken) -> tuple[PerToken, PerToken]:
    """Compute ½(π−f)² per token and its derivative π−f; its expected gradient on the policy's own
    samples is that of KL(policy ‖ reference).
    """
    apart_T = logprobs_T - reference_logprobs_T
    return 0.5 * apart_T**2, apart_T


def kl_k3(logprobs_T: PerToken, reference_logprobs_T: PerToken) -> tuple[PerToken, PerToken]:
    """Compute e^(f−π) − (f−π) − 1 per token and its derivative 1 − e^(f−π); its expected gradient
    on the policy's own samples is that of KL(reference ‖ policy).

    Beyond 20 nats it goes on as a straight line, so that it still pulls, and stays finite.
    """
    apart_T = reference_logprobs_T - logprobs_T
    within_T = np.minimum(apart_T, LOG_RATIO_LIMIT)
    power_T = np.exp(within_T)
    values_T = power_T - within_T - 1
    if apart_T.size and apart_T.max() > LOG_RATIO_LIMIT:
        values_T += (apart_T - within_T) * (power_T - 1)
    return values_T, 1 - power_T


def kl_in_reward(
    advantages_T: PerToken,
    anchor_logprobs_T: PerToken,
    reference_logprobs_T: PerToken,
    loss_mask_T: NDArray[np.bool_],
    kl_beta: float,
) -> PerToken:
    """Add β·(mean of o−f − (o−f)) to the advantage of every token in the loss.

    The mean is over all tokens of the optimizer step: call it before the step is split.
    """
    apart_T = anchor_logprobs_T - reference_logprobs_T
    mean = apart_T.sum() / max(np.count_nonzero(loss_mask_T), 1)
    return advantages_T + kl_beta * np.where(loss_mask_T, mean - apart_T, 0.0)
