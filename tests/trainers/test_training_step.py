"""A step of training over the seam, with the numpy trainer behind it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.numpy_trainer import NumpyTrainer
from hotload.dataset.table import rollouts_frame
from hotload.dataset.trainer_batch import Batch, make_batch
from hotload.errors import TrainerError
from hotload.rollout.routing import Routes
from hotload.rollout.trajectory import ScoredGroup, Segment, Trajectory
from hotload.trainers.loading import load_trainer
from hotload.trainers.saved_state import read_state
from hotload.trainers.step_samples import StepSamples
from hotload.trainers.training_step import (
    AccumulatedStep,
    StepOutcome,
    StepSettings,
    forward_backward_custom,
    train_step,
)
from hotload.trainers.turn_scores import turn_advantages
from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import PolicyLoss
from hotload.training.schedule import AdamSettings
from hotload.training.settings import TrainerFunction
from hotload.training.turn_advantages import TurnAdvantages
from tests.factories import scored_group, trajectory

BASE = Path(__file__).parents[1] / "emulator" / "fixtures" / "llama"
GRPO = PolicyLoss(kl_beta=0)
SETTINGS = StepSettings()
RATE = 1e-3


@pytest.fixture
def trainer(tmp_path: Path) -> NumpyTrainer:
    return NumpyTrainer(BASE, tmp_path / "states")


def segment(
    trainer: NumpyTrainer, random: np.random.Generator, prompt: int, turns: Sequence[int]
) -> Segment:
    """Turns of these many tokens, as a sampler up to 0.3 nats off had them; a negative one is what
    a tool said."""
    count = sum(map(abs, turns))
    ids = random.integers(0, 64, prompt + count).tolist()
    mask = tuple(turn > 0 for turn in turns for _ in range(abs(turn)))
    exact = trainer.logprobs([ids])[0][prompt - 1 :]
    sampled = np.minimum(exact + random.uniform(-0.3, 0.3, count), 0)
    kept = np.where(mask, sampled, 0.0).tolist()
    return Segment(tuple(ids[:prompt]), tuple(ids[prompt:]), tuple(kept), mask)


def scored(trainer: NumpyTrainer) -> list[ScoredGroup]:
    """Two groups of three; a sample of two segments, others with a tool's words."""
    random = np.random.default_rng(3)
    shapes: list[list[list[list[int]]]] = [
        [[[4, 5]], [[3, 2, -3, 2], [9, 4]], [[4, 7]]],
        [[[6, 1]], [[2, 3, -2, 1, -1, 2]], [[5, 4, -2]]],
    ]
    groups = []
    for name, group in zip("ab", shapes, strict=True):
        samples = [
            trajectory(
                *[segment(trainer, random, one[0], one[1:]) for one in segments],
                number=number,
                problem_id=name,
            )
            for number, segments in enumerate(group)
        ]
        groups.append(scored_group(*samples, rewards=(0.0, 1.0, 0.25)))
    return groups


def batch_of(groups: Sequence[ScoredGroup]) -> Batch:
    return make_batch(rollouts_frame(groups, run_id="run", policy_version=3))


@pytest.fixture
def batch(trainer: NumpyTrainer) -> Batch:
    return batch_of(scored(trainer))


@pytest.fixture
def samples(batch: Batch) -> StepSamples:
    return StepSamples.of_batch(batch)


def gradient(trainer: NumpyTrainer) -> np.ndarray:
    """A tenth of the last step's, from the first moments that it left."""
    arrays, _ = read_state(trainer._states, trainer.save_state("moments"))
    return np.concatenate([each.ravel() for n, each in arrays.items() if n.startswith("first/")])


def step(
    samples: StepSamples,
    states: Path,
    loss: PolicyLoss = GRPO,
    settings: Mapping[str, Any] | None = None,
    reference: NumpyTrainer | None = None,
    rate: float = 0.0,
) -> tuple[NumpyTrainer, StepOutcome]:
    trainer = NumpyTrainer(BASE, states)
    chosen = StepSettings(**(settings or {}))
    outcome = train_step(trainer, samples, loss, chosen, learning_rate=rate, reference=reference)
    return trainer, outcome


