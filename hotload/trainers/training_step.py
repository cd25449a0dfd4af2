"""One step of training over any trainer: log-probabilities → coefficients → gradients → weights.

The forward that the loss needs is the anchor's, too, where one optimizer step is made of the
samples: then each micro-batch is asked once, and the trainer may keep what its backward needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from hotload.dataset.logprob_drift import measure_drift
from hotload.quantities import plural
from hotload.trainers.step_samples import StepSamples, add_gradient, ask_responses
from hotload.trainers.trainer import Trainer, as_replayer
from hotload.training.custom_loss import CustomLossValue, custom_coefficients
from hotload.training.divisor import GradientDivisor, gradient_divisor
from hotload.training.loss_inputs import PerToken, check_logprobs, places_of
from hotload.training.policy_loss import LossFigures, PolicyLoss, PreparedLoss
from hotload.training.schedule import AdamSettings
from hotload.training.settings import TrainingPart


class StepSettings(TrainingPart):
    """How the gradient of a step is computed and applied."""

    adam: AdamSettings = AdamSettings()
    """AdamW's settings."""
    grad_accumulation_normalization: GradientDivisor = "num_loss_tokens"
    """What the gradient is divided by, once, before it is clipped: tokens in the loss, samples with
    such a token, or nothing."""
    ppo_n_minibatches: int = Field(1, ge=1, le=1024)
    """Optimizer steps that the samples of one step are cut into, as many as there are samples at
    most; above 1 the ratio of the later ones leaves 1, and the loss's clipping acts."""
    micro_batch_tokens: int = Field(16_384, ge=1, le=10**8)
    """Tokens, padding included, that the trainer is asked about at once: bounds its memory. Another
    number gives other bits."""


@dataclass(frozen=True, slots=True, eq=False)
class StepOutcome:
    """What a step of training did."""

    figures: Mapping[str, float]
    """By the names of docs/training.md."""
    logprobs: tuple[PerToken, ...]
    """The trainer's, before the weights changed, one array per segment and so per row of the batch:
    for `Batch.by_frame_row`."""


def train_step(
    trainer: Trainer,
    samples: StepSamples,
    loss: PolicyLoss,
    settings: StepSettings,
    *,
    learning_rate: float,
    reference: Trainer | None = None,
) -> StepOutcome:
    """Train on the samples of one step.

    Args:
        reference: frozen weights, where the loss has a KL.

    Raises:
        TrainerError: the trainer broke its rules, or its gradient is not finite.
        ValueError: no token is in the loss; a log-probability is unusable; there is a reference
            without KL, or a KL without one; the trainer replays routes, and a sample has none.
            After an error a gradient may be left over: load a state.
    """
    step = AccumulatedStep(trainer, loss, settings, reference=reference)
    step.add(samples, learning_rate)
    return step.finish(learning_rate)


@dataclass(frozen=True, slots=True, eq=False)
class _PreparedChunk:
    """Samples of a step, and what is known of them before their backward."""

    samples: StepSamples
    before_T: PerToken | None
    """The trainer's log-probabilities before any weight changes, where they were asked for
    beforehand."""
    whole: PreparedLoss | None
    """The loss of all of them, where it does not wait for the forward of each micro-batch."""


