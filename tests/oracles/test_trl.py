"""`trl_batch` through TRL's own GRPOTrainer: its loss, its gradients and its steps are those that
the rows of the frame give by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_samples import (
    CLIP,
    Loss,
    by_hand,
    frame,
    logprobs,
    mean_over_rows,
    mean_over_tokens,
    tiny_model,
    tokens_in_the_loss,
)
from trl_steps import LEARNING_RATE, Fed

from hotload.dataset.trainer_batch import IS_TRAINABLE, make_batch, to_tensors, trl_batch
from hotload.training.divisor import gradient_divisor
from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import PolicyLoss

ROOT = Path(__file__).parents[2]
FRAME = frame()
BATCH = make_batch(FRAME, pad_token_id=1)


def arrays() -> dict[str, Any]:
    return to_tensors(trl_batch(make_batch(FRAME, pad_token_id=1)))


def same_step(weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    start = dict(tiny_model().named_parameters())
    assert set(weights) == set(gradients) == set(start)
    for name, gradient in gradients.items():
        moved = (start[name] - weights[name]) / LEARNING_RATE
        torch.testing.assert_close(moved.detach(), gradient, rtol=1e-4, atol=1e-6, msg=name)


def evaluated(trainer: Fed, given: dict[str, Any]) -> tuple[float, Tensor]:
    """TRL's loss of a batch, and its gradient by each log-probability it worked out."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output.log_probs.retain_grad()
        seen.append(output.log_probs)

    trainer.model.eval()
    with trainer.model.register_forward_hook(keep):
        loss = trainer.compute_loss(trainer.model, given)
    loss.backward()
    (found,) = seen
    gradient = found.grad
    assert gradient is not None
    assert not gradient[:, : -BATCH.completion_ids.shape[1]].any()
    return loss.item(), gradient[:, -BATCH.completion_ids.shape[1] :]


def test_the_rollouts_have_every_shape() -> None:
    assert len(BATCH) == 8
    assert len({*BATCH.prompt_mask.sum(axis=1).tolist()}) > 2
    assert (BATCH.segment_numbers == 1).any()
    assert FRAME["failure"].is_not_null().any()
    masks = [mask for mask in FRAME["loss_mask"].to_list() if mask]
    assert [True] * 4 + [False] * 3 + [True] * 2 in masks  # two turns and a tool
    assert [True] * 3 + [False] * 3 in masks  # from a change on
    assert [False] * 3 in masks  # no token left, so no row of the batch
    ratios = torch.cat(
        [now - sampled for now, sampled, _ in tokens_in_the_loss(FRAME, tiny_model())]
    )
    assert ratios.exp().min() < 1 - CLIP
    assert ratios.exp().max() > 1 + CLIP


