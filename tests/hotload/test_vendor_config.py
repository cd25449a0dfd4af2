"""A recipe's `Config` becomes a run file; what has no meaning here is told. Nothing is run."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hotload.trainers.declaration import AsyncTrainingSpec, TrainingSpec
from hotload.trainers.vendor_config import TranslatedConfig, translate_config

OLDER = b"""
import os
raise SystemExit("a recipe is read, not run")

cfg = Config(
    log_path="./logs",
    base_model="accounts/fireworks/models/qwen3-8b",
    dataset="/data/gsm8k.jsonl",
    learning_rate=2e-5,
    completions_per_prompt=8,
    prompt_groups_per_step=4,
    grad_accumulation_normalization=GradAccNormalization.NUM_SEQUENCES,
    eps_clip_high=0.3,
    tis=TISConfig(cap=2.0, level="sequence"),
    infra=InfraConfig(training_shape_id="ts", ref_training_shape_id="ts", node_count=2),
    deployment=DeployConfig(deployment_id="mine", tokenizer_model="Qwen/Qwen3-8B", replica_count=2),
    weight_sync=WeightSyncConfig(weight_sync_interval=2, dcp_save_interval=5, max_concurrent=32),
    output_model_id="accounts/acme/models/result",
    trajectory_dir=os.environ["TRAJECTORIES"],
)
"""
NEWER = b"""
@dataclass
class Config:
    log_path: str
    policy_loss: Literal["grpo", "dapo"] = "grpo"
    dapo: DAPOConfig = field(default_factory=DAPOConfig)
    wandb: WandBConfig = field(default_factory=lambda: WandBConfig(project="rl-async"))
    epochs: int = 1
    dataset: str | None = None
    max_rows: int = 100

def main():
    return main_of(Config("./logs", policy_loss="dapo", dapo=DAPOConfig(eps_clip_high=0.3),
        epochs=3, max_head_offpolicy_versions=2, prompt_groups_per_step=8,
        pipeline_chunks_per_step=4, anchor_logp="rollout", max_concurrency_rollout_sample=64,
        grad_clip_norm=1.0,
        dataset="gsm8k.jsonl", cleanup_on_exit=True, lora_rank=8))
"""


def completed(made: TranslatedConfig) -> dict[str, Any]:
    """The run file, with names in place of those in capitals."""
    document = yaml.safe_load(made.render())
    document["training"]["trainer"]["name"] = "team.trainer:open_trainer"
    return {**document["training"], "cycle": document["cycle"]}


def note(made: TranslatedConfig, field: str) -> str:
    (found,) = (one for one in made.notes if one.startswith(f"{field}:"))
    return found


def test_the_older_spelling() -> None:
    made = translate_config(OLDER, "recipe.py")
    spec = TrainingSpec.model_validate(completed(made))
    assert made.render().startswith("# python -m flows.rl_loop ")
    assert (spec.windows.weight_sync_interval, spec.windows.prompt_groups_per_step) == (2, 4)
    assert not spec.windows.shuffle
    assert spec.dcp_save_interval == 5
    assert spec.schedule.learning_rate == 2e-5
    assert spec.step.grad_accumulation_normalization == "num_sequences"
    assert (spec.loss.kl_beta, spec.loss.eps_clip_high) == (0.001, 0.3)
    assert spec.loss.tis is not None
    assert (spec.loss.tis.cap, spec.loss.tis.level) == (2.0, "sequence")
    assert spec.cycle.problems.dataset == "/data/gsm8k.jsonl"
    assert spec.cycle.problems.max_rows == 100
    assert spec.cycle.readiness.replica_count == 2
    assert spec.cycle.sampling.concurrency.initial_window == 32
    assert spec.output_model_id == "result"
    assert made.document["blocks"]["account"]["deployment_id"] == "mine"
    assert "training.trainer" in note(made, "base_model")
    assert "set `reference`" in note(made, "infra.ref_training_shape_id")
    assert "name it in `trainer`" in note(made, "infra.node_count")
    assert note(made, "trajectory_dir").endswith("(line 19); set it by hand")


def test_the_newer_spelling_of_an_asynchronous_run() -> None:
    made = translate_config(NEWER, "recipe.py")
    spec = AsyncTrainingSpec.model_validate(completed(made))
    assert made.render().startswith("# python -m flows.async_rl_loop ")
    assert spec.cycle.sampling.max_head_offpolicy_versions == 2
    assert spec.chunk_sizes == (2, 2, 2, 2)
    loss = spec.loss
    assert (loss.policy_loss, loss.eps_clip_high, loss.anchor) == ("dapo", 0.3, "rollout")
    assert loss.kl_beta == 0
    assert "would act" in note(made, "kl_beta")
    assert spec.windows.epochs == 3
    assert spec.windows.shuffle
    assert spec.dcp_save_interval == 10
    assert spec.step.grad_accumulation_normalization == "none"
    assert spec.step.adam.grad_clip_norm == 1.0
    assert spec.cycle.sampling.concurrency.initial_window == 64
    assert spec.cycle.wandb.project == "rl-async"
    assert any(one.startswith("dataset 'gsm8k.jsonl'") for one in made.notes)
    assert "has no meaning here" in note(made, "cleanup_on_exit")
    assert "name it in `trainer`" in note(made, "lora_rank")


def test_a_parameter_of_another_loss_has_no_effect_and_an_unknown_loss_is_told() -> None:
    made = translate_config(b"Config(policy_loss='gspo', eps_clip=0.1)", "r.py")
    assert note(made, "eps_clip") == "eps_clip: has no effect with policy_loss gspo"
    made = translate_config(b"Config(policy_loss='dppo')", "r.py")
    assert any(one.startswith("policy_loss dppo: no such loss here") for one in made.notes)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (b"def (", "r.py is not Python, line 1"),
        (b"x = 1", "neither `Config"),
        (b"Config()\nConfig()", "several of `Config`, at lines 1, 2"),
        (b"\x00", "is not Python"),
        (b"(" * 100_000, "is not Python"),
        (b" " * (2 << 20), "larger than"),
    ],
    ids=range(6),
)
def test_what_is_no_recipe_is_refused(source: bytes, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        translate_config(source, "r.py")