def test_segments_are_put_together_as_the_rows_have_them(
    samples: StepSamples, batch: Batch
) -> None:
    assert len(batch) == 7
    assert len(samples) == 6
    assert [len(each) for each in samples.segments] == [1, 2, 1, 1, 1, 1]
    assert samples.inputs.lengths.tolist() == [5, 11, 7, 1, 9, 6]
    assert samples.inputs.token_count == int(batch.loss_mask.sum())
    assert samples.group_numbers == (0, 0, 0, 1, 1, 1)
    assert samples.rewards == (0, 1, 0.25, 0, 1, 0.25)


def test_at_its_own_anchor_a_loss_is_weighted_advantages(
    samples: StepSamples, tmp_path: Path
) -> None:
    """By hand: c = −Aw, placed at the predictions of each sequence."""
    by_hand = NumpyTrainer(BASE, tmp_path)
    inputs = samples.inputs
    policy_T = samples.responses(by_hand.logprobs(samples.token_ids))
    weights_T = np.minimum(np.exp(policy_T - inputs.sampling_logprobs_T), 5)
    values_T = np.where(inputs.loss_mask_T, -inputs.advantages_T * weights_T, 0)
    by_hand.backward(samples.token_ids, samples.by_prediction(values_T))
    adam = AdamSettings()
    norm = by_hand.step(adam, learning_rate=0.0, divisor=inputs.token_count).gradient_norm
    trainer, outcome = step(samples, tmp_path)
    assert np.array_equal(gradient(trainer), gradient(by_hand))
    figures = outcome.figures
    assert figures["train/grad_norm"] == norm
    assert figures["train/ratio_mean"] == 1
    assert figures["train/ppo_kl"] == 0
    assert figures["train/clip_frac"] == 0
    assert figures["train/active_tokens"] == inputs.token_count
    assert figures["train/loss"] == pytest.approx(values_T.sum() / inputs.token_count)
    assert 0 < figures["train/inference_k3"] < 0.05
    assert figures["tis/weight_mean"] == pytest.approx(weights_T[inputs.loss_mask_T].mean())
    assert figures["train/entropy"] == pytest.approx(-policy_T[inputs.loss_mask_T].mean())
    assert "train/ref_kl" not in figures
    page = (BASE.parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    assert not [name for name in figures if f"`{name}`" not in page]
    assert np.array_equal(np.concatenate(outcome.logprobs), policy_T)


LOSSES = [
    GRPO,
    PolicyLoss(policy_loss="gspo", anchor="rollout"),
    PolicyLoss(policy_loss="reinforce"),
    PolicyLoss(policy_loss="dapo", kl_beta=0.1),
    PolicyLoss(kl_beta=0.1, kl="reward"),
    PolicyLoss(policy_loss="cispo", tis={"level": "sequence"}),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.policy_loss}-{loss.kl}")
def test_a_split_changes_nothing_but_rounding(
    samples: StepSamples, tmp_path: Path, loss: PolicyLoss
) -> None:
    reference = None
    if loss.needs_reference:
        reference = NumpyTrainer(BASE, tmp_path, temperature=1.3)
    limits = (10_000, 40, 1)
    split = [[len(each) for each in samples.micro_batches(limit)] for limit in limits]
    assert split == [[6], [2, 3, 1], [1] * 6]
    found = [
        step(samples, tmp_path, loss, {"micro_batch_tokens": limit}, reference) for limit in limits
    ]
    whole, figures = gradient(found[0][0]), found[0][1].figures
    assert np.abs(whole).max() > 0
    for trainer, outcome in found[1:]:
        assert np.abs(gradient(trainer) - whole).max() < 1e-6 * np.abs(whole).max()
        assert outcome.figures == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_what_is_masked_counts_nowhere(samples: StepSamples, batch: Batch, tmp_path: Path) -> None:
    assert (~samples.inputs.loss_mask_T).sum() > 5
    batch.sampling_logprobs[~batch.loss_mask] = np.nan
    _, outcome = step(StepSamples.of_batch(batch), tmp_path)
    assert outcome.figures == step(samples, tmp_path)[1].figures


def test_a_ratio_per_sample_is_of_its_tokens_in_the_loss(
    samples: StepSamples, tmp_path: Path
) -> None:
    _, outcome = step(samples, tmp_path, PolicyLoss(policy_loss="gspo"))
    assert outcome.figures["train/ratio_mean"] == 1
    assert outcome.figures["train/clip_frac"] == 0


def test_log_probabilities_go_back_to_the_rows(
    samples: StepSamples, batch: Batch, tmp_path: Path
) -> None:
    _, outcome = step(samples, tmp_path)
    rows = batch.by_frame_row(outcome.logprobs)
    assert [len(row) for row in rows] == batch.completion_mask.sum(axis=1).tolist()


def test_a_kl_pulls_towards_the_reference(trainer: NumpyTrainer, batch: Batch) -> None:
    """With nothing to win, the policy goes back to where it came from; with β 0 it stays."""
    reference = NumpyTrainer(BASE, trainer._states)
    train_step(trainer, StepSamples.of_batch(batch), GRPO, SETTINGS, learning_rate=1e-2)
    idle = StepSamples.of_batch(batch).with_advantages(np.zeros(39))
    loss = PolicyLoss(kl_beta=1.0)
    found = [
        train_step(trainer, idle, loss, SETTINGS, learning_rate=RATE, reference=reference)
        for _ in range(8)
    ]
    apart = [outcome.figures["train/ref_kl"] for outcome in found]
    assert apart[0] > 1e-3
    assert apart[-1] < apart[0] / 4


def test_a_reference_without_effect_and_a_kl_without_reference_are_refused(
    samples: StepSamples, trainer: NumpyTrainer
) -> None:
    for loss, reference in ((GRPO, trainer), (PolicyLoss(kl_beta=0.1), None)):
        with pytest.raises(ValueError, match=r"found (a|no) reference where there is"):
            train_step(trainer, samples, loss, SETTINGS, learning_rate=RATE, reference=reference)


def test_later_minibatches_leave_the_anchor(samples: StepSamples, tmp_path: Path) -> None:
    settings = {"ppo_n_minibatches": 3}
    trainer, outcome = step(samples, tmp_path, settings=settings, rate=0.02)
    assert trainer._step == 3
    assert outcome.figures["train/ratio_mean"] != 1
    assert outcome.figures["train/clip_frac"] > 0
    first = NumpyTrainer(BASE, tmp_path).logprobs(samples.token_ids)
    assert np.allclose(np.concatenate(outcome.logprobs), samples.responses(first), atol=1e-5)
    # Without a rate each is the step of its samples, and the loss their mean.
    _, still = step(samples, tmp_path, settings=settings)
    alone = [step(samples.take(part), tmp_path)[1] for part in ([0, 1], [2, 3], [4, 5])]
    losses = [each.figures["train/loss"] for each in alone]
    assert still.figures["train/loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    # The last step of a window may be smaller: a sample each.
    trainer, _ = step(samples, tmp_path, settings={"ppo_n_minibatches": 7})
    assert trainer._step == 6


BEFORE = ("train/inference_k1", "train/inference_k3", "train/entropy")


@pytest.mark.parametrize(
    "loss",
    [GRPO, PolicyLoss(kl_beta=0, anchor="rollout"), PolicyLoss(policy_loss="reinforce")],
    ids=lambda loss: f"{loss.policy_loss}-{loss.anchor}",
)
def test_what_is_told_of_before_the_step_is_of_before_every_minibatch(
    samples: StepSamples, tmp_path: Path, loss: PolicyLoss
) -> None:
    _, whole = step(samples, tmp_path, loss, rate=0.02)
    _, cut = step(samples, tmp_path, loss, {"ppo_n_minibatches": 3}, rate=0.02)
    for name in BEFORE:
        assert cut.figures[name] == pytest.approx(whole.figures[name], abs=1e-5), name
    apart = np.concatenate(cut.logprobs) - np.concatenate(whole.logprobs)
    assert np.abs(apart).max() < 1e-5


def minus_advantages(
    inputs: LossInputs, logprobs_T: np.ndarray
) -> tuple[float, np.ndarray, dict[str, float]]:
    assert inputs.anchor_logprobs_T is not None
    values_T = -inputs.advantages_T * np.exp(logprobs_T - inputs.anchor_logprobs_T)
    return float(values_T.sum()), values_T, {"mine": 1.0}


def test_a_loss_of_ones_own(samples: StepSamples, tmp_path: Path) -> None:
    trainer = NumpyTrainer(BASE, tmp_path)
    value = forward_backward_custom(
        trainer, samples, minus_advantages, uses="numpy", micro_batch_tokens=40
    )
    assert value.metrics == {"mine": 1.0}
    trainer.step(AdamSettings(), learning_rate=0.0, divisor=samples.inputs.token_count)
    same = PolicyLoss(policy_loss="importance_sampling", tis=None)
    other, _ = step(samples, tmp_path, same, {"micro_batch_tokens": 40})
    assert np.allclose(gradient(trainer), gradient(other), atol=1e-9)
    assert np.abs(gradient(trainer)).max() > 1e-4


def test_turns_are_credited_with_what_they_add_to_the_answer(
    samples: StepSamples, trainer: NumpyTrainer
) -> None:
    answers = {0: [5, 6, 7], 1: [8]}
    settings = TurnAdvantages()
    found_T = turn_advantages(trainer, samples, settings, answers, micro_batch_tokens=40)
    # By hand: where turns end in each sample, as (segment, tokens of its response).
    ends: list[list[tuple[int, int]]] = [
        [(0, 5)], [(0, 2), (0, 7), (1, 4)], [(0, 7)],
        [(0, 1)], [(0, 3), (0, 6), (0, 9)], [(0, 6)],
    ]  # fmt: skip
    gains, lengths = [], []
    for number, turns in enumerate(ends):
        answer, parts = answers[samples.group_numbers[number]], samples.segments[number]
        contexts = [parts[0].token_ids[: parts[0].prompt_length]]
        contexts += [parts[s].token_ids[: parts[s].prompt_length + end] for s, end in turns[:-1]]
        scores = [
            trainer.logprobs([(*context, *answer)])[0][-len(answer) :] for context in contexts
        ]
        gains.append([math.exp(b.mean()) - math.exp(a.mean()) for a, b in pairwise(scores)])
        starts = [
            0 if n == 0 or turns[n - 1][0] != s else turns[n - 1][1]
            for n, (s, _) in enumerate(turns)
        ]
        lengths.append([end - start for (_, end), start in zip(turns, starts, strict=True)])
    expected = [
        each
        for group in (range(3), range(3, 6))
        for each in settings.of_group(
            [[*gains[n], 0.0] for n in group], [samples.rewards[n] for n in group]
        )
    ]
    by_hand = [np.repeat(values, sizes) for values, sizes in zip(expected, lengths, strict=True)]
    assert np.allclose(found_T, np.concatenate(by_hand), atol=1e-4)
    assert len(set(np.round(found_T[5:16], 6))) == 3
    trained = samples.with_advantages(found_T)
    train_step(trainer, trained, GRPO, SETTINGS, learning_rate=RATE)


def test_an_answer_is_needed_to_score_turns(samples: StepSamples, trainer: NumpyTrainer) -> None:
    with pytest.raises(ValueError, match="group 1 has no answer"):
        turn_advantages(trainer, samples, TurnAdvantages(), {0: [1]}, micro_batch_tokens=40)


class Short(NumpyTrainer):
    """Gives one number too few, as a service did that leaves out the first."""

    def logprobs(
        self, sequences: Sequence[Sequence[int]], *, is_before_backward: bool = False
    ) -> list[np.ndarray]:
        return [each[1:] for each in super().logprobs(sequences)]


class Deaf(NumpyTrainer):
    def logprobs(
        self, sequences: Sequence[Sequence[int]], *, is_before_backward: bool = False
    ) -> list[np.ndarray]:
        return [each * np.nan for each in super().logprobs(sequences)]


def test_a_trainer_that_breaks_its_rules_is_named(samples: StepSamples, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"shape \(7,\) for sequence 0, expected \(8,\)"):
        train_step(Short(BASE, tmp_path), samples, GRPO, SETTINGS, learning_rate=RATE)
    with pytest.raises(ValueError, match="the trainer must be mended"):
        train_step(Deaf(BASE, tmp_path), samples, GRPO, SETTINGS, learning_rate=RATE)


class Replaying(NumpyTrainer):
    """Notes the routes that it is told, and computes as ever."""

    replays_routes = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.told: list[Any] = []

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        is_before_backward: bool = False,
        routes: Sequence[Routes] | None = None,
    ) -> list[np.ndarray]:
        self.told.append(routes)
        return super().logprobs(sequences, is_before_backward=is_before_backward)

    def backward(
        self,
        sequences: Sequence[Sequence[int]],
        coefficients: Sequence[np.ndarray],
        *,
        routes: Sequence[Routes] | None = None,
    ) -> None:
        self.told.append(routes)
        super().backward(sequences, coefficients)


def routed(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The groups, each of their segments with routes of its own."""
    numbers = count()

    def with_routes(one: Segment) -> Segment:
        rows = len(one.prompt_token_ids) + len(one.token_ids_T) - 1
        return replace(one, routes=np.full((rows, 4), next(numbers), "<i2").tobytes())

    def of_sample(sample: Trajectory) -> Trajectory:
        return replace(sample, segments=tuple(map(with_routes, sample.segments)))

    return [
        replace(group, trajectories_G=tuple(map(of_sample, group.trajectories_G)))
        for group in groups
    ]


def test_routes_reach_a_trainer_that_replays_them(trainer: NumpyTrainer, tmp_path: Path) -> None:
    samples = StepSamples.of_batch(batch_of(routed(scored(trainer))))
    policy, reference = (Replaying(BASE, tmp_path) for _ in range(2))
    settings = StepSettings(micro_batch_tokens=40)
    loss = PolicyLoss(kl_beta=0.1)
    train_step(policy, samples, loss, settings, learning_rate=RATE, reference=reference)
    micro_batches = len(policy.told) // 2
    assert micro_batches > 1
    asked = [[int(one[0, 0]) for one in routes] for routes in policy.told]
    assert asked[::2] == asked[1::2]  # forward and backward
    assert [number for one in asked[::2] for number in one] == list(range(7))
    for routes in policy.told:
        assert all(one.shape[1] == 4 for one in routes)
    # Another model's router chooses by itself.
    assert {*reference.told} == {None}
    policy.told.clear()
    forward_backward_custom(policy, samples, minus_advantages, uses="numpy", micro_batch_tokens=40)
    assert [each is None for each in policy.told] == [False] * 2 * micro_batches


@pytest.mark.parametrize("call", ["logprobs", "backward"])
def test_an_error_names_the_micro_batch(
    trainer: NumpyTrainer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    samples = StepSamples.of_batch(batch_of(scored(trainer)))
    real, left = getattr(trainer, call), iter(range(1))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, call, failing)
    settings = StepSettings(micro_batch_tokens=40)
    with pytest.raises(MemoryError) as failed:
        train_step(trainer, samples, GRPO, settings, learning_rate=RATE)
    (note,) = failed.value.__notes__
    assert re.fullmatch(r"in micro-batch 2 \(\d samples?, \d+ tokens\)", note)


def test_a_sample_without_routes_is_named_before_anything_is_computed(
    trainer: NumpyTrainer, tmp_path: Path
) -> None:
    groups = routed(scored(trainer))
    first, *others = groups[1].trajectories_G
    cut = replace(others[0], segments=tuple(replace(s, routes=None) for s in others[0].segments))
    groups[1] = replace(groups[1], trajectories_G=(first, cut, *others[1:]))
    samples = StepSamples.of_batch(batch_of(groups))
    replaying, settings = Replaying(BASE, tmp_path), StepSettings(micro_batch_tokens=20)
    with pytest.raises(ValueError, match=r"problem 'b', sample 1: no routes to replay; set"):
        train_step(replaying, samples, GRPO, settings, learning_rate=RATE)
    assert replaying.told == []
    train_step(trainer, samples, GRPO, SETTINGS, learning_rate=RATE)  # it does not ask for them


def test_a_policy_learns(trainer: NumpyTrainer) -> None:
    """One token a sample, and one of 64 is right: the seam, the losses and AdamW find it."""
    random, share = np.random.default_rng(0), []
    settings = StepSettings(adam=AdamSettings(grad_clip_norm=1.0))
    for _ in range(40):
        every = trainer.logprobs([[1, 2, 3, token] for token in range(64)])
        table = np.array([each[-1] for each in every])
        drawn = random.choice(64, 32, p=np.exp(table) / np.exp(table).sum())
        drawn[0] = 7  # one is lucky: 64 are few
        samples = [
            trajectory(Segment((1, 2, 3), (int(token),), (float(table[token]),), (True,)), number=n)
            for n, token in enumerate(drawn)
        ]
        group = scored_group(*samples, rewards=[float(token == 7) for token in drawn])
        share.append(math.exp(table[7]))
        if share[-1] > 0.95:
            break
        train_step(
            trainer, StepSamples.of_batch(batch_of([group])), GRPO, settings, learning_rate=1e-2
        )
    assert share[0] < 0.2
    assert share[-1] > 0.9


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("examples.nowhere:open_trainer", {}, "cannot be imported: ModuleNotFoundError"),
        ("examples.numpy_trainer:nothing", {}, "cannot be imported: AttributeError"),
        ("examples.numpy_trainer:SUFFIX", {}, "cannot be imported"),
        ("examples.numpy_trainer:open_trainer", {"base": "x"}, "cannot be called with"),
        (
            "examples.numpy_trainer:open_trainer",
            {"base_model": "x", "states": "y", "temprature": 1},
            "argument 'temprature'; did you mean `temperature`",
        ),
        ("json:loads", {"s": "{"}, "raised JSONDecodeError"),
        ("json:loads", {"s": "{}"}, "returned dict without describe, logprobs"),
    ],
)
def test_a_trainer_that_cannot_be_used_is_refused(
    name: str, arguments: dict[str, Any], why: str
) -> None:
    with pytest.raises(TrainerError, match=why):
        load_trainer(TrainerFunction(name=name, arguments=arguments))


@pytest.mark.parametrize("anchor", ["trainer", "rollout"])
@pytest.mark.parametrize("mode", ["num_loss_tokens", "num_sequences", "none"])
def test_a_step_in_chunks_is_the_step_of_all_its_samples(
    tmp_path: Path, anchor: Any, mode: Any
) -> None:
    loss = PolicyLoss(kl_beta=0, anchor=anchor)
    settings = StepSettings(grad_accumulation_normalization=mode, micro_batch_tokens=1)
    weights, outcomes = [], []
    for is_cut in (False, True):
        trainer = NumpyTrainer(BASE, tmp_path / "states")
        groups = scored(trainer)
        chunks = [[one] for one in groups] if is_cut else [groups]
        step = AccumulatedStep(trainer, loss, settings)
        for chunk in chunks:
            step.add(StepSamples.of_batch(batch_of(chunk)), RATE)
        outcomes.append(step.finish(RATE))
        weights.append({name: each.copy() for name, each in trainer.model.weights.items()})
    whole, cut = outcomes
    # A sample a micro-batch, so that the sums are the same to the last bit.
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert cut.figures == pytest.approx(whole.figures, rel=1e-12)
    assert len(cut.logprobs) == len(whole.logprobs)
    for one, other in zip(cut.logprobs, whole.logprobs, strict=True):
        assert (one == other).all()
