"""Samples and settings of losses, and the seven losses written out token by token with the standard
library: loss and derivative. tests/oracles differentiates the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import LossName, LossValue, PolicyLoss

NAMES: tuple[LossName, ...] = get_args(LossName)


@dataclass(frozen=True)
class Token:
    """One token's log-probabilities and advantage."""

    policy: float
    anchor: float
    sampler: float
    reference: float
    advantage: float
    is_in_the_loss: bool = True


Samples = Sequence[Sequence[Token]]


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def weights(loss: PolicyLoss, sample: Sequence[Token]) -> list[float]:
    """The correction of each token of a sample."""
    if loss.tis is None:
        return [1.0] * len(sample)
    logs = [token.anchor - token.sampler for token in sample]
    if loss.tis.level == "sequence":
        kept = [log for log, token in zip(logs, sample, strict=True) if token.is_in_the_loss]
        logs = [sum(kept) / len(kept) if kept else 0.0] * len(sample)
    found = []
    for log in logs:
        ratio = math.exp(clip(log, -20, 20))
        weight = min(ratio, loss.tis.cap)
        if loss.tis.icepop and abs(log) > math.log(loss.tis.icepop):
            weight = 0.0
        found.append(weight)
    return found


def mean_log_ratio(sample: Sequence[Token]) -> float:
    logs = [token.policy - token.anchor for token in sample if token.is_in_the_loss]
    return sum(logs) / len(logs) if logs else 0.0


def of_token(
    loss: PolicyLoss, token: Token, weight: float, advantage: float, sample: Sequence[Token]
) -> tuple[float, float]:
    """Loss of a token and its derivative, without a KL in the loss."""
    log = token.policy - token.anchor
    name = loss.policy_loss
    if name == "dro":
        beta = loss.dro_beta or 0.0
        value = -(token.policy * advantage * weight - 0.5 * beta * log**2)
        return value, -advantage * weight + beta * log
    if name == "cispo":
        assert loss.eps_clip is not None
        assert loss.eps_clip_high is not None
        ratio = clip(math.exp(clip(log, -20, 20)), 1 - loss.eps_clip, 1 + loss.eps_clip_high)
        return -ratio * token.policy * advantage * weight, -ratio * advantage * weight
    if name == "reinforce":
        log = token.policy - token.sampler
    if name == "gspo":
        log = mean_log_ratio(sample)
        ratio, flows = math.exp(min(log, 10)), log <= 10
    else:
        cap = loss.ratio_log_cap or 20
        ratio, flows = math.exp(clip(log, -cap, cap)), abs(log) <= cap
    value = -ratio * advantage
    if name in ("grpo", "dapo", "gspo"):
        assert loss.eps_clip is not None
        assert loss.eps_clip_high is not None
        if advantage > 0 and ratio > 1 + loss.eps_clip_high:
            value, flows = -(1 + loss.eps_clip_high) * advantage, False
        if advantage < 0 and ratio < 1 - loss.eps_clip:
            value, flows = -(1 - loss.eps_clip) * advantage, False
        if loss.dual_clip and advantage < 0 and -loss.dual_clip * advantage < value:
            value, flows = -loss.dual_clip * advantage, False
    return value * weight, -ratio * advantage * weight if flows else 0.0


def kl_term(loss: PolicyLoss, token: Token) -> tuple[float, float]:
    if loss.kl == "k2":
        apart = token.policy - token.reference
        return loss.kl_beta * apart**2 / 2, loss.kl_beta * apart
    if loss.kl == "k3":
        apart = token.reference - token.policy
        power = math.exp(min(apart, 20))
        value = power - apart - 1 if apart <= 20 else power * (apart - 19) - apart - 1
        return loss.kl_beta * value, loss.kl_beta * (1 - power)
    return 0.0, 0.0


