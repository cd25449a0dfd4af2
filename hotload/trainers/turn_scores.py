"""Advantages by turn over any trainer: what each turn adds to the answer's probability (IGPO)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from hotload.errors import TrainerError
from hotload.trainers.step_samples import StepSamples, micro_batches_of
from hotload.trainers.trainer import Trainer
from hotload.training.loss_inputs import PerToken
from hotload.training.turn_advantages import TurnAdvantages, spread_over_tokens


def turn_advantages(
    trainer: Trainer,
    samples: StepSamples,
    settings: TurnAdvantages,
    answers: Mapping[int, Sequence[int]],
    *,
    micro_batch_tokens: int,
) -> PerToken:
    """Compute an advantage per response token, [T], for `StepSamples.with_advantages`.

    A turn ends where tokens in the loss are followed by others, and with its segment. The answer is
    scored after the first prompt and after each turn but the last: all whole groups of the step
    must be among the samples.

    Args:
        answers: token ids of the true answer, by group number.

    Raises:
        ValueError: a group has no answer.
        TrainerError: the trainer gave another number of log-probabilities.
    """
    for group in dict.fromkeys(samples.group_numbers):
        if not answers.get(group):
            raise ValueError(f"group {group} has no answer to score: its problem needs one")
    turns = [tuple(_turns(samples.take([number]))) for number in range(len(samples))]
    contexts = [
        [
            segments[0].token_ids[: segments[0].prompt_length],
            *(context for context, _ in found[:-1]),
        ]
        for segments, found in zip(samples.segments, turns, strict=True)
    ]
    asked = [
        (context, tuple(answers[group]))
        for group, each in zip(samples.group_numbers, contexts, strict=True)
        for context in each
    ]
    scores = iter(_score(trainer, asked, micro_batch_tokens))
    gains = [settings.gains([next(scores) for _ in each]) for each in contexts]
    spread: list[PerToken] = [np.zeros(0)] * len(samples)
    for group in dict.fromkeys(samples.group_numbers):
        numbers = [n for n, each in enumerate(samples.group_numbers) if each == group]
        found = settings.of_group(
            [gains[n] for n in numbers], [samples.rewards[n] for n in numbers]
        )
        for number, values in zip(numbers, found, strict=True):
            assert values is not None  # every sample has a reward
            spread[number] = spread_over_tokens(values, [size for _, size in turns[number]])
    return np.concatenate(spread)


def _turns(sample: StepSamples) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each turn of one sample: all tokens up to its end, and how many response tokens it has, with
    what tools and users said before it."""
    masks = np.split(
        sample.inputs.loss_mask_T, np.cumsum([one.response_length for one in sample.sequences])[:-1]
    )
    for one, mask_T in zip(sample.sequences, masks, strict=True):
        ends = np.flatnonzero(mask_T[:-1] & ~mask_T[1:]) + 1
        bounds = [0, *ends.tolist(), mask_T.size]
        if len(bounds) > 2 and not mask_T[bounds[-2] :].any():
            bounds.pop(-2)  # nothing sampled follows: it belongs to the turn before
        for start, end in pairwise(bounds):
            yield one.token_ids[: one.prompt_length + end], end - start


def _score(
    trainer: Trainer,
    asked: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    token_limit: int,
) -> Iterator[PerToken]:
    """Log-probabilities of each answer after its context, so many tokens at once."""
    lengths = [[len(context) + len(answer)] for context, answer in asked]
    for numbers in micro_batches_of(lengths, token_limit):
        given = trainer.logprobs([asked[n][0] + asked[n][1] for n in numbers])
        for number, values in zip(numbers, given, strict=True):
            expected = (lengths[number][0] - 1,)
            if np.shape(values) != expected:
                found = f"gave log-probabilities of shape {np.shape(values)}, expected {expected}"
                raise TrainerError(trainer.describe().model, found)
            yield np.asarray(values, dtype=np.float64)[-len(asked[number][1]) :]
