"""The samples of one optimizer step as a trainer takes them: whole sequences, and what the loss
knows of their responses.

A sample has one segment or more; arrays `_T` have one value per response token, segments and
samples end to end, as hotload.training.loss_inputs has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hotload.dataset.trainer_batch import Batch
from hotload.errors import TrainerError
from hotload.rollout.routing import Routes
from hotload.trainers.trainer import Trainer, as_replayer
from hotload.training.loss_inputs import LossInputs, PerToken


@dataclass(frozen=True, slots=True, eq=False)
class TrainerSequence:
    """One segment: the ids of prompt and response, how many are prompt, and who it is."""

    token_ids: tuple[int, ...]
    prompt_length: int
    name: str
    """Problem, sample and segment, for an error."""
    routes: Routes | None = None

    @property
    def response_length(self) -> int:
        """Tokens of the response."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True, eq=False)
class StepSamples:
    """Samples of an optimizer step: their segments, and what is known of them beforehand."""

    segments: tuple[tuple[TrainerSequence, ...], ...]
    """Of each sample, in order."""
    inputs: LossInputs
    group_numbers: tuple[int, ...]
    """Of each sample: those of one problem have the same."""
    rewards: tuple[float, ...]
    """Of each sample."""

    @classmethod
    def of_batch(cls, batch: Batch) -> StepSamples:
        """Take the rows of a batch; neighbouring rows of one sample are its segments.

        Raises:
            ValueError: a row has no prompt or no response, or the batch no row.
        """
        if not len(batch):
            raise ValueError("the batch has no row: the trainer must skip the step")
        segments: list[list[TrainerSequence]] = []
        firsts: list[int] = []
        before: tuple[int, int] | None = None
        for row in range(len(batch)):
            prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
            response = batch.completion_ids[row][batch.completion_mask[row]].tolist()
            if not prompt or not response:
                raise ValueError(f"row {row} has no prompt or no response")
            sample = int(batch.group_numbers[row]), int(batch.sample_numbers[row])
            if sample != before:
                segments.append([])
                firsts.append(row)
            before = sample
            name = f"problem {batch.problem_ids[row]!r}, sample {sample[1]}"
            if number := int(batch.segment_numbers[row]):
                name += f", segment {number}"
            ids = (*prompt, *response)
            segments[-1].append(TrainerSequence(ids, len(prompt), name, batch.routes[row]))
        taken = batch.completion_mask
        inputs = LossInputs.of(
            lengths=[sum(one.response_length for one in sample) for sample in segments],
            loss_mask_T=batch.loss_mask[taken],
            sampling_logprobs_T=batch.sampling_logprobs[taken],
            advantages=batch.advantages[firsts],
        )
        return cls(
            tuple(map(tuple, segments)),
            inputs,
            tuple(batch.group_numbers[firsts].tolist()),
            tuple(batch.rewards[firsts].tolist()),
        )

    def with_advantages(self, advantages_T: ArrayLike) -> StepSamples:
        """Give every token an advantage of its own: of its turn (hotload.training.turn_advantages).

        Raises:
            ValueError: not one finite number per token.
        """
        given = self.inputs
        checked = LossInputs.of(
            lengths=given.lengths,
            loss_mask_T=given.loss_mask_T,
            sampling_logprobs_T=given.sampling_logprobs_T,
            advantages_T=advantages_T,
        )
        return replace(self, inputs=replace(given, advantages_T=checked.advantages_T))

    def __len__(self) -> int:
        """Samples."""
        return len(self.segments)

    def take(self, numbers: Sequence[int]) -> StepSamples:
        """Take the samples of these numbers, in this order."""
        return StepSamples(
            tuple(self.segments[number] for number in numbers),
            self.inputs.take(numbers),
            tuple(self.group_numbers[number] for number in numbers),
            tuple(self.rewards[number] for number in numbers),
        )

    @property
    def sequences(self) -> list[TrainerSequence]:
        """The segments of all samples, end to end."""
        return [one for sample in self.segments for one in sample]

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        """What a trainer is asked about."""
        return [one.token_ids for one in self.sequences]

    @property
    def routes(self) -> list[Routes]:
        """The routes of all segments, end to end.

        Raises:
            ValueError: one has none.
        """
        found = []
        for one in self.sequences:
            if one.routes is None:
                raise ValueError(
                    f"{one.name}: no routes to replay; set sampling.include_routing_matrix, with "
                    "a service that tells them, or leave the trainer's router_replay out"
                )
            found.append(one.routes)
        return found

    def micro_batches(self, token_limit: int) -> Iterator[tuple[int, ...]]:
        """Cut the samples, in order, into runs that have at most so many tokens once padded to
        their longest sequence; a sample that is longer is one by itself.
        """
        yield from micro_batches_of(
            [[len(one.token_ids) for one in sample] for sample in self.segments], token_limit
        )

    def responses(self, logprobs: Sequence[PerToken]) -> PerToken:
        """Take the responses out of what a trainer gave for `token_ids`, end to end, [T].

        Raises:
            ValueError: it gave another number of log-probabilities.
        """
        parts: list[PerToken] = []
        if len(logprobs) != len(self.sequences):
            found = f"gave log-probabilities of {len(logprobs)} sequences"
            raise ValueError(f"{found}, expected {len(self.sequences)}")
        for number, (one, values) in enumerate(zip(self.sequences, logprobs, strict=True)):
            given = np.asarray(values, dtype=np.float64)
            if given.shape != (len(one.token_ids) - 1,):
                found = f"gave log-probabilities of shape {given.shape} for sequence {number}"
                raise ValueError(f"{found}, expected ({len(one.token_ids) - 1},)")
            parts.append(given[one.prompt_length - 1 :])
        return np.concatenate(parts)

    def by_prediction(self, values_T: PerToken) -> list[PerToken]:
        """Place the values of all responses at the predictions of their sequences, [N−1] each;
        zeros where the prompt is predicted.
        """
        return [
            np.concatenate([np.zeros(one.prompt_length - 1), values])
            for one, values in zip(self.sequences, self.by_segment(values_T), strict=True)
        ]

    def by_segment(self, values_T: NDArray[np.float64]) -> list[PerToken]:
        """Cut values of all response tokens into one array per segment."""
        ends = np.cumsum([one.response_length for one in self.sequences])
        return np.split(values_T, ends[:-1])