def by_hand(loss: PolicyLoss, samples: Samples) -> tuple[float, list[float]]:
    """The sum over all tokens, and the coefficient of each."""
    if loss.anchor == "rollout":
        samples = [[replace(token, anchor=token.sampler) for token in each] for each in samples]
    everyone = [token for sample in samples for token in sample if token.is_in_the_loss]
    shift = {}
    if loss.kl == "reward" and everyone:
        mean = sum(token.anchor - token.reference for token in everyone) / len(everyone)
        shift = {
            id(token): loss.kl_beta * (mean - (token.anchor - token.reference))
            for token in everyone
        }
    total, coefficients = 0.0, []
    for sample in samples:
        for token, weight in zip(sample, weights(loss, sample), strict=True):
            if not token.is_in_the_loss:
                coefficients.append(0.0)
                continue
            advantage = token.advantage + shift.get(id(token), 0.0)
            value, slope = of_token(loss, token, weight, advantage, sample)
            kl, kl_slope = kl_term(loss, token)
            total += value + kl
            coefficients.append(slope + kl_slope)
    return total, coefficients


# Every way to set a loss, by hand, by finite differences and by torch.
SETTINGS: list[dict[str, Any]] = [
    *({"policy_loss": name} for name in NAMES),
    *({"policy_loss": name, "kl_beta": 0.3, "kl": "k3"} for name in NAMES),
    *({"policy_loss": name, "kl_beta": 0.3, "kl": "k2"} for name in NAMES),
    *({"policy_loss": name, "kl_beta": 0.3, "kl": "reward"} for name in NAMES),
    *({"policy_loss": name, "anchor": "rollout"} for name in NAMES),
    *({"policy_loss": name, "tis": None} for name in NAMES),
    *({"policy_loss": name, "tis": {"level": "sequence"}} for name in NAMES if name != "reinforce"),
    {"policy_loss": "grpo", "dual_clip": 1.5},
    {"policy_loss": "dapo", "dual_clip": 3.0, "tis": {"icepop": 2.0}},
    {"policy_loss": "dapo", "ratio_log_cap": 0.5},
    {"policy_loss": "importance_sampling", "ratio_log_cap": 0.5, "tis": {"cap": 1.1}},
    {"policy_loss": "cispo", "eps_clip": 1.0, "eps_clip_high": 3.0},
    {"policy_loss": "gspo", "eps_clip": 3e-4, "eps_clip_high": 4e-4},
]


def shown(fields: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in fields.values())


def random_samples(seed: int, lengths: Sequence[int] = (5, 1, 0, 7)) -> list[list[Token]]:
    random = np.random.default_rng(seed)

    def token(advantage: float) -> Token:
        policy = -random.exponential(1.5) - 0.5
        anchor, sampler, reference = np.minimum(policy + random.normal(0, 0.4, 3), 0)
        is_in = bool(random.random() < 0.8)
        return Token(policy, float(anchor), float(sampler), float(reference), advantage, is_in)

    return [[token(random.normal()) for _ in range(length)] for length in lengths]


def inputs_of(samples: Samples, loss: PolicyLoss) -> tuple[LossInputs, list[float]]:
    """The samples as arrays, with what the loss needs of them, and the policy's numbers."""
    tokens = [token for sample in samples for token in sample]
    anchors = [token.anchor for token in tokens] if loss.needs_anchor else None
    references = [token.reference for token in tokens] if loss.needs_reference else None
    inputs = LossInputs.of(
        lengths=np.array([len(sample) for sample in samples], dtype=np.int64),
        loss_mask_T=[token.is_in_the_loss for token in tokens],
        advantages_T=[token.advantage for token in tokens],
        sampling_logprobs_T=[token.sampler for token in tokens],
        anchor_logprobs_T=anchors,
        reference_logprobs_T=references,
    )
    return inputs, [token.policy for token in tokens]


def evaluated(loss: PolicyLoss, samples: Samples) -> LossValue:
    inputs, policy = inputs_of(samples, loss)
    return loss.prepare(inputs).coefficients(policy)