class AccumulatedStep:
    """One optimizer step whose samples come in chunks: each adds its gradient when it is there.

    Calls of a trainer, so on its thread. After an error a gradient may be left over: load a state.

    Args:
        reference: frozen weights, where the loss has a KL.

    Raises:
        ValueError: there is a reference without KL, or a KL without one.
    """

    def __init__(
        self,
        trainer: Trainer,
        loss: PolicyLoss,
        settings: StepSettings,
        *,
        reference: Trainer | None = None,
    ) -> None:
        if loss.needs_reference != (reference is not None):
            has, where = ("a reference", "no KL") if reference else ("no reference", "a KL")
            raise ValueError(f"kl_beta is {loss.kl_beta:g}: found {has} where there is {where}")
        self._trainer, self._loss, self._settings = trainer, loss, settings
        self._reference = reference
        self._tally = _Tally()
        self._divisor = 0.0

    def add(self, samples: StepSamples, learning_rate: float) -> None:
        """Add the gradient of a chunk; of several minibatches, which have to be one chunk, the last
        one's, the optimizer steps of the others being made.

        Raises:
            TrainerError, ValueError: as `train_step`.
        """
        count = min(self._settings.ppo_n_minibatches, len(samples))
        chunk = self._prepare(samples)
        *others, last = np.array_split(np.arange(len(samples)), count)
        for numbers in others:
            self._backward(chunk, numbers.tolist())
            self._apply(learning_rate)
        self._backward(chunk, last.tolist())

    def finish(self, learning_rate: float) -> StepOutcome:
        """Make the optimizer step, and tell what it did.

        Raises:
            TrainerError: the gradient is not finite.
        """
        self._apply(learning_rate)
        return self._tally.outcome(learning_rate)

    def _prepare(self, samples: StepSamples) -> _PreparedChunk:
        loss, limit = self._loss, self._settings.micro_batch_tokens
        if as_replayer(self._trainer) is not None:
            _ = samples.routes  # one without is named before anything is computed
        if self._reference is not None:
            found_T = ask_in_micro_batches(self._reference, samples, limit, is_reference=True)
            samples = _with(samples, reference_logprobs_T=found_T)
        before_T: PerToken | None = None
        is_cut = self._settings.ppo_n_minibatches > 1
        if is_cut or (loss.needs_anchor and loss.kl == "reward"):
            before_T = ask_in_micro_batches(self._trainer, samples, limit)
            if loss.needs_anchor:
                samples = _with(samples, anchor_logprobs_T=before_T)
        is_known = before_T is not None or not loss.needs_anchor
        self._tally.begin(samples, before_T)
        return _PreparedChunk(samples, before_T, loss.prepare(samples.inputs) if is_known else None)

    def _backward(self, chunk: _PreparedChunk, numbers: Sequence[int]) -> None:
        samples = chunk.samples
        chosen = samples.take(numbers)
        mode = self._settings.grad_accumulation_normalization
        divisor = gradient_divisor(mode, chosen.inputs)
        self._divisor = divisor if mode == "none" else self._divisor + divisor
        limit = self._settings.micro_batch_tokens
        for number, within in enumerate(chosen.micro_batches(limit), start=1):
            places = [numbers[place] for place in within]
            micro = samples.take(places)
            with _naming(number, micro):
                self._backward_one(chunk, places, micro)

    def _backward_one(
        self, chunk: _PreparedChunk, places: Sequence[int], micro: StepSamples
    ) -> None:
        samples, trainer, whole = chunk.samples, self._trainer, chunk.whole
        if chunk.before_T is not None and not self._tally.gradient_norms:
            # No weight has changed.
            policy_T = chunk.before_T[places_of(samples.inputs.lengths, places)]
        else:
            policy_T = ask_responses(trainer, micro, is_before_backward=True)
        if whole is None:
            prepared = self._loss.prepare(_with(micro, anchor_logprobs_T=policy_T).inputs)
        else:
            prepared = whole.take(places)
        value = prepared.coefficients(policy_T)
        add_gradient(trainer, micro, value.coefficients_T)
        self._tally.add(places, policy_T, prepared, value.figures)

    def _apply(self, learning_rate: float) -> None:
        divisor, self._divisor = self._divisor, 0.0
        adam = self._settings.adam
        done = self._trainer.step(adam, learning_rate=learning_rate, divisor=divisor)
        self._tally.close(divisor, done.gradient_norm)


def forward_backward_custom(
    trainer: Trainer,
    samples: StepSamples,
    function: Callable[[Any, Any], Any],
    *,
    uses: Literal["numpy", "torch"],
    micro_batch_tokens: int,
    reference: Trainer | None = None,
) -> CustomLossValue:
    """Add the gradient of a user's own loss, as hotload.training.custom_loss takes it: a forward,
    the loss's own gradient, a backward with it.

    The function sees all samples at once, the policy's log-probabilities as their anchor.

    Raises:
        TrainerError, ValueError: as `train_step`, and as `custom_coefficients`.
    """
    policy_T = ask_in_micro_batches(trainer, samples, micro_batch_tokens)
    known: dict[str, PerToken] = {"anchor_logprobs_T": policy_T}
    if reference is not None:
        known["reference_logprobs_T"] = ask_in_micro_batches(
            reference, samples, micro_batch_tokens, is_reference=True
        )
    value = custom_coefficients(function, _with(samples, **known).inputs, policy_T, uses=uses)
    for numbers in samples.micro_batches(micro_batch_tokens):
        micro = samples.take(numbers)
        places = places_of(samples.inputs.lengths, numbers)
        add_gradient(trainer, micro, value.coefficients_T[places])
    return value


def ask_in_micro_batches(
    trainer: Trainer, samples: StepSamples, token_limit: int, *, is_reference: bool = False
) -> PerToken:
    """Ask for the log-probabilities of all response tokens, [T], so many tokens at once: before a
    step the anchor's, of a trainer with the start weights the reference's.

    Raises:
        TrainerError: the trainer gave another number of them.
    """
    parts = []
    for number, numbers in enumerate(samples.micro_batches(token_limit), start=1):
        micro = samples.take(numbers)
        with _naming(number, micro):
            parts.append(ask_responses(trainer, micro, is_reference=is_reference))
    return np.concatenate(parts)


