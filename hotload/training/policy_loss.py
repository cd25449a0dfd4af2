"""A policy loss as it is declared, and its coefficients for the samples of an optimizer step.

A trainer needs no more of a loss than ∂L/∂π per token, the coefficient: the gradient of the weights
is the sum of coefficient × gradient of the token's log-probability. Losses are sums; dividing is
`hotload.training.divisor`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from hotload.dataset.logprob_drift import LOG_RATIO_LIMIT
from hotload.training.correction import Correction, correction_weights
from hotload.training.kl import KlEstimator, kl_in_reward, kl_k2, kl_k3
from hotload.training.loss_inputs import LossInputs, PerToken, check_logprobs, places_of
from hotload.training.losses import (
    TokenTerms,
    cispo_terms,
    clipped_ratio_terms,
    dro_terms,
    gspo_terms,
    importance_sampling_terms,
)
from hotload.training.settings import TrainingPart

LossName = Literal["grpo", "importance_sampling", "reinforce", "dapo", "dro", "gspo", "cispo"]

# What each loss takes, with its default; anything else is refused with it.
PARAMETERS: Mapping[str, Mapping[str, float | None]] = {
    "grpo": {"eps_clip": 0.2, "eps_clip_high": None, "dual_clip": None},
    "importance_sampling": {"ratio_log_cap": LOG_RATIO_LIMIT},
    "reinforce": {},
    "dapo": {
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "dual_clip": None,
        "ratio_log_cap": LOG_RATIO_LIMIT,
    },
    "dro": {"dro_beta": 0.05},
    "gspo": {"eps_clip": 0.2, "eps_clip_high": 0.2},
    "cispo": {"eps_clip": 0.2, "eps_clip_high": 0.28},
}
OF_ONE_LOSS = ("eps_clip", "eps_clip_high", "dual_clip", "ratio_log_cap", "dro_beta")
KL_BETA_OF_GRPO = 0.001


class PolicyLoss(TrainingPart):
    """Which loss the policy learns by. What would have no effect is refused.

    A field that is left out gets the default of its loss, so a stored loss shows what was in force.
    """

    policy_loss: LossName = "grpo"
    """The loss; docs/losses.md has the formulas and when to use which."""
    eps_clip: float | None = Field(None, gt=0, le=1)
    """ε⁻: the ratio is clipped below at 1 − ε⁻. grpo, dapo, gspo, cispo; 1 is no lower bound."""
    eps_clip_high: float | None = Field(None, gt=0, le=1e3)
    """ε⁺: the ratio is clipped above at 1 + ε⁺. grpo (there ε⁻ if left out), dapo, gspo, cispo."""
    dual_clip: float | None = Field(None, gt=1, le=1e3)
    """c: a negative advantage counts at most c times. grpo and dapo; empty is off."""
    ratio_log_cap: float | None = Field(None, gt=0, le=LOG_RATIO_LIMIT)
    """Beyond ± this log-ratio a token has no gradient. importance_sampling and dapo; nats."""
    dro_beta: float | None = Field(None, ge=0, le=1e3)
    """β of dro's quadratic penalty."""
    kl_beta: float = Field(0.0, ge=0, le=1e3)
    """Weight of the KL to the reference; 0.001 with grpo and 0 with all others if left out. It acts
    with every loss, and needs the reference's log-probabilities."""
    kl: KlEstimator | None = None
    """How the KL acts: k3 or k2 in the loss, or in the reward. k3 if left out; none at kl_beta
    0."""
    anchor: Literal["trainer", "rollout"] = "trainer"
    """What the ratio is taken against: the trainer's log-probabilities before the step, or those of
    the rollout, which needs no forward and no correction."""
    tis: Correction | None = None
    """Correction between trainer and sampler; a cap of 5 per token if left out, null is off. None
    with reinforce, whose ratio is the whole correction, and none with anchor rollout."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name = data.get("policy_loss", "grpo")
        if not isinstance(name, str) or name not in PARAMETERS:
            return data
        filled: dict[str, Any] = dict(PARAMETERS[name])
        filled.update({key: value for key, value in data.items() if value is not None})
        if name == "grpo":
            filled.setdefault("kl_beta", KL_BETA_OF_GRPO)
            if filled["eps_clip_high"] is None:
                filled["eps_clip_high"] = filled["eps_clip"]
        if filled.get("kl_beta"):
            filled.setdefault("kl", "k3")
        if "tis" not in data and name != "reinforce" and filled.get("anchor") != "rollout":
            filled["tis"] = Correction()
        return filled

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        takes = PARAMETERS[self.policy_loss]
        for name in OF_ONE_LOSS:
            if getattr(self, name) is not None and name not in takes:
                known = ", ".join(takes) or "none of these"
                raise ValueError(
                    f"{name} has no effect with {self.policy_loss}, which takes {known}: remove it"
                )
        if self.kl is not None and not self.kl_beta:
            raise ValueError(f"kl {self.kl} has no effect with kl_beta 0: set kl_beta or remove it")
        if self.tis is not None and self.policy_loss == "reinforce":
            raise ValueError("tis has no effect with reinforce, whose ratio corrects: remove it")
        if self.tis is not None and self.anchor == "rollout":
            raise ValueError(
                "tis has no effect with anchor rollout, where trainer and sampler are not "
                "compared: remove it"
            )
        return self

    @property
    def needs_anchor(self) -> bool:
        """Whether the trainer has to give its log-probabilities before the step."""
        is_used = self.policy_loss != "reinforce" or self.kl == "reward"
        return self.anchor == "trainer" and is_used

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the reference are needed."""
        return self.kl_beta > 0

    def prepare(self, inputs: LossInputs) -> PreparedLoss:
        """Work out what does not depend on the policy now: anchor, correction, KL in the reward.

        Args:
            inputs: all samples of the optimizer step; split the result, not these.

        Raises:
            ValueError: log-probabilities are missing, or there are some that would have no effect.
        """
        anchor_T = self._anchor(inputs)
        reference_T = inputs.reference_logprobs_T
        if self.needs_reference and reference_T is None:
            raise ValueError(
                f"kl_beta is {self.kl_beta:g} and there are no reference_logprobs_T: the trainer "
                "must give the reference's, or set kl_beta to 0"
            )
        if not self.needs_reference and reference_T is not None:
            raise ValueError(
                "reference_logprobs_T have no effect with kl_beta 0: the trainer must not compute "
                "them, or set kl_beta"
            )
        advantages_T = inputs.advantages_T
        if self.kl == "reward" and reference_T is not None:
            advantages_T = kl_in_reward(
                advantages_T, anchor_T, reference_T, inputs.loss_mask_T, self.kl_beta
            )
        if self.tis is None:
            weights_T = np.ones(inputs.loss_mask_T.shape)
            is_cut_T = np.zeros(inputs.loss_mask_T.shape, dtype=np.bool_)
        else:
            weights_T, is_cut_T = correction_weights(
                self.tis, anchor_T, inputs.sampling_logprobs_T, inputs.loss_mask_T, inputs.lengths
            )
        return PreparedLoss(
            self,
            replace(inputs, anchor_logprobs_T=anchor_T, advantages_T=advantages_T),
            weights_T,
            is_cut_T,
        )

    def _anchor(self, inputs: LossInputs) -> PerToken:
        anchor_T = inputs.anchor_logprobs_T
        if self.anchor == "rollout" and anchor_T is not None:
            raise ValueError(
                "anchor_logprobs_T have no effect with anchor rollout: the trainer must not "
                "compute them, or set anchor to trainer"
            )
        if anchor_T is not None:
            return anchor_T
        if self.needs_anchor:
            raise ValueError(
                "anchor is trainer and there are no anchor_logprobs_T: the trainer must give its "
                "log-probabilities before the step, or set anchor to rollout"
            )
        return inputs.sampling_logprobs_T

    def terms(self, inputs: LossInputs, correction_T: PerToken, logprobs_T: PerToken) -> TokenTerms:
        """Compute the loss without a KL term per token, of prepared inputs."""
        anchor_T = inputs.anchor_logprobs_T
        assert anchor_T is not None
        given = (logprobs_T, anchor_T, inputs.advantages_T, correction_T)
        taken = {name: getattr(self, name) for name in PARAMETERS[self.policy_loss]}
        match self.policy_loss:
            case "grpo":
                return clipped_ratio_terms(*given, **taken)
            case "dapo":
                return clipped_ratio_terms(*given, log_cap=taken.pop("ratio_log_cap"), **taken)
            case "importance_sampling":
                return importance_sampling_terms(*given, log_cap=taken["ratio_log_cap"])
            case "reinforce":
                sampling_T = inputs.sampling_logprobs_T
                return importance_sampling_terms(
                    logprobs_T, sampling_T, inputs.advantages_T, correction_T
                )
            case "dro":
                return dro_terms(*given, beta=taken["dro_beta"])
            case "gspo":
                return gspo_terms(
                    *given, loss_mask_T=inputs.loss_mask_T, lengths=inputs.lengths, **taken
                )
            case "cispo":
                return cispo_terms(*given, **taken)


