"""A recipe's `Config` becomes a run file; what has no meaning here is told. Nothing is run."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

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


@given(
    st.fixed_dictionaries(
        {"policy_loss": st.sampled_from(["grpo", "dapo", "reinforce"])},
        optional={
            "tis": st.sampled_from(['TISConfig(cap=2.0, level="sequence")', "TISConfig(cap=3.0)"]),
            "anchor_logp": st.sampled_from(["'rollout'", "'old_policy'"]),
            "max_head_offpolicy_versions": st.sampled_from([0, 2]),
            "pipeline_chunks_per_step": st.sampled_from([1, 2, 9]),
            "prompt_groups_per_step": st.sampled_from([4, 8]),
            "weight_sync_interval": st.sampled_from([0, 1, 2]),
            "weight_sync": st.sampled_from(["WeightSyncConfig(weight_sync_interval=2)"]),
            "ppo_n_minibatches": st.sampled_from([1, 2]),
            "completions_per_prompt": st.sampled_from([1, 8]),
            "eps_clip": st.sampled_from([0.1, 2.0]),
        },
    )
)
def test_a_run_file_can_be_run_or_says_why_not(fields: dict[str, Any]) -> None:
    given_ = fields | {"policy_loss": repr(fields["policy_loss"])}
    written = ", ".join(f"{name}={value}" for name, value in given_.items())
    made = translate_config(f"Config({written})".encode(), "r.py")
    model = AsyncTrainingSpec if made.is_ahead else TrainingSpec
    refused = [one for one in made.notes if one.startswith("refused as it stands: ")]
    may_be_refused = (
        fields.get("completions_per_prompt") == 1
        or fields.get("eps_clip") == 2.0
        or fields.get("pipeline_chunks_per_step", 1) > 1
    )
    if refused:
        assert may_be_refused
        with pytest.raises(ValidationError):
            model.model_validate(completed(made))
    else:
        model.model_validate(completed(made))
    for name in fields:  # what is given is there, or it is told
        is_told = any(one.startswith(name) for one in made.notes)
        is_there = name.partition(".")[0] in yaml.safe_dump(made.document) or name in (
            "anchor_logp",
            "weight_sync",
        )
        assert is_told or is_there, name


def test_a_correction_stands_where_the_recipe_anchors_at_the_trainer_and_nowhere_else() -> None:
    tis = "tis=TISConfig(cap=2.0), max_head_offpolicy_versions=2"
    # The recipe of the older spelling has no anchor but the trainer's; a run file's is the rollout.
    made = translate_config(f"Config({tis}, infra=InfraConfig(node_count=2))".encode(), "r.py")
    loss = AsyncTrainingSpec.model_validate(completed(made)).loss
    assert loss.anchor == "trainer"
    assert loss.tis is not None
    assert loss.tis.cap == 2.0
    made = translate_config(f"Config({tis}, anchor_logp='rollout')".encode(), "r.py")
    assert AsyncTrainingSpec.model_validate(completed(made)).loss.tis is None
    assert "no effect with anchor rollout" in note(made, "tis.cap")
    made = translate_config(b"Config(tis=TISConfig(cap=2.0), policy_loss='reinforce')", "r.py")
    assert "no effect with reinforce" in note(made, "tis.cap")


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
