"""The seven losses of docs/losses.md as torch expressions, one sample at a time. Only the losses
are written here; what they are differentiated to is torch's word.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from loss_cases import Samples
from torch import Tensor

from hotload.training.policy_loss import PolicyLoss

DOUBLE = torch.float64


def corrections(loss: PolicyLoss, anchor: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
    if loss.tis is None:
        return torch.ones_like(anchor)
    log_ratio = anchor - sampler
    if loss.tis.level == "sequence" and mask.any():
        log_ratio = log_ratio[mask].mean().expand_as(log_ratio)
    weights = log_ratio.clamp(-20, 20).exp().clamp(max=loss.tis.cap)
    if loss.tis.icepop is not None:
        weights = weights * (log_ratio.abs() <= torch.tensor(loss.tis.icepop, dtype=DOUBLE).log())
    return weights


def clipped(loss: PolicyLoss, ratio: Tensor, advantage: Tensor) -> Tensor:
    bounded = ratio.clamp(1 - loss.eps_clip, 1 + loss.eps_clip_high)
    value = torch.maximum(-ratio * advantage, -bounded * advantage)
    if loss.dual_clip is not None:
        is_bad = advantage < 0
        value = torch.where(is_bad, torch.minimum(-loss.dual_clip * advantage, value), value)
    return value


def policy_terms(
    loss: PolicyLoss,
    policy: Tensor,
    anchor: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    weights: Tensor,
    mask: Tensor,
) -> Tensor:
    """Loss per token of one sample, without a KL in the loss."""
    cap = loss.ratio_log_cap or 20
    ratio = (policy - anchor).clamp(-cap, cap).exp()
    match loss.policy_loss:
        case "grpo" | "dapo":
            return clipped(loss, ratio, advantage) * weights
        case "importance_sampling":
            return -ratio * advantage * weights
        case "reinforce":
            return -(policy - sampler).clamp(-20, 20).exp() * advantage
        case "dro":
            penalty = loss.dro_beta / 2 * (policy - anchor) ** 2
            return -(policy * advantage * weights - penalty)
        case "cispo":
            bounded = ratio.clamp(1 - loss.eps_clip, 1 + loss.eps_clip_high).detach()
            return -bounded * policy * advantage * weights
        case "gspo":
            mean = (policy - anchor)[mask].mean() if mask.any() else policy.sum() * 0
            # GSPO-token: the sample's ratio at each token, its gradient the token's own.
            per_token = policy - policy.detach() + mean.detach()
            ratio = torch.where(per_token <= 10, per_token, 10.0).exp()
            return clipped(loss, ratio, advantage) * weights


def evaluate(loss: PolicyLoss, samples: Samples) -> tuple[float, list[float]]:
    """The sum over the tokens in the loss, and its derivative by each policy log-probability."""
    if loss.anchor == "rollout":
        samples = [[replace(token, anchor=token.sampler) for token in each] for each in samples]
    everything = [token for sample in samples for token in sample]
    kept = [token for token in everything if token.is_in_the_loss]
    mean = sum(token.anchor - token.reference for token in kept) / max(len(kept), 1)
    total, policies = torch.zeros((), dtype=DOUBLE), []
    for sample in samples:
        policy, anchor, sampler, reference, advantage = (
            torch.tensor([getattr(token, name) for token in sample], dtype=DOUBLE)
            for name in ("policy", "anchor", "sampler", "reference", "advantage")
        )
        mask = torch.tensor([token.is_in_the_loss for token in sample], dtype=torch.bool)
        policies.append(policy.requires_grad_())
        if loss.kl == "reward":
            advantage = advantage + loss.kl_beta * (mean - (anchor - reference))
        weights = corrections(loss, anchor, sampler, mask)
        terms = policy_terms(loss, policy, anchor, sampler, advantage, weights, mask)
        apart = reference - policy
        if loss.kl == "k2":
            terms = terms + loss.kl_beta * apart**2 / 2
        if loss.kl == "k3":
            terms = terms + loss.kl_beta * (apart.exp() - apart - 1)
        total = total + terms[mask].sum()
    if total.requires_grad:
        total.backward()
    slopes = [torch.zeros_like(each) if each.grad is None else each.grad for each in policies]
    return total.item(), torch.cat([*slopes, torch.zeros(0, dtype=DOUBLE)]).tolist()
