"""A user's own loss as a function of log-probabilities, turned into coefficients.

A function for numpy gives its derivative itself; one for torch is differentiated, once, by the
log-probabilities alone, so no model is needed for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from hotload.training.loss_inputs import LossInputs, PerToken, check_logprobs

COEFFICIENT_LIMIT = 1e12


@dataclass(frozen=True, slots=True, eq=False)
class CustomLossValue:
    """∂L/∂π of every token, the loss, and what the function measured."""

    coefficients_T: PerToken
    loss: float
    metrics: Mapping[str, float]


def custom_coefficients(
    function: Callable[[Any, Any], Any],
    inputs: LossInputs,
    logprobs_T: ArrayLike,
    *,
    uses: Literal["numpy", "torch"],
) -> CustomLossValue:
    """Call a user's loss with the samples and the policy's log-probabilities.

    Args:
        function: `loss(inputs, logprobs_T)`. For numpy it returns (loss, ∂loss/∂logprobs [T],
            metrics). For torch all arrays are tensors of float64, and it returns (loss, metrics)
            with the loss a tensor of one number. What is masked is 0 in all arrays.
        logprobs_T: the policy's, in nats.

    Raises:
        ValueError: the function returned something else, a number that is not finite, or a
            derivative where the loss mask is false.
        ModuleNotFoundError: it uses torch, which is not installed.
    """
    policy_T = check_logprobs(logprobs_T, inputs.loss_mask_T, "logprobs_T", "the trainer")
    call = _call_torch if uses == "torch" else _call_numpy
    loss, found_T, metrics = call(function, inputs, policy_T)
    if not math.isfinite(loss):
        raise _refusal(function, f"a loss of {loss}", "a finite number")
    if found_T.shape != policy_T.shape:
        raise _refusal(function, f"coefficients of shape {found_T.shape}", str(policy_T.shape))
    if found_T.size and not np.abs(found_T).max() <= COEFFICIENT_LIMIT:
        place = int(np.argmax(~(np.abs(found_T) <= COEFFICIENT_LIMIT)))
        bounds = f"a number within ± {COEFFICIENT_LIMIT:g}"
        raise _refusal(function, f"a coefficient of {found_T[place]} at token {place}", bounds)
    if (is_astray_T := (found_T != 0) & ~inputs.loss_mask_T).any():
        place = int(np.argmax(is_astray_T))
        found = f"a coefficient at token {place}, where the loss mask is false"
        raise _refusal(function, found, "0 there: multiply by inputs.loss_mask_T")
    return CustomLossValue(found_T, loss, metrics)


def _call_numpy(
    function: Callable[[Any, Any], Any], inputs: LossInputs, policy_T: PerToken
) -> tuple[float, PerToken, Mapping[str, float]]:
    returned = function(inputs, policy_T)
    if not isinstance(returned, tuple) or len(returned) != 3:
        raise _refusal(function, f"{type(returned).__name__}", "(loss, coefficients_T, metrics)")
    loss, found_T, metrics = returned
    return float(loss), np.array(found_T, dtype=np.float64), _metrics(function, metrics)


def _call_torch(
    function: Callable[[Any, Any], Any], inputs: LossInputs, policy_T: PerToken
) -> tuple[float, PerToken, Mapping[str, float]]:
    import torch

    tensors = {
        each.name: torch.from_numpy(value)
        for each in fields(inputs)
        if (value := getattr(inputs, each.name)) is not None
    }
    policy = torch.from_numpy(policy_T).requires_grad_()
    returned = function(replace(inputs, **tensors), policy)
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    if not is_pair or not isinstance(returned[0], torch.Tensor) or returned[0].numel() != 1:
        raise _refusal(function, f"{type(returned).__name__}", "(loss of one number, metrics)")
    loss, metrics = returned
    if not loss.requires_grad:
        raise _refusal(function, "a loss without gradient", "one made of logprobs_T")
    (gradient,) = torch.autograd.grad(loss.sum(), policy, allow_unused=True)
    if gradient is None:
        raise _refusal(function, "a loss that logprobs_T has no part in", "one made of them")
    return float(loss.detach()), gradient.numpy(), _metrics(function, metrics)


def _metrics(function: Callable[[Any, Any], Any], metrics: Any) -> Mapping[str, float]:
    if not isinstance(metrics, Mapping):
        raise _refusal(function, f"metrics of type {type(metrics).__name__}", "a mapping")
    return {str(name): float(value) for name, value in metrics.items()}


def _refusal(function: Callable[[Any, Any], Any], found: str, expected: str) -> ValueError:
    name = getattr(function, "__qualname__", type(function).__name__)
    return ValueError(f"loss {name}: returned {found}, expected {expected}; its author must act")
