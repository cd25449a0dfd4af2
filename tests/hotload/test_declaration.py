"""What may be declared for a training run, and what is refused with what to set instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hotload.trainers.declaration import AsyncTrainingSpec, TrainingSpec
from hotload.trainers.refused_fields import REFUSED_TRAINING_FIELDS, REFUSED_TRAINING_PREFIXES
from hotload.training.policy_loss import PARAMETERS, PolicyLoss
from tests.hotload.test_policy_loss import inputs

CYCLE = {"run_id": "grpo7", "work_dir": "/w", "problems": {"dataset": "/d.jsonl"}}
TRAINER = {"name": "team.trainer:open_trainer"}


def spec(cycle: dict[str, Any] | None = None, **training: Any) -> TrainingSpec:
    return TrainingSpec.model_validate(
        {"cycle": CYCLE | (cycle or {}), "trainer": TRAINER, **training}
    )


def test_a_run_comes_back_as_it_was_declared() -> None:
    for declared in (spec(), spec(loss={"policy_loss": "gspo"}, reference=None)):
        assert TrainingSpec.model_validate(declared.model_dump()) == declared
        assert TrainingSpec.model_validate_json(declared.model_dump_json()) == declared


def test_a_uniform_group_is_replaced_unless_it_is_said_otherwise() -> None:
    assert spec().cycle.sampling.groups.on_uniform == "refill"
    larger = spec({"sampling": {"completions_per_prompt": 8, "groups": {"min_group_size": 2}}})
    assert larger.cycle.sampling.groups.on_uniform == "refill"
    assert larger.cycle.sampling.groups.min_group_size == 2
    kept = spec({"sampling": {"groups": {"on_uniform": "keep"}}})
    assert kept.cycle.sampling.groups.on_uniform == "keep"


def test_states_are_kept_by_number_only_where_older_ones_go() -> None:
    assert spec().keep_states is None
    with pytest.raises(ValidationError, match="keep_states_every has no effect without"):
        spec(keep_states_every=10)


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - {"grpo", "reinforce"}))
def test_a_loss_whose_ratio_is_1_is_told_to_be_grpo(name: str) -> None:
    """It is, to the last bits of every coefficient."""
    given, coefficients = inputs(), []
    for each in (name, "grpo"):
        prepared = PolicyLoss(policy_loss=each, kl_beta=0).prepare(given)
        coefficients.append(prepared.coefficients(given.anchor_logprobs_T).coefficients_T)
    assert coefficients[0] == pytest.approx(coefficients[1], rel=1e-12)
    assert f"{name} has the gradient of grpo" in str(
        spec(loss={"policy_loss": name}).without_effect
    )
    for acting in (
        {"loss": {"policy_loss": name, "anchor": "rollout"}},
        {"loss": {"policy_loss": name}, "step": {"ppo_n_minibatches": 2}},
        {"loss": {"policy_loss": "grpo"}},
    ):
        assert spec(**acting).without_effect is None


def test_the_groups_of_a_step_are_a_part_unless_it_is_said_otherwise() -> None:
    run = spec(windows={"prompt_groups_per_step": 6})
    assert run.cycle_of(3, 3).sampling.problems_per_task == 6
    said = spec({"sampling": {"problems_per_task": 64}}, windows={"prompt_groups_per_step": 6})
    assert said.cycle_of(3, 3).sampling.problems_per_task == 64


def test_a_version_that_was_not_exported_publishes_nothing() -> None:
    run = spec()
    first = run.cycle_of(3, 3, dataset="/w/3.jsonl", prompt_groups_per_step=5)
    assert first.name == "grpo7-000003"
    assert Path(first.checkpoint) == run.checkpoint_of(3)
    assert first.cadence.weight_sync_interval == 1
    assert first.problems.prompt_groups_per_step == 5
    again = run.cycle_of(4, 3)
    assert again.cadence.weight_sync_interval == 0
    assert (again.policy_version, Path(again.checkpoint)) == (4, run.checkpoint_of(3))


@pytest.mark.parametrize("name", [*REFUSED_TRAINING_FIELDS, *REFUSED_TRAINING_PREFIXES])
def test_what_has_no_meaning_here_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} has no meaning here: .{{20}}"):
        spec(**{name: 1})


@pytest.mark.parametrize(
    ("cycle", "training", "found"),
    [
        ({"cadence": {"weight_sync_interval": 4}}, {}, "set windows.weight_sync_interval"),
        ({"problems": {"dataset": "/d", "prompt_groups_per_step": 4}}, {}, "set windows.prompt"),
        ({"sampling": {"max_head_offpolicy_versions": 1}}, {}, "asynchronous loop"),
        ({"again": "rollouts"}, {}, "samples each version once"),
        ({"checkpoint": "/c"}, {}, "checkpoint"),
        ({"policy_version": 1}, {}, "policy_version"),
        ({"line": 1}, {}, "line"),
        ({"sampling": {"completions_per_prompt": 1}}, {}, "set 2 or more"),
        ({"sampling": []}, {}, "sampling"),
        ({"sampling": {"groups": 3}}, {}, "groups"),
        ({}, {"weight_sync_before_training": False}, "adopt them: python -m flows --adopt"),
        ({}, {"reference": TRAINER, "loss": {"kl_beta": 0}}, "reference has no effect"),
        ({}, {"init_from_checkpoint": "grpo7:3"}, "choose another run_id"),
        ({}, {"init_from_checkpoint": "/states/3"}, "init_from_checkpoint"),
        ({}, {"output_model_id": "a/b"}, "output_model_id"),
        ({}, {"dcp_save_interval": -1}, "dcp_save_interval"),
        ({}, {"surprise": 1}, "surprise"),
        ({}, {"trainer": {"name": "team.trainer"}}, "package.module:function"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_is_refused(
    cycle: dict[str, Any], training: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValidationError, match=found):
        spec(cycle, **training)


def test_the_form_needs_no_more_than_the_file() -> None:
    schema = json.loads(json.dumps(TrainingSpec.model_json_schema()))
    assert schema["required"] == ["cycle", "trainer"]
    assert schema["$defs"]["WindowCycle"]["required"] == ["run_id", "work_dir", "problems"]


def ahead(cycle: dict[str, Any] | None = None, **training: Any) -> AsyncTrainingSpec:
    return AsyncTrainingSpec.model_validate(
        {"cycle": CYCLE | (cycle or {}), "trainer": TRAINER, **training}
    )


def test_an_asynchronous_run_is_a_version_ahead_and_clips_against_the_rollout() -> None:
    for run in (ahead(), ahead(loss={"eps_clip": 0.1}), ahead(pipeline_chunks_per_step=3)):
        assert AsyncTrainingSpec.model_validate_json(run.model_dump_json()) == run
        assert (run.loss.policy_loss, run.loss.anchor, run.loss.tis) == ("grpo", "rollout", None)
        assert run.cycle.sampling.max_head_offpolicy_versions == 1
        assert run.groups_ahead == 16
    assert ahead(loss={"anchor": "trainer"}).loss.tis is not None
    assert ahead(pipeline_chunks_per_step=3).chunk_sizes == (2, 3, 3)
    assert ahead(windows={"prompt_groups_per_step": 3}).chunk_sizes == (3,)
    cycle = ahead(pipeline_chunks_per_step=4).cycle_of(2, 2, dataset="/w/2.jsonl")
    # What a chunk needs is written when it is there, not with a part of 64 problems.
    assert cycle.sampling.problems_per_task == 2
    assert spec().chunk_sizes == (8,)


@pytest.mark.parametrize(
    ("cycle", "training", "found"),
    [
        ({"sampling": {"max_head_offpolicy_versions": 0}}, {}, "python -m flows.rl_loop"),
        ({"sampling": {"groups": {"on_uniform": "refill"}}}, {}, "refill has no effect"),
        ({"cadence": {"weight_sync_interval": 2}}, {}, "set windows.weight_sync_interval"),
        ({}, {"windows": {"weight_sync_interval": 2}}, "every step .* publishes"),
        ({}, {"pipeline_chunks_per_step": 9}, "a step has 8 groups: set at most 8"),
        ({}, {"pipeline_chunks_per_step": 0}, "pipeline_chunks_per_step"),
        (
            {},
            {"pipeline_chunks_per_step": 2, "step": {"ppo_n_minibatches": 2}},
            "before all groups are there",
        ),
        (
            {},
            {"pipeline_chunks_per_step": 2, "loss": {"kl": "reward"}},
            "before all groups are there",
        ),
        ({}, {"loss": {"tis": {"cap": 2}}}, "tis has no effect with anchor rollout"),
    ],
    ids=str,
)
def test_an_asynchronous_run_that_cannot_be_is_refused(
    cycle: dict[str, Any], training: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValidationError, match=found):
        ahead(cycle, **training)