@contextmanager
def _naming(number: int, micro: StepSamples) -> Iterator[None]:
    """Add to an error in which micro-batch it was, as a note."""
    try:
        yield
    except Exception as error:
        tokens = sum(len(one.token_ids) for one in micro.sequences)
        sizes = f"{plural(len(micro), 'sample')}, {plural(tokens, 'token')}"
        error.add_note(f"in micro-batch {number} ({sizes})")
        raise


def _with(samples: StepSamples, **logprobs: PerToken) -> StepSamples:
    mask_T = samples.inputs.loss_mask_T
    checked: dict[str, Any] = {
        name: check_logprobs(values, mask_T, name, "the trainer")
        for name, values in logprobs.items()
    }
    return replace(samples, inputs=replace(samples.inputs, **checked))


class _Tally:
    """Sums over the micro-batches of a step."""

    def __init__(self) -> None:
        self.gradient_norms: list[float | None] = []
        self._chunks: list[_ChunkLogprobs] = []
        self._loss = LossFigures()
        self._correction = self._cut = self._share = 0.0
        self._open = LossFigures()

    def begin(self, samples: StepSamples, before_T: PerToken | None) -> None:
        count = samples.inputs.loss_mask_T.size
        self._chunks.append(_ChunkLogprobs(samples, before_T, np.zeros(count), np.zeros(count)))

    def add(
        self,
        numbers: Sequence[int],
        policy_T: PerToken,
        prepared: PreparedLoss,
        figures: LossFigures,
    ) -> None:
        """Note a micro-batch of the chunk that was begun last."""
        chunk = self._chunks[-1]
        places = places_of(chunk.samples.inputs.lengths, numbers)
        chunk.policy_T[places] = policy_T
        assert prepared.inputs.anchor_logprobs_T is not None
        chunk.anchor_T[places] = prepared.inputs.anchor_logprobs_T
        self._open += figures
        self._correction += prepared.mean_correction * figures.token_count
        self._cut += prepared.cut_share * figures.token_count

    def close(self, divisor: float, gradient_norm: float | None) -> None:
        self._share += self._open.loss / divisor
        self._loss += self._open
        self._open = LossFigures()
        self.gradient_norms.append(gradient_norm)

    def outcome(self, learning_rate: float) -> StepOutcome:
        inputs, loss = [chunk.samples.inputs for chunk in self._chunks], self._loss
        mask_T = np.concatenate([one.loss_mask_T for one in inputs])
        policy_T = np.concatenate([chunk.policy_T for chunk in self._chunks])
        anchor_T = np.concatenate([chunk.anchor_T for chunk in self._chunks])
        first_T = np.concatenate([chunk.first_T for chunk in self._chunks])
        sampling_T = np.concatenate([one.sampling_logprobs_T for one in inputs])
        drift = measure_drift(first_T, sampling_T, mask_T)
        assert drift is not None  # a step without a token in the loss has no divisor
        steps = len(self.gradient_norms)
        has_reference = inputs[0].reference_logprobs_T is not None
        figures: dict[str, float | None] = {
            "train/loss": self._share / steps,
            "train/lr": learning_rate,
            "train/grad_norm": _mean(self.gradient_norms),
            "train/ref_kl": loss.mean_reference_kl if has_reference else None,
            "train/ppo_kl": float((anchor_T - policy_T).mean(where=mask_T)),
            "train/clip_frac": loss.clipped_share,
            "train/ratio_mean": loss.mean_ratio,
            "train/active_tokens": loss.token_count,
            "train/mask_ratio": loss.token_count / mask_T.size,
            "train/inference_k1": drift.k1,
            "train/inference_k3": drift.k3,
            "train/entropy": -float(first_T.mean(where=mask_T)),
            "tis/weight_mean": self._correction / loss.token_count,
            "tis/clip_frac": self._cut / loss.token_count,
        }
        return StepOutcome(
            {name: float(value) for name, value in figures.items() if value is not None},
            tuple(row for chunk in self._chunks for row in chunk.samples.by_segment(chunk.first_T)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _ChunkLogprobs:
    """What was asked about the tokens of a chunk."""

    samples: StepSamples
    before_T: PerToken | None
    policy_T: PerToken
    anchor_T: PerToken

    @property
    def first_T(self) -> PerToken:
        """The trainer's before any weight changed."""
        return self.policy_T if self.before_T is None else self.before_T


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else None
