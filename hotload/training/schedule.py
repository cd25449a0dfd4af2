"""What an optimizer step is made with: AdamW's settings, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from hotload.training.settings import TrainingPart


class AdamSettings(TrainingPart):
    """AdamW with decoupled decay. The learning rate is the schedule's, and comes with each step."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Of the running mean of the gradient."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Of the running mean of its square."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Added to the root of the second."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Share of a weight that a step takes off it, times the learning rate."""
    grad_clip_norm: float = Field(0.0, ge=0, le=1e9)
    """The divided gradient is scaled down to this norm; 0 is off."""


class LearningRate(TrainingPart):
    """A learning rate over the optimizer steps of a run, which count from 1."""

    learning_rate: float = Field(1e-5, gt=0, le=1)
    """The highest, after the warm-up."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls after the warm-up: not, along a line or half a cosine, towards 0 after the last
    step; no step has 0."""
    warmup_steps: int | None = Field(None, ge=0, le=10**9)
    """Steps over which it rises along a line; step N has the full rate."""
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    """The same as a share of all steps, rounded up."""

    @model_validator(mode="after")
    def _warms_up_one_way(self) -> Self:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio say the same: remove one of them")
        return self

    @property
    def needs_total(self) -> bool:
        """Whether the number of all steps has to be known."""
        return self.lr_scheduler != "constant" or bool(self.warmup_ratio)

    def at(self, step: int, total_steps: int | None = None) -> float:
        """Compute the rate of a step.

        Raises:
            ValueError: a step below 1 or beyond the last; no total where one is needed; a warm-up
                that leaves no step after it.
        """
        if step < 1 or (total_steps is not None and step > total_steps):
            last = "" if total_steps is None else f" to {total_steps}"
            raise ValueError(f"step {step}: expected 1{last}")
        if total_steps is None:
            if self.needs_total:
                raise ValueError(
                    f"lr_scheduler {self.lr_scheduler} needs the number of all steps: the run must "
                    "know how many it makes, or set constant and warmup_steps"
                )
            rise = self.warmup_steps or 0
            return self.learning_rate * min(step / rise, 1.0) if rise else self.learning_rate
        share = (self.warmup_ratio or 0) * total_steps
        rise = self.warmup_steps or math.ceil(round(share, 9))  # 0.07 of 100 is 7, not 8
        if self.lr_scheduler != "constant" and rise >= total_steps:
            raise ValueError(f"a warm-up of {rise} steps leaves none of {total_steps} to fall in")
        if step <= rise:
            return self.learning_rate * step / rise
        left = 1.0
        if self.lr_scheduler != "constant":
            left = (total_steps - step + 1) / (total_steps - rise)
        if self.lr_scheduler == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
        return self.learning_rate * left