def micro_batches_of(
    lengths: Sequence[Sequence[int]], token_limit: int
) -> Iterator[tuple[int, ...]]:
    """Cut samples, of so many sequences of these lengths, as `StepSamples.micro_batches` does."""
    taken: list[int] = []
    rows = longest = 0
    for number, of_sample in enumerate(lengths):
        if taken and (rows + len(of_sample)) * max(longest, *of_sample) > token_limit:
            yield tuple(taken)
            taken, rows, longest = [], 0, 0
        taken.append(number)
        rows, longest = rows + len(of_sample), max(longest, *of_sample)
    if taken:
        yield tuple(taken)


def ask_responses(
    trainer: Trainer,
    samples: StepSamples,
    *,
    is_before_backward: bool = False,
    is_reference: bool = False,
) -> PerToken:
    """Ask a trainer for the log-probabilities of all response tokens, [T].

    Args:
        is_reference: another model than the one that is trained: its router chooses by itself.

    Raises:
        TrainerError: it gave another number of them.
        ValueError: the trainer replays routes, and a sample has none.
    """
    ids, replayer = samples.token_ids, None if is_reference else as_replayer(trainer)
    if replayer is None:
        given = trainer.logprobs(ids, is_before_backward=is_before_backward)
    else:
        given = replayer.logprobs(ids, is_before_backward=is_before_backward, routes=samples.routes)
    try:
        return samples.responses(given)
    except ValueError as error:
        raise TrainerError(trainer.describe().model, str(error)) from None


def add_gradient(trainer: Trainer, samples: StepSamples, coefficients_T: PerToken) -> None:
    """Hand a trainer the coefficients of all response tokens, [T]."""
    coefficients, replayer = samples.by_prediction(coefficients_T), as_replayer(trainer)
    if replayer is None:
        trainer.backward(samples.token_ids, coefficients)
    else:
        replayer.backward(samples.token_ids, coefficients, routes=samples.routes)
