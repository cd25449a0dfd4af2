"""Coefficients against torch's automatic differentiation, verl's losses, and a user's loss in
torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import SETTINGS, evaluated, inputs_of, random_samples, shown
from torch_losses import evaluate
from trainer_samples import by_hand, frame, logprobs, mean_over_tokens, tiny_model
from verl.trainer.ppo.core_algos import compute_policy_loss_reinforce, get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from hotload.dataset.trainer_batch import IS_TRAINABLE, make_batch
from hotload.training.custom_loss import custom_coefficients
from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import PolicyLoss

SEEDS = range(400)


@pytest.mark.parametrize("settings", SETTINGS, ids=shown)
def test_coefficients_are_what_torch_differentiates_to(settings: dict[str, Any]) -> None:
    loss = PolicyLoss(**settings)
    for seed in SEEDS:
        samples = random_samples(seed)
        total, gradient = evaluate(loss, samples)
        found = evaluated(loss, samples)
        assert found.figures.loss == pytest.approx(total, rel=1e-12, abs=1e-12)
        assert np.abs(found.coefficients_T - gradient).max() <= 1e-12


# verl's name, ours, and what is set alike; verl always has a dual clip.
VERLS: list[tuple[str, dict[str, Any]]] = [
    ("vanilla", {"policy_loss": "grpo", "kl_beta": 0, "dual_clip": 3.0}),
    ("vanilla", {"policy_loss": "grpo", "kl_beta": 0, "dual_clip": 1.2, "eps_clip_high": 0.4}),
    ("vanilla", {"policy_loss": "dapo", "dual_clip": 3.0}),
    ("gspo", {"policy_loss": "gspo"}),
    ("gspo", {"policy_loss": "gspo", "eps_clip": 3e-4, "eps_clip_high": 4e-4}),
    ("cispo", {"policy_loss": "cispo"}),
    ("dro", {"policy_loss": "dro", "tis": None}),  # there w weighs the penalty, too
    ("reinforce", {"policy_loss": "reinforce"}),
]


@pytest.mark.parametrize(("name", "settings"), VERLS, ids=str)
def test_coefficients_are_the_gradients_of_verls_losses(
    name: str, settings: dict[str, Any]
) -> None:
    loss = PolicyLoss(**settings)
    inputs, values = inputs_of(random_samples(4, lengths=(5, 1, 7, 3)), loss)
    prepared = loss.prepare(inputs)
    has_token = torch.arange(7) < torch.from_numpy(inputs.lengths)[:, None]

    def padded(values_T: Any) -> torch.Tensor:
        rows = torch.zeros(has_token.shape, dtype=torch.float64)
        rows[has_token] = torch.as_tensor(values_T, dtype=torch.float64)
        return rows

    policy = padded(values).requires_grad_()
    sampler = padded(inputs.sampling_logprobs_T)
    weights = padded(prepared.correction_T)
    old = sampler
    if name == "reinforce":
        function = compute_policy_loss_reinforce
        weights = (policy - sampler).detach().exp()
    else:
        function = get_policy_loss_fn(name)
        old = padded(inputs.anchor_logprobs_T)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=8,
        clip_ratio_low=loss.eps_clip or 0.2,
        clip_ratio_high=loss.eps_clip_high or 0.2,
        clip_ratio_c=loss.dual_clip or 3.0,
        policy_loss=PolicyLossConfig(dro_beta=loss.dro_beta),
    )
    value, _ = function(
        old,
        policy,
        padded(inputs.advantages_T),
        padded(inputs.loss_mask_T),
        loss_agg_mode="token-mean",
        config=config,
        rollout_is_weights=weights,
    )
    (value * inputs.token_count).backward()
    found = prepared.coefficients(values)
    assert policy.grad is not None
    assert np.abs(found.coefficients_T - policy.grad[has_token].numpy()).max() <= 1e-6
    assert np.abs(found.coefficients_T).max() > 0.1


def test_a_users_loss_in_torch_is_differentiated_by_log_probabilities() -> None:
    loss = PolicyLoss(policy_loss="importance_sampling", tis=None)
    inputs, policy = inputs_of(random_samples(2), loss)

    def own(given: Any, logprobs_T: Any) -> Any:
        ratio = (logprobs_T - given.anchor_logprobs_T).exp()
        value = -(ratio * given.advantages_T * given.loss_mask_T).sum()
        return value, {"ratio": ratio.mean().item()}

    found = custom_coefficients(own, inputs, policy, uses="torch")
    expected = loss.prepare(inputs).coefficients(policy)
    assert np.abs(found.coefficients_T - expected.coefficients_T).max() <= 1e-12
    assert found.loss == pytest.approx(expected.figures.loss, rel=1e-12)
    assert found.metrics["ratio"] > 0


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda logprobs: logprobs.sum(), "Tensor"),
        (lambda logprobs: (logprobs, {}), "loss of one number"),
        (lambda logprobs: (logprobs.sum().detach(), {}), "without gradient"),
        (lambda _: (torch.ones((), requires_grad=True), {}), "no part in"),
        (lambda logprobs: (logprobs.sum() * float("nan"), {}), "a loss of nan"),
        (lambda logprobs: (logprobs.sum(), {}), "token 1, where the loss mask is false"),
        (lambda logprobs: (logprobs[0].sqrt(), {}), "nan"),
        (lambda logprobs: (logprobs[0] * 2, None), "metrics of type NoneType"),
    ],
)
def test_a_users_loss_in_torch_that_cannot_be_is_refused(returned: Any, found: str) -> None:
    inputs = LossInputs.of(
        lengths=[2], loss_mask_T=[True, False], advantages=[1.0], sampling_logprobs_T=[-1.0, 0.0]
    )

    def own(_: Any, logprobs_T: Any) -> Any:
        return returned(logprobs_T)

    with pytest.raises(ValueError, match=f"(?s)own.*{found}.*its author must act"):
        custom_coefficients(own, inputs, [-1.0, -1.0], uses="torch")


def test_the_documented_loop_makes_the_gradient_by_hand() -> None:
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    rows, batch, model = frame(), make_batch(frame()), tiny_model()
    taken = batch.completion_mask
    trained = rows.filter(IS_TRAINABLE).rows(named=True)

    def policy(numbers: list[int]) -> torch.Tensor:
        return torch.cat(
            [
                logprobs(model, trained[n]["prompt_token_ids"], trained[n]["token_ids"])
                for n in numbers
            ]
        )

    given = {
        "torch": torch,
        "batch": batch,
        "policy": policy,
        "micro_batches": [[3, 0], [1], [7, 6, 5, 4, 2]],
        "policy_before": batch.sampling_logprobs[taken],  # so that nothing is corrected
        "reference": policy([*range(len(batch))]).detach().numpy(),  # so that no KL pulls
    }
    exec(program, given)
    _, expected = by_hand(mean_over_tokens, rows)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