@pytest.mark.parametrize(
    ("loss_type", "loss", "accumulated"),
    [
        ("dapo", mean_over_tokens, 1),
        ("dapo", mean_over_tokens, 2),
        # Eight rows in three parts: TRL would leave two of them out, `with_rows` adds one.
        ("dapo", mean_over_tokens, 3),
        ("grpo", mean_over_rows, 1),
        ("grpo", mean_over_rows, 2),
    ],
)
def test_a_step_of_the_trainer_is_the_step_by_hand(
    loss_type: str, loss: Loss, accumulated: int, tmp_path: Path
) -> None:
    trainer = Fed(FRAME, tmp_path, loss_type=loss_type, gradient_accumulation_steps=accumulated)
    told = trainer.train()
    value, gradients = by_hand(loss, FRAME)
    assert told.training_loss == pytest.approx(value, abs=1e-5)
    same_step(dict(trainer.model.named_parameters()), gradients)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "dapo"}, {"policy_loss": "grpo", "kl_beta": 0}),
        (
            {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.3},
            {"policy_loss": "dapo", "dual_clip": 1.3},
        ),
        # With it, the ratio weighs the KL, too, and has a gradient there.
        (
            {"loss_type": "dapo", "use_bias_correction_kl": False},
            {"policy_loss": "grpo", "kl_beta": 0.04},
        ),
        (
            {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.05},
            {"policy_loss": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.05},
        ),
        # There the bound itself is given, and there is none below.
        (
            {"loss_type": "cispo", "epsilon_high": 1.28},
            {"policy_loss": "cispo", "eps_clip": 1.0},
        ),
    ],
    ids=str,
)
def test_coefficients_are_the_gradients_of_the_trainers_losses(
    theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    loss = PolicyLoss(**ours, anchor="rollout")
    mask = torch.from_numpy(BATCH.completion_mask)
    reference = BATCH.sampling_logprobs - 0.1 * BATCH.loss_mask
    trainer = Fed(FRAME, tmp_path, **theirs)
    # Set afterwards: the constructor would look for a reference model.
    trainer.beta = loss.kl_beta
    given = arrays() | {"ref_per_token_logps": torch.from_numpy(reference).float()}
    _, gradient = evaluated(trainer, given)
    policy = [
        logprobs(tiny_model(), row["prompt_token_ids"], row["token_ids"]).detach().numpy()
        for row in FRAME.filter(IS_TRAINABLE).iter_rows(named=True)
    ]
    inputs = LossInputs.of(
        lengths=BATCH.completion_mask.sum(axis=1),
        loss_mask_T=BATCH.loss_mask[BATCH.completion_mask],
        advantages=BATCH.advantages,
        sampling_logprobs_T=BATCH.sampling_logprobs[BATCH.completion_mask],
        reference_logprobs_T=reference[BATCH.completion_mask] if loss.kl_beta else None,
    )
    found = loss.prepare(inputs).coefficients(np.concatenate(policy))
    divided = found.coefficients_T / gradient_divisor("num_loss_tokens", inputs)
    assert np.abs(divided - gradient[mask].numpy()).max() <= 1e-6
    assert found.figures.clipped_count > 0


def test_masked_tokens_move_nothing(tmp_path: Path) -> None:
    trainer = Fed(FRAME, tmp_path)
    mask = torch.from_numpy(BATCH.loss_mask)
    value, gradient = evaluated(trainer, arrays())
    assert value == pytest.approx(by_hand(mean_over_tokens, FRAME)[0], abs=1e-5)
    assert not gradient[~mask].any()
    assert (gradient != 0).any(dim=1).all()
    # Whatever stands where there is no token of the policy's.
    wild = arrays()
    for name in ("old_per_token_logps", "sampling_per_token_logps"):
        wild[name] = torch.where(mask, wild[name], -20.0)
    again = evaluated(trainer, wild)
    assert again[0] == value
    assert torch.equal(again[1], gradient)


def test_without_the_tool_mask_what_a_tool_said_is_trained_on(tmp_path: Path) -> None:
    given = arrays()
    del given["tool_mask"]
    _, gradient = evaluated(Fed(FRAME, tmp_path), given)
    is_masked = torch.from_numpy(BATCH.completion_mask & ~BATCH.loss_mask)
    assert gradient[is_masked].any()


def test_the_ratio_for_vllm_is_the_trainers_to_give(tmp_path: Path) -> None:
    trainer = Fed(FRAME, tmp_path)
    # Set afterwards: the constructor would look for vLLM, and no line of the loss does.
    trainer.use_vllm = True
    with pytest.raises(KeyError, match="importance_sampling_ratio"):
        evaluated(trainer, arrays())
    trainer.vllm_importance_sampling_correction = False
    assert evaluated(trainer, arrays())[0] == pytest.approx(
        by_hand(mean_over_tokens, FRAME)[0], abs=1e-5
    )

    # As docs/rollouts.md has it: the trainer's own log-probabilities, and the ratio beside them.
    trainer.vllm_importance_sampling_correction = True
    given = arrays()
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1)
    seen = torch.cat([given["prompt_mask"], given["completion_mask"]], dim=1)
    with torch.no_grad():
        own, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, seen, given["completion_ids"].shape[1]
        )
    apart = (own - given["sampling_per_token_logps"]) * given["tool_mask"]
    given |= {"old_per_token_logps": own, "importance_sampling_ratio": apart.exp().clamp(max=1.3)}
    expected = [
        -advantage * (now - sampled).exp().clamp(max=1.3)
        for now, sampled, advantage in tokens_in_the_loss(FRAME, tiny_model())
    ]
    assert evaluated(trainer, given)[0] == pytest.approx(
        torch.cat(expected).mean().item(), abs=1e-5
    )


def test_a_batch_of_added_rows_moves_nothing(tmp_path: Path) -> None:
    nothing = make_batch(FRAME.filter(problem_id="r")).with_rows(2)
    trainer = Fed(FRAME, tmp_path)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, to_tensors(trl_batch(nothing)))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("counted", ["everywhere", "here"])
def test_two_processes_count_their_tokens_together(counted: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*program, str(ROOT / "tests/oracles/trl_steps.py"), str(weights), counted],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    of_p, of_q = FRAME.filter(problem_id="p"), FRAME.filter(problem_id="q")
    parts = (FRAME,) if counted == "everywhere" else (of_p, of_q)
    # Counted by each alone, the step is the sum of two means: about twice as long.
    same_step(load_file(weights), by_hand(mean_over_tokens, *parts)[1])
