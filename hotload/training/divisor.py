"""What the accumulated gradient of an optimizer step is divided by."""

from __future__ import annotations

from typing import Literal

from hotload.training.loss_inputs import LossInputs

GradientDivisor = Literal["num_loss_tokens", "num_sequences", "none"]


def gradient_divisor(mode: GradientDivisor, inputs: LossInputs) -> float:
    """Count what the gradient is divided by, once, before it is clipped.

    `num_loss_tokens` counts tokens in the loss, clipped or not; `num_sequences` samples with such a
    token; `none` is 1.

    Args:
        inputs: all samples of the step: a divisor per micro-batch would weigh their tokens
            differently.

    Raises:
        ValueError: no token is in the loss, so there is no step to make.
    """
    if not inputs.token_count:
        raise ValueError("no token of the step is in the loss: the trainer must skip the step")
    match mode:
        case "num_loss_tokens":
            return float(inputs.token_count)
        case "num_sequences":
            return float(inputs.trained_sample_count)
        case "none":
            return 1.0
