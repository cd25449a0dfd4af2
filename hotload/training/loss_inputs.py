"""What is known of the samples of an optimizer step before the policy is asked again.

Samples lie end to end: an array `_T` has one value per response token of all samples, `lengths` one
count per sample. A sample of several segments is one sample here, its segments end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hotload.rollout.trajectory import LOGPROB_RANGE

PerToken = NDArray[np.float64]
ADVANTAGE_LIMIT = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """Samples with their advantages and log-probabilities; made by `LossInputs.of`.

    Where the loss mask is false every other array holds 0, so what stood there counts nowhere.
    """

    lengths: NDArray[np.int64]
    """Tokens of each sample, [samples]; 0 is allowed."""
    loss_mask_T: NDArray[np.bool_]
    advantages_T: PerToken
    sampling_logprobs_T: PerToken
    """Under the distribution really sampled, in nats."""
    anchor_logprobs_T: PerToken | None
    """The trainer's before the step: the ratio of the losses is taken against them."""
    reference_logprobs_T: PerToken | None
    """Under the frozen weights a KL term holds the policy to."""

    @classmethod
    def of(
        cls,
        *,
        lengths: ArrayLike,
        loss_mask_T: ArrayLike,
        sampling_logprobs_T: ArrayLike,
        advantages: ArrayLike | None = None,
        advantages_T: ArrayLike | None = None,
        anchor_logprobs_T: ArrayLike | None = None,
        reference_logprobs_T: ArrayLike | None = None,
    ) -> LossInputs:
        """Check the arrays and set what is masked to 0.

        Args:
            advantages: one per sample; or give `advantages_T`, one per token.

        Raises:
            ValueError: a shape does not fit, or a token in the loss has no usable number; says
                which, and who must act.
        """
        sizes = _lengths(lengths)
        count = int(sizes.sum())
        mask = np.asarray(loss_mask_T)
        if mask.dtype != np.bool_ and mask.size and not np.isin(mask, (0, 1)).all():
            raise ValueError("loss_mask_T: expected true and false (or 1 and 0) alone")
        mask = mask.astype(np.bool_)
        if mask.shape != (count,):
            raise ValueError(f"loss_mask_T: found shape {mask.shape}, expected ({count},)")
        if (advantages is None) == (advantages_T is None):
            raise ValueError("give either advantages, per sample, or advantages_T, per token")
        if advantages is not None:
            per_sample = np.asarray(advantages, dtype=np.float64)
            if per_sample.shape != sizes.shape:
                found = f"found shape {per_sample.shape}, expected {sizes.shape}"
                raise ValueError(f"advantages: {found}, one per sample")
            advantages_T = np.repeat(per_sample, sizes)
        return cls(
            lengths=sizes,
            loss_mask_T=mask,
            advantages_T=_checked(
                advantages_T, mask, "advantages", ADVANTAGE_LIMIT, "the reward or its scaling"
            ),
            sampling_logprobs_T=check_logprobs(
                sampling_logprobs_T, mask, "sampling_logprobs_T", "the sampler"
            ),
            anchor_logprobs_T=None
            if anchor_logprobs_T is None
            else check_logprobs(anchor_logprobs_T, mask, "anchor_logprobs_T", "the trainer"),
            reference_logprobs_T=None
            if reference_logprobs_T is None
            else check_logprobs(
                reference_logprobs_T, mask, "reference_logprobs_T", "the reference model"
            ),
        )

    def __len__(self) -> int:
        """Samples."""
        return self.lengths.size

    @property
    def token_count(self) -> int:
        """Tokens in the loss."""
        return int(np.count_nonzero(self.loss_mask_T))

    @property
    def trained_sample_count(self) -> int:
        """Samples with a token in the loss."""
        return int(np.count_nonzero(sums_of_samples(self.loss_mask_T, self.lengths)))

    def take(self, numbers: Sequence[int]) -> LossInputs:
        """Take the samples of these numbers, in this order: a micro-batch."""
        places = places_of(self.lengths, numbers)
        anchor_T, reference_T = self.anchor_logprobs_T, self.reference_logprobs_T
        return LossInputs(
            lengths=self.lengths[np.asarray(numbers, dtype=np.int64)],
            loss_mask_T=self.loss_mask_T[places],
            advantages_T=self.advantages_T[places],
            sampling_logprobs_T=self.sampling_logprobs_T[places],
            anchor_logprobs_T=None if anchor_T is None else anchor_T[places],
            reference_logprobs_T=None if reference_T is None else reference_T[places],
        )


def check_logprobs(values: ArrayLike, mask: NDArray[np.bool_], name: str, who: str) -> PerToken:
    """Return log-probabilities as numbers, 0 where the mask is false.

    Args:
        name: what they are called, `who`: who gave them; for the error.

    Raises:
        ValueError: not one per token, or within the mask not finite, beyond ± 10⁶ or above 0.
    """
    lowest, highest = LOGPROB_RANGE
    checked = _checked(values, mask, name, -lowest, who)
    if checked.size and checked.max() > highest:
        place = int(np.argmax(checked))
        raise ValueError(
            f"{name}: found {checked[place]:g} at token {place}, expected a log-probability, at "
            f"most 0: {who} must give log-probabilities in nats, not their negative"
        )
    return checked


def _checked(
    given: ArrayLike | None, mask: NDArray[np.bool_], name: str, limit: float, who: str
) -> PerToken:
    values = np.asarray(given, dtype=np.float64)
    if values.shape != mask.shape:
        raise ValueError(f"{name}: found shape {values.shape}, expected {mask.shape}")
    kept = np.where(mask, values, 0.0)
    if kept.size and not (kept.max() <= limit and kept.min() >= -limit):
        place = int(np.argmax(~(np.abs(kept) <= limit)))
        raise ValueError(
            f"{name}: found {kept[place]:g} at token {place}, which is in the loss, expected a "
            f"finite number within ± {limit:g}: {who} must be mended"
        )
    return kept


def _lengths(lengths: ArrayLike) -> NDArray[np.int64]:
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or (sizes.size and sizes.dtype.kind not in "iu"):
        raise ValueError("lengths: expected one whole number per sample")
    if sizes.size and sizes.min() < 0:
        raise ValueError(f"lengths: found {sizes.min()}, expected 0 or more")
    return sizes.astype(np.int64)


def places_of(lengths: NDArray[np.int64], numbers: Sequence[int]) -> NDArray[np.int64]:
    """Find the places of the tokens of these samples, sample after sample."""
    chosen = np.asarray(numbers, dtype=np.int64)
    sizes = lengths[chosen]
    starts = (np.cumsum(lengths) - lengths)[chosen]
    ahead = np.cumsum(sizes) - sizes
    return np.repeat(starts - ahead, sizes) + np.arange(int(sizes.sum()))


def sums_of_samples(values_T: NDArray[np.generic], lengths: NDArray[np.int64]) -> PerToken:
    """Sum the values of each sample, [samples]; 0 for one without tokens."""
    sums = np.zeros(lengths.size)
    has_tokens = lengths > 0
    if has_tokens.any():
        starts = (np.cumsum(lengths) - lengths)[has_tokens]
        sums[has_tokens] = np.add.reduceat(values_T, starts, dtype=np.float64)
    return sums


def means_of_samples(
    values_T: PerToken, loss_mask_T: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> PerToken:
    """Average each sample's values over its tokens in the loss, [samples]; 0 where it has none.

    Values are 0 where the mask is false.
    """
    counts = sums_of_samples(loss_mask_T, lengths)
    return sums_of_samples(values_T, lengths) / np.maximum(counts, 1)
