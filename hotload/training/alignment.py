"""Where a token's log-probability stands: N tokens give N − 1 predictions.

A model reads tokens 0 … N−2 and predicts tokens 1 … N−1, so after a prompt of n tokens the response
begins at prediction n − 1. Which tokens count is the loss mask's word alone, never the prompt's
length: a response of several turns holds tokens that the policy did not sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hotload.training.loss_inputs import PerToken


def inputs_and_targets(token_ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a sequence into what a model reads and what it predicts, [N−1] each.

    Raises:
        ValueError: there are fewer than two tokens, so nothing is predicted.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or ids.size < 2:
        raise ValueError(f"found {ids.size} tokens, expected at least 2: a prompt and a response")
    return ids[:-1], ids[1:]


def response_logprobs(
    logprobs: Sequence[float | None],
    *,
    prompt_length: int,
    loss_mask_T: ArrayLike,
    who: str = "the trainer",
) -> PerToken:
    """Take the log-probabilities of a response out of what a trainer or a service gave, [T].

    Three lengths are told apart, of N tokens with n of prompt: N, as a service echoes them, the
    first about nothing; N − 1, as a trainer predicts them; N − n, the response alone. `None` and
    NaN count as missing.

    Args:
        loss_mask_T: of the response's tokens; what is missing where it is false becomes 0.
        who: gave them, for the error.

    Raises:
        ValueError: no prompt, another length, or one is missing that is in the loss.
    """
    mask_T = np.asarray(loss_mask_T, dtype=np.bool_)
    if prompt_length < 1:
        raise ValueError("prompt_length: found 0, expected 1 or more: nothing predicts token 0")
    values = np.asarray(logprobs, dtype=np.float64)
    count = prompt_length + mask_T.size
    if values.shape not in ((count,), (count - 1,), (mask_T.size,)):
        raise ValueError(
            f"found {values.size} log-probabilities for {prompt_length} tokens of prompt and "
            f"{mask_T.size} of response, expected {count}, {count - 1} or {mask_T.size}: "
            f"{who} must be mended"
        )
    response_T = values[values.size - mask_T.size :]
    if (is_missing_T := np.isnan(response_T) & mask_T).any():
        place = int(np.argmax(is_missing_T))
        raise ValueError(
            f"response token {place} is in the loss and has no log-probability: {who} must be "
            "mended"
        )
    return np.where(np.isnan(response_T), 0.0, response_T)


def by_prediction(values_T: ArrayLike, *, prompt_length: int) -> PerToken:
    """Place the values of a response at the predictions of its whole sequence, [N−1]; zeros before.

    Raises:
        ValueError: there is no prompt.
    """
    if prompt_length < 1:
        raise ValueError("prompt_length: found 0, expected 1 or more: nothing predicts token 0")
    return np.concatenate([np.zeros(prompt_length - 1), np.asarray(values_T, dtype=np.float64)])
