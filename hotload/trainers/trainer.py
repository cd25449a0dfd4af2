"""What a trainer is: weights that give log-probabilities, take gradients, and can be put away.

Everything that crosses this seam is a value: token ids, numbers per prediction, names of files. A
sequence of N tokens has N − 1 predictions, the first of token 1.
Losses, corrections, references and micro-batches are made over it, once for all trainers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from pydantic import JsonValue

from hotload.rollout.routing import Routes
from hotload.training.loss_inputs import PerToken
from hotload.training.schedule import AdamSettings
from hotload.training.settings import StateRef


@dataclass(frozen=True, slots=True)
class TrainerFacts:
    """What a trainer says of itself; a step record keeps it."""

    model: str
    """The base model, as a run names it."""
    base_sha256: str | None
    """Of its weights (hotload.trainers.base_digest); None where a service keeps them."""
    parameter_count: int | None
    """Parameters that a step changes; None where a service does not tell."""
    lora_rank: int | None
    """None where all parameters of the model are trained, or a service does not tell."""
    is_deterministic: bool
    """Whether the same state and the same calls give the same bits."""
    details: Mapping[str, JsonValue]
    """Whatever else a record of a step should name: device, precision, versions."""


@dataclass(frozen=True, slots=True)
class OptimizerFigures:
    """What an optimizer step tells."""

    gradient_norm: float | None
    """Of the divided gradient, before it is clipped; None where a service does not tell it."""


class Trainer(Protocol):
    """Weights under training, in this process or behind a service.

    Calls come one at a time. A call that fails for want of memory, disk or network raises and
    leaves weights and optimizer as they were; the run then goes on from the newest state.
    """

    def describe(self) -> TrainerFacts:
        """Say what is trained."""

    def logprobs(
        self, sequences: Sequence[Sequence[int]], *, is_before_backward: bool = False
    ) -> list[PerToken]:
        """Compute the log-probability of every token but the first of each sequence, [N−1] each, in
        nats, without dropout.

        Args:
            sequences: token ids, at least two each.
            is_before_backward: the next call is `backward` with the same sequences, so what it
                needs of this forward may be kept. Never changes a result.

        Raises:
            ValueError: a sequence is too short, too long or has an id that the model lacks.
        """

    def backward(
        self, sequences: Sequence[Sequence[int]], coefficients: Sequence[PerToken]
    ) -> None:
        """Add to the gradient: the sum over all predictions of coefficient × gradient of its
        log-probability.

        Sums, never means; so any split into calls gives the same gradient but for rounding.

        Args:
            coefficients: [N−1] each, 0 for what is not in the loss.

        Raises:
            ValueError: as `logprobs`; or coefficients that are not one finite number a prediction.
        """

    def step(self, adam: AdamSettings, *, learning_rate: float, divisor: float) -> OptimizerFigures:
        """Divide the gradient, clip it, update the weights, and clear it.

        Args:
            learning_rate: may be 0: then no weight changes.
            divisor: above 0; see hotload.training.divisor.

        Raises:
            TrainerError: the gradient is not finite; it is cleared, and nothing else changed.
        """

    def save_state(self, name: str) -> StateRef:
        """Put away weights, optimizer and random state, durably, and name them.

        Args:
            name: one path segment; what is stored under another may be returned.
        """

    def load_state(self, ref: StateRef) -> None:
        """Become what was saved, to the last bit where the trainer is deterministic; a gradient is
        cleared.

        Raises:
            StoreError: there is no such state, or it is not the one that was saved.
        """

    def export(self, directory: Path) -> None:
        """Write the weights as a checkpoint that a cycle takes; complete when `directory` is there.

        Raises:
            FileExistsError: there is something already.
            TrainerError: the weights cannot be taken out of where they are.
        """


class RouteReplayer(Trainer, Protocol):
    """A trainer of a mixture of experts that sends tokens to the experts which sampled them: their
    weights are its own router's. Without routes, and where a row is −1, the router chooses, too.
    """

    replays_routes: bool
    """Whether it was asked to. Then a step without routes is an error."""

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        is_before_backward: bool = False,
        routes: Sequence[Routes] | None = None,
    ) -> list[PerToken]:
        """Compute log-probabilities as any trainer.

        Args:
            routes: of each sequence, as hotload.rollout.routing lays them out.

        Raises:
            ValueError: as any trainer; or routes of another model.
        """

    def backward(
        self,
        sequences: Sequence[Sequence[int]],
        coefficients: Sequence[PerToken],
        *,
        routes: Sequence[Routes] | None = None,
    ) -> None:
        """Add to the gradient as any trainer, along these routes."""


def as_replayer(trainer: Trainer) -> RouteReplayer | None:
    """Take a trainer as one that replays routes, if it was asked to."""
    return cast(RouteReplayer, trainer) if getattr(trainer, "replays_routes", False) else None


class StateRemover(Trainer, Protocol):
    """A trainer whose states can be removed: where a run is told to keep but the newest."""

    def remove_state(self, ref: StateRef) -> None:
        """Remove what was saved; nothing happens where it is gone.

        Raises:
            StoreError: it cannot be removed.
        """


def as_remover(trainer: Trainer) -> StateRemover | None:
    """Take a trainer as one that removes states, if it can."""
    return cast(StateRemover, trainer) if callable(getattr(trainer, "remove_state", None)) else None
