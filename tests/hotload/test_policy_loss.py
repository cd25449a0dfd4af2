"""What a loss is declared with, what it is given, and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hotload.options import Sampling
from hotload.rollout.completions_api import Answer
from hotload.training.correction import Correction
from hotload.training.divisor import gradient_divisor
from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import PARAMETERS, PolicyLoss
from tests.hotload.loss_cases import NAMES


def inputs(**changed: Any) -> LossInputs:
    """Three samples of 2, 0 and 3 tokens, one of them masked."""
    given = {
        "lengths": [2, 0, 3],
        "loss_mask_T": [True, True, True, False, True],
        "advantages": [1.0, 0.0, -1.0],
        "sampling_logprobs_T": [-1.0, -2.0, -3.0, 0.0, -1.5],
        "anchor_logprobs_T": [-1.1, -2.1, -3.1, 0.0, -1.4],
    }
    return LossInputs.of(**(given | changed))


# Declared.


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_loss_says_what_was_in_force(name: str) -> None:
    loss = PolicyLoss(policy_loss=name)
    stored = loss.model_dump_json()
    assert PolicyLoss.model_validate_json(stored) == loss
    for parameter, default in PARAMETERS[name].items():
        if parameter == "eps_clip_high" and default is None:
            default = loss.eps_clip
        assert getattr(loss, parameter) == default
    assert loss.tis == (None if name == "reinforce" else Correction(level="token", cap=5))
    assert (loss.kl_beta, loss.kl) == ((0.001, "k3") if name == "grpo" else (0, None))


def test_what_is_left_out_follows_what_is_given() -> None:
    assert PolicyLoss(eps_clip=0.1).eps_clip_high == 0.1
    assert PolicyLoss(eps_clip=0.1, eps_clip_high=0.3).eps_clip_high == 0.3
    assert PolicyLoss(kl_beta=0).kl is None
    assert PolicyLoss(policy_loss="dapo", kl_beta=0.1).kl == "k3"
    assert PolicyLoss(tis=None).tis is None
    assert PolicyLoss(anchor="rollout").tis is None
    assert PolicyLoss(tis={"icepop": 2}).tis == Correction(cap=5, icepop=2)


def test_what_a_loss_needs_of_a_trainer() -> None:
    def needs(**fields: Any) -> tuple[bool, bool]:
        loss = PolicyLoss(**fields)
        return loss.needs_anchor, loss.needs_reference

    assert needs() == (True, True)
    assert needs(policy_loss="dapo") == (True, False)
    assert needs(policy_loss="dapo", anchor="rollout") == (False, False)
    assert needs(policy_loss="reinforce") == (False, False)
    assert needs(policy_loss="reinforce", kl_beta=1, kl="reward") == (True, True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"policy_loss": "ppo"}, "policy_loss"),
    ({"policy_loss": None}, "policy_loss"),
    ({"policy_loss": "reinforce", "eps_clip": 0.2}, "eps_clip has no effect with reinforce"),
    ({"policy_loss": "dro", "eps_clip_high": 0.2}, "has no effect with dro, which takes dro_beta"),
    ({"policy_loss": "gspo", "dual_clip": 3}, "dual_clip has no effect with gspo"),
    ({"policy_loss": "grpo", "dro_beta": 0.1}, "dro_beta has no effect with grpo"),
    ({"policy_loss": "grpo", "ratio_log_cap": 3}, "ratio_log_cap has no effect with grpo"),
    ({"kl_beta": 0, "kl": "k3"}, "kl k3 has no effect with kl_beta 0"),
    ({"policy_loss": "dapo", "kl": "reward"}, "kl reward has no effect with kl_beta 0"),
    ({"kl": "k1"}, "kl"),
    ({"policy_loss": "reinforce", "tis": {}}, "tis has no effect with reinforce"),
    ({"anchor": "rollout", "tis": {}}, "tis has no effect with anchor rollout"),
    ({"anchor": "old_policy"}, "anchor"),
    ({"eps_clip": 0}, "eps_clip"),
    ({"eps_clip": 1.1}, "eps_clip"),
    ({"eps_clip": math.nan}, "eps_clip"),
    ({"eps_clip_high": math.inf}, "eps_clip_high"),
    ({"dual_clip": 1}, "dual_clip"),
    ({"kl_beta": -0.1}, "kl_beta"),
    ({"kl_beta": math.nan}, "kl_beta"),
    ({"kl_beta": math.inf}, "kl_beta"),
    ({"policy_loss": "dapo", "ratio_log_cap": 21}, "ratio_log_cap"),
    ({"tis": {"cap": 0}}, "cap"),
    ({"tis": {"icepop": 0.5}}, "icepop"),
    ({"tis": {"icepop": 2, "level": "sequence"}}, "icepop has no effect with level sequence"),
    ({"tis": {"level": "turn"}}, "level"),
    ({"epsilon": 0.2}, "epsilon"),
]


@pytest.mark.parametrize(("fields", "found"), REFUSED, ids=str)
def test_what_would_have_no_effect_or_no_meaning_is_refused(
    fields: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(found)):
        PolicyLoss(**fields)


# Given.


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"lengths": [2, 3]}, "advantages: found shape (3,), expected (2,), one per sample"),
        ({"lengths": [2, 0, 4]}, "loss_mask_T: found shape (5,), expected (6,)"),
        ({"lengths": [2, 4, -1]}, "lengths: found -1, expected 0 or more"),
        ({"lengths": [2.0, 0.0, 3.0]}, "lengths: expected one whole number per sample"),
        ({"lengths": [[2, 0, 3]]}, "lengths: expected one whole number per sample"),
        ({"loss_mask_T": [0, 1, 2, 1, 1]}, "loss_mask_T: expected true and false"),
        ({"loss_mask_T": [math.nan] * 5}, "loss_mask_T: expected true and false"),
        ({"advantages": None}, "give either advantages"),
        ({"advantages_T": [0.0] * 5}, "give either advantages"),
        ({"advantages": None, "advantages_T": [0.0] * 4}, "advantages: found shape (4,)"),
        ({"advantages": [1, 0, math.nan]}, "found nan at token 2"),
        ({"advantages": [1, 0, None]}, "the reward or its scaling must be mended"),
        ({"advantages": [1, 0, -1e7]}, "found -1e+07 at token 2"),
        ({"sampling_logprobs_T": [-1, -math.inf, -3, 0, -1]}, "the sampler must be mended"),
        ({"sampling_logprobs_T": [-1, -2, -3, 0, math.nan]}, "sampling_logprobs_T: found nan"),
        ({"sampling_logprobs_T": [[-1, -2, -3, 0, -1]]}, "found shape (1, 5), expected (5,)"),
        ({"sampling_logprobs_T": [1, 2, 3, 0, 1.5]}, "not their negative"),
        ({"anchor_logprobs_T": [-1, -2, math.inf, 0, -1]}, "the trainer must be mended"),
        ({"anchor_logprobs_T": [-1, -2, -1e7, 0, -1]}, "within ± 1e+06: the trainer"),
        ({"reference_logprobs_T": [math.nan] * 5}, "the reference model must be mended"),
        ({"reference_logprobs_T": [-1.0] * 4}, "reference_logprobs_T: found shape (4,)"),
    ],
    ids=str,
)
def test_arrays_that_cannot_be_are_refused_with_who_must_act(
    changed: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(found)):
        inputs(**changed)


@pytest.mark.parametrize("logprob", [-1e9, -1000001.0, -1e6, -1e-9, 0.0, 1e-3, 5e-3, 0.01, 0.02])
def test_what_the_sampler_lets_pass_the_trainer_takes(logprob: float) -> None:
    """Else it is stored as usable, and the run stops at it whenever it is started."""
    answer = Answer(Sampling(), None)
    answer.prompt_token_ids = (7,)
    logprobs = {"content": [{"token_id": 1, "sampling_logprob": logprob}]}
    answer.add({"choices": [{"text": "a", "finish_reason": "stop", "logprobs": logprobs}]})
    answer.is_done = True
    if answer.finish() is None:
        stored = np.array([logprob, -2, -3, 0, -1], dtype=np.float32)
        assert inputs(sampling_logprobs_T=stored).token_count == 4
    else:
        assert not -1e6 <= logprob <= 0.01


def test_a_sample_without_a_token_in_the_loss_may_have_no_advantage() -> None:
    given = inputs(advantages=[1.0, math.nan, -1.0])
    assert given.advantages_T.tolist() == [1, 1, -1, 0, -1]
    assert (len(given), given.token_count, given.trained_sample_count) == (3, 4, 2)


@pytest.mark.parametrize(
    ("fields", "changed", "found"),
    [
        ({"kl_beta": 0.1}, {}, "kl_beta is 0.1 and there are no reference_logprobs_T"),
        ({"kl_beta": 0}, {"reference_logprobs_T": [-1.0] * 5}, "have no effect with kl_beta 0"),
        ({"policy_loss": "dapo"}, {"anchor_logprobs_T": None}, "there are no anchor_logprobs_T"),
        ({"policy_loss": "dapo", "anchor": "rollout"}, {}, "no effect with anchor rollout"),
    ],
)
def test_a_loss_refuses_what_it_lacks_and_what_it_would_ignore(
    fields: dict[str, Any], changed: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(found)}.*the trainer must"):
        PolicyLoss(**fields).prepare(inputs(**changed))


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, -1e7])
def test_what_the_policy_says_of_a_token_in_the_loss_is_checked(wild: float) -> None:
    prepared = PolicyLoss(policy_loss="dapo").prepare(inputs())
    with pytest.raises(ValueError, match=r"logprobs_T: found .* at token 4.*the trainer must"):
        prepared.coefficients([-1, -1, -1, -1, wild])
    assert np.isfinite(prepared.coefficients([-1, -1, -1, wild, -1]).coefficients_T).all()
    with pytest.raises(ValueError, match=r"found shape \(4,\), expected \(5,\)"):
        prepared.coefficients([-1.0] * 4)


def test_a_reward_kl_is_of_the_whole_step() -> None:
    loss = PolicyLoss(policy_loss="dapo", kl_beta=0.5, kl="reward", tis=None)
    whole = loss.prepare(inputs(reference_logprobs_T=[-1.0, -3.1, -3.1, 0.0, -1.4]))
    apart = np.array([-0.1, 1.0, 0.0, 0.0, 0.0])
    expected = np.array([1, 1, -1, 0, -1]) + 0.5 * (0.9 / 4 - apart) * [1, 1, 1, 0, 1]
    assert whole.inputs.advantages_T == pytest.approx(expected)
    assert whole.take([2]).inputs.advantages_T == pytest.approx(expected[2:])


def test_divisors_count_the_step_not_what_was_clipped() -> None:
    given = inputs()
    assert gradient_divisor("num_loss_tokens", given) == 4
    assert gradient_divisor("num_sequences", given) == 2
    assert gradient_divisor("none", given) == 1
    with pytest.raises(ValueError, match="the trainer must skip the step"):
        gradient_divisor("none", inputs(loss_mask_T=[False] * 5))


def test_arrays_of_other_types_are_taken() -> None:
    single = inputs(
        lengths=np.array([2, 0, 3], dtype=np.uint8),
        loss_mask_T=np.array([1, 1, 1, 0, 1], dtype=np.float32),
        sampling_logprobs_T=np.array([-1, -2, -3, 0, -1.5], dtype=np.float32),
    )
    assert single.sampling_logprobs_T.dtype == np.float64
    assert single.sampling_logprobs_T.tolist() == inputs().sampling_logprobs_T.tolist()
    assert single.loss_mask_T.tolist() == inputs().loss_mask_T.tolist()
