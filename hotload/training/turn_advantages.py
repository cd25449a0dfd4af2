"""Advantages by turn: what each turn adds to the answer's probability (IGPO, arXiv 2510.14967).

The scores are of the ground-truth answer, so they leak it into training by design: only where the
answer is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, model_validator

from hotload.training.loss_inputs import PerToken
from hotload.training.settings import TrainingPart

EPSILON = 1e-6


class TurnAdvantages(TrainingPart):
    """How information gains and outcomes become one advantage per turn."""

    gain: Literal["probability", "mean_logprob"] = "probability"
    """Gain of a turn: difference of the answer's probability per token, as in the paper, or of its
    mean log-probability, as the vendor has it."""
    gamma: float = Field(0.95, ge=0, le=1)
    """What a turn is credited of the advantage of the turn after it."""
    gain_weight: float = Field(1.0, ge=0, le=1e3)
    """Weight of the normalised gain beside the normalised outcome; 0 is the outcome alone."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.gain_weight == 0 and "gain" in self.model_fields_set:
            raise ValueError("gain has no effect with gain_weight 0: remove one of them")
        return self

    def gains(self, answer_logprobs: Sequence[ArrayLike]) -> PerToken:
        """Compute the information gain of each turn of a sample, [turns]; the last turn's is 0,
        since it gets the outcome.

        Args:
            answer_logprobs: log-probabilities of the answer's tokens, in nats: after the prompt,
                then after each turn but the last; as many arrays as turns.

        Raises:
            ValueError: there is none, they differ in length, or one is empty or not finite.
        """
        scores = [np.asarray(each, dtype=np.float64) for each in answer_logprobs]
        if not scores or not scores[0].size or scores[0].ndim != 1:
            raise ValueError("answer_logprobs: expected the answer's tokens after the prompt")
        for number, score in enumerate(scores):
            if score.shape != scores[0].shape or not np.isfinite(score).all():
                raise ValueError(
                    f"answer_logprobs, context {number}: expected {scores[0].size} finite numbers, "
                    "one per token of the answer: whoever scored it must be mended"
                )
        means = np.array([score.mean() for score in scores])
        values = np.exp(means) if self.gain == "probability" else means
        return np.append(np.diff(values), 0.0)

    def of_group(
        self, gains_G: Sequence[ArrayLike], rewards_G: Sequence[float | None]
    ) -> tuple[PerToken | None, ...]:
        """Compute an advantage per turn for every sample of a group.

        Gains and outcomes are each centred and divided by the standard deviation over all turns of
        the group; a turn has their sum and γ times the advantage of the turn after it. Samples
        without a reward (`None`) count nowhere and get `None`.

        Args:
            gains_G: per sample one gain per turn, at least one turn.
            rewards_G: the outcome of each sample: its last turn's.

        Raises:
            ValueError: a gain or reward is missing or not finite.
        """
        if len(gains_G) != len(rewards_G):
            raise ValueError(f"found gains of {len(gains_G)} samples, {len(rewards_G)} rewards")
        kept = [
            (np.asarray(gains, dtype=np.float64), reward)
            for gains, reward in zip(gains_G, rewards_G, strict=True)
            if reward is not None
        ]
        for gains, reward in kept:
            is_finite = np.isfinite(gains).all() and np.isfinite(reward)
            if gains.ndim != 1 or not gains.size or not is_finite:
                raise ValueError(
                    "gains and rewards: expected finite numbers, at least one turn per sample: the "
                    "reward must be mended"
                )
        if not kept:
            return (None,) * len(rewards_G)
        outcomes = np.concatenate([np.append(np.zeros(g.size - 1), r) for g, r in kept])
        every_gain = np.concatenate([gains for gains, _ in kept])
        values = self.gain_weight * _normalised(every_gain) + _normalised(outcomes)
        bounds = np.cumsum([gains.size for gains, _ in kept])[:-1]
        found = iter([self._discounted(each) for each in np.split(values, bounds)])
        return tuple(None if reward is None else next(found) for reward in rewards_G)

    def _discounted(self, values: PerToken) -> PerToken:
        advantages = values.copy()
        for turn in range(values.size - 2, -1, -1):
            advantages[turn] += self.gamma * advantages[turn + 1]
        return advantages


def _normalised(values: PerToken) -> PerToken:
    std = values.std()
    return (values - values.mean()) / (std + EPSILON) if std >= EPSILON else np.zeros(values.size)


def spread_over_tokens(turn_advantages: ArrayLike, turn_lengths: ArrayLike) -> PerToken:
    """Give every token its turn's advantage, [T].

    Args:
        turn_lengths: tokens of each turn, with what tools and users said before it.

    Raises:
        ValueError: they are not one per turn.
    """
    advantages, lengths = np.asarray(turn_advantages, np.float64), np.asarray(turn_lengths)
    if advantages.shape != lengths.shape or (lengths.size and lengths.min() < 0):
        raise ValueError(f"found {advantages.size} advantages and {lengths.size} turn lengths")
    return np.repeat(advantages, lengths.astype(np.int64))
