"""The probe: fixed tokens, and whether every replica gives them the same log-probabilities.

An identity says what a replica was asked to load; its answers show what it did load. A full
snapshot carries no checksum of its tensors (wire-format §1), so a byte that a replica damages while
it downloads is served under the right identity. Log-probabilities of a few tokens depend on every
tensor of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple, Self

from pydantic import Field, model_validator

from hotload.errors import StoreError
from hotload.records import Record

PROBE_FILE = "probe.json"
PROBE_LIMIT_BYTES = 1 << 20
TRAINER = "the trainer"
TOKEN_LIMIT = 512
DEFAULT_TOKENS = 32

Nats = Annotated[float, Field(le=0, ge=-1e6)]


class Probe(Record):
    """Token ids to be asked about, and what the trainer says of them, if it does.

    A trainer leaves it beside the checkpoint as `probe.json`; it is not published.
    """

    token_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(
        min_length=2, max_length=TOKEN_LIMIT
    )
    logprobs: tuple[Nats, ...] | None = None
    """Nats of every token but the first, each given those before it; raw, at temperature 1."""

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids) - 1:
            count = len(self.token_ids)
            raise ValueError(f"expected {count - 1} logprobs for {count} token_ids, one less")
        return self

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Probe:
        """Parse a trainer's probe.

        Raises:
            StoreError: it is not one; names the field.
        """
        if len(data) > PROBE_LIMIT_BYTES:
            raise StoreError(path, f"larger than {PROBE_LIMIT_BYTES} bytes: not a probe")
        return cls.parse_stored(data, path)

    def without_figures(self) -> Probe:
        """Return the tokens alone."""
        return self.model_copy(update={"logprobs": None})

    @classmethod
    def over(cls, vocab_size: int) -> Probe:
        """Make one over a vocabulary: tokens from all parts of it, the same every time."""
        count = range(DEFAULT_TOKENS)
        return cls(token_ids=tuple((7919 * number + 11) % vocab_size for number in count))


class ProbeAnswer(NamedTuple):
    """What one session was answered: by which replica and which weights, as far as it says so."""

    session: str
    replica: str | None
    identity: str | None
    logprobs: tuple[float, ...]

    @property
    def name(self) -> str:
        """The replica, or else the session that led to it."""
        return self.replica or f"the replica of {self.session}"


def what_differs(
    answer: ProbeAnswer, others: Sequence[ProbeAnswer], probe: Probe, tolerance: float
) -> str | None:
    """Say how an answer differs from the trainer's figures or another one; None if it does not.

    Args:
        others: earlier answers, which agree with each other.
        tolerance: nats a token, the mean of the absolute differences.
    """
    compared = [(other.name, other.logprobs) for other in others]
    if probe.logprobs is not None:
        compared.append((TRAINER, probe.logprobs))
    distances = [(_distance(answer.logprobs, logprobs), name) for name, logprobs in compared]
    distance, name = max(distances, default=(0.0, ""))
    if distance <= tolerance:
        return None
    advice = "" if name != TRAINER else f"; if all replicas agree, it is {PROBE_FILE} that is wrong"
    return (
        f"probe: {answer.name} and {name} differ by {distance:.3g} nats a token, "
        f"expected at most {tolerance:g}{advice}"
    )


def _distance(mine: Sequence[float], theirs: Sequence[float]) -> float:
    if len(mine) != len(theirs) or not all(map(math.isfinite, (*mine, *theirs))):
        return math.inf
    return math.fsum(map(abs, (a - b for a, b in zip(mine, theirs, strict=True)))) / len(mine)