@dataclass(frozen=True, slots=True)
class LossFigures:
    """Sums over tokens in the loss; those of micro-batches add up to those of the step."""

    loss: float = 0.0
    token_count: int = 0
    clipped_count: int = 0
    ratio_sum: float = 0.0
    reference_kl_sum: float = 0.0
    """k3 of policy and reference, in nats; 0 without a reference."""

    def __add__(self, other: LossFigures) -> LossFigures:
        return LossFigures(
            self.loss + other.loss,
            self.token_count + other.token_count,
            self.clipped_count + other.clipped_count,
            self.ratio_sum + other.ratio_sum,
            self.reference_kl_sum + other.reference_kl_sum,
        )

    @property
    def clipped_share(self) -> float:
        """Tokens that were clipped, of those in the loss."""
        return self.clipped_count / max(self.token_count, 1)

    @property
    def mean_ratio(self) -> float:
        """The ratio of the policy to its anchor; 1 at the first step of a batch."""
        return self.ratio_sum / self.token_count if self.token_count else 1.0

    @property
    def mean_reference_kl(self) -> float:
        """k3 of policy and reference, in nats a token."""
        return self.reference_kl_sum / max(self.token_count, 1)


@dataclass(frozen=True, slots=True, eq=False)
class LossValue:
    """∂L/∂π of every token, 0 where the loss mask is false, and the figures beside it."""

    coefficients_T: PerToken
    figures: LossFigures


