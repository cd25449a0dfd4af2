"""`verl_batch` through verl's own DataProto, padding and policy loss: the loss and its gradients
are those that the rows of the frame give by hand.
"""

from __future__ import annotations

import polars as pl
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from trainer_samples import (
    TEMPERATURE,
    Loss,
    by_hand,
    frame,
    mean_over_rows,
    mean_over_tokens,
    tiny_model,
)
from transformers import LlamaForCausalLM
from verl import DataProto
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils import tensordict_utils
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from hotload.dataset.trainer_batch import IS_TRAINABLE, make_batch, to_tensors, verl_batch

FRAME = frame()
BATCH = make_batch(FRAME, pad_token_id=1)


def proto() -> DataProto:
    return DataProto.from_single_dict(to_tensors(verl_batch(BATCH)))


def logprobs_of(model: LlamaForCausalLM, data: TensorDict) -> Tensor:
    """As an engine hands them to the loss: at each token the next one's, one sequence after the
    other."""
    found = []
    for ids, positions in zip(
        data["input_ids"].unbind(), data["position_ids"].unbind(), strict=True
    ):
        logits = model(ids[None], position_ids=positions[None]).logits[0] / TEMPERATURE
        found.append(logprobs_from_logits(logits, ids.roll(-1)))
    return torch.cat(found)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("mode", "loss"),
    [("token-mean", mean_over_tokens), ("seq-mean-token-mean", mean_over_rows)],
)
def test_the_policy_loss_is_the_loss_by_hand(mode: str, loss: Loss, parts: int) -> None:
    model = tiny_model()
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=8, loss_agg_mode=mode
    )
    total, gradients = torch.zeros(()), []
    for part in proto().chunk(parts):
        data = left_right_2_no_padding(part.to_tensordict())
        # What an engine counts over all micro-batches of all its processes.
        tensordict_utils.assign_non_tensor(
            data, dp_size=1, batch_num_tokens=BATCH.token_count, global_batch_size=len(BATCH)
        )
        logprobs = logprobs_of(model, data)
        logprobs.retain_grad()
        value, _ = ppo_loss(config, {"log_probs": logprobs}, data)
        value.backward()
        total += value.detach()
        gradients.append(no_padding_2_padding(logprobs.grad, data))
    gradient, mask = torch.cat(gradients), torch.from_numpy(BATCH.loss_mask)
    assert not gradient[~mask].any()
    assert (gradient != 0).any(dim=1).all()
    value, expected = by_hand(loss, FRAME)
    assert total.item() == pytest.approx(value, abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_correction_finds_nothing_to_correct() -> None:
    """The old policy is the sampler: every weight is 1 and no token is rejected."""
    settings = RolloutCorrectionConfig.decoupled_token_is()
    corrected, _ = compute_rollout_correction_and_add_to_batch(proto(), settings)
    mask = torch.from_numpy(BATCH.loss_mask)
    assert torch.equal(corrected.batch["response_mask"].bool(), mask)
    assert (corrected.batch["rollout_is_weights"][mask] == 1).all()


def test_routes_stay_beside_their_tokens() -> None:
    """Without padding, as its router replay takes them: a row for every token, the last one's 0."""
    rows = FRAME.filter(IS_TRAINABLE)
    counts = [len(row["prompt_token_ids"]) + len(row["token_ids"]) - 1 for row in rows.to_dicts()]
    routes = [[1000 * row + i for i in range(4 * count)] for row, count in enumerate(counts)]
    routed = rows.with_columns(routes=pl.Series(routes, dtype=pl.List(pl.Int16)))
    arrays = to_tensors(verl_batch(make_batch(routed, pad_token_id=1), active_expert_count=2))
    data = left_right_2_no_padding(DataProto.from_single_dict(arrays).to_tensordict())
    parts = data["routed_experts"].unbind()
    assert [len(part) for part in parts] == [len(ids) for ids in data["input_ids"].unbind()]
    for part, expected in zip(parts, routes, strict=True):
        assert part.shape[1:] == (2, 2)
        assert part[:-1].flatten().tolist() == expected
        assert not part[-1].any()


def test_the_rewards_of_a_row_are_its_reward() -> None:
    rewards = proto().batch["token_level_rewards"].sum(dim=1)
    assert torch.equal(rewards, torch.from_numpy(BATCH.rewards))
