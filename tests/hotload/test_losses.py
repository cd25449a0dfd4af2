"""The seven losses: golden numbers, loops by hand, finite differences, what torch once said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotload.training.correction import Correction
from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import LossFigures, LossName, PolicyLoss
from tests.hotload.loss_cases import (
    NAMES,
    SETTINGS,
    Samples,
    Token,
    by_hand,
    evaluated,
    inputs_of,
    random_samples,
    shown,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
LOG = np.log
POLICY, ANCHOR = LOG([0.5, 0.3, 0.2, 0.6]), LOG([0.4, 0.3, 0.4, 0.3])
SAMPLER, REFERENCE = LOG([0.45, 0.28, 0.05, 0.33]), LOG([0.5, 0.25, 0.3, 0.4])


def golden_sample(advantage: float) -> list[Token]:
    values = zip(POLICY, ANCHOR, SAMPLER, REFERENCE, strict=True)
    return [Token(*map(float, each), advantage=advantage) for each in values]


GOLDEN_CASES: dict[float, dict[LossName, tuple[float, list[float]]]] = {
    1.0: {
        "grpo": (-5.728822, [0, -1.071262, -2.500500, 0.000333]),
        "importance_sampling": (-6.500722, [-1.111111, -1.071429, -2.5, -1.818182]),
        "reinforce": (-8.000722, [-1.111111, -1.071429, -4.0, -1.818182]),
        "dapo": (-5.846176, [-1.111111, -1.071429, -2.5, 0]),
        "dro": (10.442946, [-0.877732, -1.071429, -5.034657, -0.874434]),
        "gspo": (-8.320886, [-0.939886, -1.132898, -5.286856, -0.961247]),
        "cispo": (9.092301, [-1.111111, -1.071429, -4.0, -1.163636]),
    },
    -1.0: {
        "grpo": (8.000904, [1.111111, 1.071595, -0.000500, 1.818515]),
        "importance_sampling": (6.500722, [1.111111, 1.071429, 2.5, 1.818182]),
        "reinforce": (8.000722, [1.111111, 1.071429, 4.0, 1.818182]),
        "dapo": (8.000722, [1.111111, 1.071429, 0, 1.818182]),
        "dro": (-10.392411, [0.900046, 1.071429, 4.965343, 0.943748]),
        "gspo": (8.320886, [0.939886, 1.132898, 5.286856, 0.961247]),
        "cispo": (-9.092301, [1.111111, 1.071429, 4.0, 1.163636]),
    },
}


@pytest.mark.parametrize("advantage", GOLDEN_CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_golden_case(name: LossName, advantage: float) -> None:
    found = evaluated(PolicyLoss(policy_loss=name), [golden_sample(advantage)])
    total, coefficients = GOLDEN_CASES[advantage][name]
    assert found.figures.loss == pytest.approx(total, abs=1e-6)
    assert found.coefficients_T == pytest.approx(coefficients, abs=1e-6)


LOGPROBS = st.floats(-30, 0)
ADVANTAGES = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-3, 3)


@st.composite
def tokens(draw: st.DrawFn) -> Token:
    policy = draw(LOGPROBS)
    near = st.floats(-0.6, 0.6).map(lambda step: min(policy + step, 0.0))
    others = [draw(near | LOGPROBS) for _ in range(3)]
    return Token(policy, *others, advantage=draw(ADVANTAGES), is_in_the_loss=draw(st.booleans()))


SAMPLES = st.lists(st.lists(tokens(), max_size=6), max_size=5)


@settings(max_examples=500)
@given(fields=st.sampled_from(SETTINGS), samples=SAMPLES)
def test_ragged_samples_are_a_loop_by_hand(fields: dict[str, Any], samples: Samples) -> None:
    loss = PolicyLoss(**fields)
    found = evaluated(loss, samples)
    total, coefficients = by_hand(loss, samples)
    assert found.figures.loss == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert found.coefficients_T.tolist() == pytest.approx(coefficients, rel=1e-12, abs=1e-12)


def has_a_slope(fields: dict[str, Any]) -> bool:
    """Whether finite differences see the gradient that is meant. cispo's ratio has none; gspo's
    reaches every token of a sample, and adds up to one token's where all weigh the same.
    """
    loss = PolicyLoss(**fields)
    is_even = loss.kl != "reward" and (loss.tis is None or loss.tis.level == "sequence")
    return loss.policy_loss != "cispo" and (loss.policy_loss != "gspo" or is_even)


@pytest.mark.parametrize("fields", [each for each in SETTINGS if has_a_slope(each)], ids=shown)
def test_a_coefficient_is_the_slope_of_the_loss(fields: dict[str, Any]) -> None:
    loss = PolicyLoss(**fields)
    # One advantage a sample, as gspo's sum needs it.
    samples = [
        [replace(token, advantage=sample[0].advantage) for token in sample]
        for sample in random_samples(3)
    ]
    inputs, policy = inputs_of(samples, loss)
    prepared = loss.prepare(inputs)
    found = prepared.coefficients(policy).coefficients_T
    step = 1e-6
    for place in range(len(policy)):
        moved = np.zeros(len(policy))
        moved[place] = step
        above, below = (prepared.coefficients(policy + sign * moved) for sign in (1, -1))
        slope = (above.figures.loss - below.figures.loss) / (2 * step)
        assert found[place] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "autograd.json").read_text())["cases"])
def test_torch_once_differentiated_to_the_same(case: dict[str, Any]) -> None:
    loss = PolicyLoss(**case["settings"])
    given_samples = json.loads((GOLDEN / "autograd.json").read_text())["samples"]
    found = evaluated(loss, [[Token(*token) for token in sample] for sample in given_samples])
    assert found.figures.loss == pytest.approx(case["loss"], rel=1e-12)
    assert found.coefficients_T == pytest.approx(case["gradient"], rel=1e-12, abs=1e-12)


# Properties.


@pytest.mark.parametrize("name", NAMES)
def test_where_the_policy_is_its_anchor_every_loss_is_the_same(name: LossName) -> None:
    samples = [
        [Token(t.policy, t.policy, t.sampler, t.reference, t.advantage) for t in sample]
        for sample in random_samples(1)
    ]
    loss = PolicyLoss(policy_loss=name, kl_beta=0)
    inputs, policy = inputs_of(samples, loss)
    prepared = loss.prepare(inputs)
    advantages = np.array([token.advantage for sample in samples for token in sample])
    ratios = np.exp([token.policy - token.sampler for sample in samples for token in sample])
    weights = ratios if name == "reinforce" else np.minimum(ratios, 5)
    found = prepared.coefficients(policy)
    assert found.coefficients_T == pytest.approx(-advantages * weights, rel=1e-12)
    assert found.figures.clipped_count == 0


@pytest.mark.parametrize("name", NAMES)
def test_without_an_advantage_only_dro_pulls(name: LossName) -> None:
    samples = [[Token(-1.0, -1.5, -1.2, -1.1, 0.0), Token(-30.0, -1.5, -1.2, -1.1, 0.0)]]
    found = evaluated(PolicyLoss(policy_loss=name, kl_beta=0), samples)
    expected = [0.05 * 0.5, 0.05 * -28.5] if name == "dro" else [0.0, 0.0]
    assert found.coefficients_T == pytest.approx(expected, abs=1e-15)
    assert found.figures.clipped_count == 0


WILD = [math.nan, math.inf, -math.inf, 1e300, -1e300, 7.0]


@pytest.mark.parametrize("fields", SETTINGS, ids=shown)
@pytest.mark.parametrize("wild", WILD)
def test_a_masked_token_changes_nothing_whatever_it_holds(
    fields: dict[str, Any], wild: float
) -> None:
    loss = PolicyLoss(**fields)
    samples = random_samples(5)
    assert any(not token.is_in_the_loss for sample in samples for token in sample)
    changed = [
        [t if t.is_in_the_loss else Token(*[wild] * 5, is_in_the_loss=False) for t in sample]
        for sample in samples
    ]
    before, after = evaluated(loss, samples), evaluated(loss, changed)
    assert np.array_equal(before.coefficients_T, after.coefficients_T)
    assert before.figures == after.figures


@pytest.mark.parametrize("fields", SETTINGS, ids=shown)
def test_neither_the_split_nor_the_order_of_samples_matters(fields: dict[str, Any]) -> None:
    loss = PolicyLoss(**fields)
    samples = random_samples(8, lengths=(4, 0, 3, 6, 1))
    inputs, policy = inputs_of(samples, loss)
    prepared = loss.prepare(inputs)
    whole = prepared.coefficients(policy)
    bounds = np.cumsum([0, *inputs.lengths])
    figures, numbers = LossFigures(), [[3, 0], [1], [], [4, 2]]
    for part in numbers:
        places = [place for n in part for place in range(bounds[n], bounds[n + 1])]
        found = prepared.take(part).coefficients(np.array(policy)[places])
        assert found.coefficients_T == pytest.approx(whole.coefficients_T[places], rel=1e-12)
        figures += found.figures
    assert figures.loss == pytest.approx(whole.figures.loss, rel=1e-12)
    assert figures.token_count == whole.figures.token_count
    assert figures.clipped_share == whole.figures.clipped_share
    assert figures.mean_ratio == pytest.approx(whole.figures.mean_ratio)
    assert figures.mean_reference_kl == pytest.approx(whole.figures.mean_reference_kl)


@pytest.mark.parametrize("estimator", ["k2", "k3", "reward"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kl_moves_the_policy_towards_its_reference(name: LossName, estimator: Any) -> None:
    """A distribution of six, each drawn as often as it is likely, and no other reason to move."""
    logits = np.array([0.2, -0.5, 1.0, 0.0, -1.0, 0.7])
    policy = logits - np.log(np.exp(logits).sum())
    reference = np.log(np.full(6, 1 / 6))

    def distance(logprobs: np.ndarray) -> float:
        if estimator == "k3":
            return float(np.exp(reference) @ (reference - logprobs))
        return float(np.exp(logprobs) @ (logprobs - reference))

    loss = PolicyLoss(policy_loss=name, kl_beta=0.5, kl=estimator, tis=None)
    inputs = LossInputs.of(
        lengths=[1] * 6,
        loss_mask_T=[True] * 6,
        advantages=[0.0] * 6,
        sampling_logprobs_T=policy,
        anchor_logprobs_T=policy,
        reference_logprobs_T=reference,
    )
    coefficients = loss.prepare(inputs).coefficients(policy).coefficients_T
    shares = np.exp(policy)
    # ∂logprob_i/∂logit_j = [i = j] − p_j
    gradient = shares * coefficients - shares * (shares @ coefficients)
    step = 1e-4
    after = logits - step * gradient
    after -= np.log(np.exp(after).sum())
    assert distance(after) < distance(policy)
    # On the policy's own samples it is exactly the gradient of a divergence.
    expected = np.array(
        [
            (distance(moved - np.log(np.exp(moved).sum())) - distance(policy)) / 1e-7
            for moved in (logits + 1e-7 * np.eye(6))
        ]
    )
    assert gradient == pytest.approx(0.5 * expected, abs=1e-6)


def test_a_policy_far_below_its_reference_is_still_pulled_up() -> None:
    token = Token(-60.0, -60.0, -60.0, -1.0, 0.0)
    found = evaluated(PolicyLoss(kl_beta=1e-3, tis=None), [[token]])
    assert found.coefficients_T[0] == pytest.approx(1e-3 * (1 - math.exp(20)))
    assert math.isfinite(found.figures.loss)


def test_the_cap_and_icepop_and_the_sequence_level_of_the_golden_case() -> None:
    def prepared(**fields: Any) -> Any:
        loss = PolicyLoss(policy_loss="dapo", tis=Correction(**fields))
        return loss.prepare(inputs_of([golden_sample(1.0)], loss)[0])

    token = prepared()
    assert token.correction_T == pytest.approx([0.888889, 1.071429, 5, 0.909091], abs=1e-6)
    assert (token.cut_share, token.mean_correction) == (0.25, pytest.approx(7.869408 / 4, abs=1e-6))
    sequence = prepared(level="sequence")
    assert sequence.correction_T == pytest.approx([1.622284] * 4, abs=1e-6)
    assert sequence.cut_share == 0
    pop = prepared(icepop=2)
    assert pop.correction_T == pytest.approx([0.888889, 1.071429, 0, 0.909091], abs=1e-6)
    assert pop.cut_share == 0.25


def test_a_masked_token_is_in_no_mean_and_has_weight_1() -> None:
    sample = [
        Token(-1.0, -1.0, -2.0, 0.0, 1.0),
        Token(-1.0, -9.0, -1.0, 0.0, 1.0, is_in_the_loss=False),
        Token(-1.0, -1.0, -1.5, 0.0, 1.0),
    ]
    for tis, expected in (
        ({"level": "sequence"}, [math.exp(0.75), 1, math.exp(0.75)]),
        ({"icepop": 2.0}, [0, 1, math.exp(0.5)]),
        ({"icepop": 1.0}, [0, 1, 0]),
    ):
        loss = PolicyLoss(policy_loss="dapo", tis=tis)
        prepared = loss.prepare(inputs_of([sample], loss)[0])
        assert prepared.correction_T == pytest.approx(expected)
        kept = [weight for weight in (expected[0], expected[2]) if weight]
        assert prepared.cut_share == 1 - len(kept) / 2
        assert prepared.mean_correction == pytest.approx(sum(kept) / 2)


def test_a_dual_clip_bounds_what_a_negative_advantage_costs() -> None:
    samples = [[Token(-0.1, -3.0, -3.0, -3.0, -1.0)]]
    found = evaluated(PolicyLoss(policy_loss="dapo", dual_clip=3, tis=None), samples)
    assert found.figures.loss == 3
    assert found.coefficients_T == [0]
    off = evaluated(PolicyLoss(policy_loss="dapo", tis=None), samples)
    assert off.figures.loss == pytest.approx(math.exp(2.9))
    assert off.coefficients_T == pytest.approx([math.exp(2.9)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [2]])
def test_a_batch_of_nothing_gives_nothing(name: LossName, lengths: list[int]) -> None:
    none = np.zeros(sum(lengths))
    inputs = LossInputs.of(
        lengths=np.array(lengths, dtype=np.int64),
        loss_mask_T=none,
        advantages=np.ones(len(lengths)),
        sampling_logprobs_T=none,
        anchor_logprobs_T=none,
    )
    found = PolicyLoss(policy_loss=name, kl_beta=0).prepare(inputs)
    value = found.coefficients(none)
    assert value.coefficients_T.tolist() == none.tolist()
    assert value.figures == LossFigures()
    assert (value.figures.clipped_share, value.figures.mean_ratio) == (0, 1)
    assert (found.cut_share, found.mean_correction) == (0, 1)