@dataclass(frozen=True, slots=True, eq=False)
class PreparedLoss:
    """A loss with the samples of a step, ready for the policy's log-probabilities."""

    loss: PolicyLoss
    inputs: LossInputs
    correction_T: PerToken
    is_cut_T: NDArray[np.bool_]
    """Where a weight of the correction was capped or set to 0."""

    def take(self, numbers: Sequence[int]) -> PreparedLoss:
        """Take the samples of these numbers, in this order: a micro-batch."""
        places = places_of(self.inputs.lengths, numbers)
        return PreparedLoss(
            self.loss, self.inputs.take(numbers), self.correction_T[places], self.is_cut_T[places]
        )

    def coefficients(self, logprobs_T: ArrayLike) -> LossValue:
        """Compute the coefficient of every token at the policy's log-probabilities now.

        Args:
            logprobs_T: one per token of all samples, in nats; whatever stands where the loss mask
                is false.

        Raises:
            ValueError: not one per token, or within the mask not a log-probability.
        """
        inputs, loss = self.inputs, self.loss
        mask_T = inputs.loss_mask_T
        policy_T = check_logprobs(logprobs_T, mask_T, "logprobs_T", "the trainer")
        terms = loss.terms(inputs, self.correction_T, policy_T)
        coefficients_T, total, kl_sum = terms.coefficients_T, float(terms.losses_T.sum()), 0.0
        if inputs.reference_logprobs_T is not None:
            values_T, slopes_T = kl_k3(policy_T, inputs.reference_logprobs_T)
            kl_sum = float(values_T.sum())
            if loss.kl == "k2":
                values_T, slopes_T = kl_k2(policy_T, inputs.reference_logprobs_T)
            if loss.kl != "reward":
                total += loss.kl_beta * float(values_T.sum())
                coefficients_T = coefficients_T + loss.kl_beta * slopes_T
        figures = LossFigures(
            loss=total,
            token_count=inputs.token_count,
            clipped_count=int(np.count_nonzero(terms.is_clipped_T)),
            ratio_sum=float(terms.ratios_T @ mask_T),
            reference_kl_sum=kl_sum,
        )
        return LossValue(coefficients_T, figures)

    @property
    def mean_correction(self) -> float:
        """The correction's weight, averaged over the tokens in the loss; 1 where it is off."""
        mask_T = self.inputs.loss_mask_T
        return float(self.correction_T.mean(where=mask_T)) if mask_T.any() else 1.0

    @property
    def cut_share(self) -> float:
        """Tokens whose weight was capped or set to 0, of those in the loss."""
        return np.count_nonzero(self.is_cut_T) / max(self.inputs.token_count, 1)
