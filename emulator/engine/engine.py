"""What an engine is: it loads weights from a directory and continues token ids with them.

Two kinds exist. Engines with logits (`numpy`, `transformers`) yield `EngineWeights`, from which
`decoding` samples. The stub answers canned tokens and never computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt


class Cache(Protocol):
    """Keys and values of the positions computed so far."""

    length: int

    @property
    def size_bytes(self) -> int:
        """Bytes held."""

    def prefix(self, length: int) -> Self:
        """Copy the first `length` positions, free to grow on their own."""

    def routing_matrix(self, position: int) -> str | None:
        """Pack the experts that a position was sent to (protocol §12); `None` without experts."""


class EngineWeights(Protocol):
    """Weights of one snapshot, ready to compute; safe to share between threads."""

    vocab_size: int
    context_length: int
    has_experts: bool
    """Whether the cache tells which experts each position was sent to."""

    def empty_cache(self) -> Any:
        """Make a cache without positions."""

    def forward(
        self, ids: Sequence[int], cache: Any, *, all_positions: bool = False
    ) -> npt.NDArray[np.float32]:
        """Compute the logits after `ids`: `[T, vocab]` with `all_positions`, else `[1, vocab]`."""


class Token(NamedTuple):
    """One sampled, or echoed, token.

    `logprob` is raw, at temperature 1, without filters, bias and penalties; `sampling_logprob` is
    under the distribution really sampled (protocol §12), None for every prompt token. The first
    prompt token is given, not predicted: its `logprob` is 0. `routing` packs the experts of the
    forward that predicted the token.
    """

    id: int
    logprob: float
    sampling_logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    routing: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a token is drawn; `top_k` 0 means all, `temperature` 0 the most likely one.

    `min_p` is a share of the most likely token's probability; `logit_bias` is per token id; the
    penalties are for tokens the answer has, per occurrence and once.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_logprobs: int = 0
    seed: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        is_unfiltered = self.top_p >= 1.0 and not self.top_k and not self.min_p
        return self.temperature == 1.0 and is_unfiltered and not self.shifts_logits

    @property
    def shifts_logits(self) -> bool:
        """Whether a bias or a penalty is added to the logits."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty)


def first_of_prompt(token: int, top_logprobs: int) -> Token:
    """Make the echoed first token, its own only alternative where alternatives are asked for."""
    return Token(token, 0.0, None, ((token, 0.0),) * min(1, top_logprobs))


class Choice(Protocol):
    """One answer under way; `advance` is called by one thread at a time."""

    def advance(self, weights: Any, count: int) -> list[Token]:
        """Sample at most `count` more tokens from `weights`; stops after a stop id."""


class Prompt(Protocol):
    """A prompt already computed, from which choices begin."""

    cached_count: int
    cache: Any
    echoed: list[Token]

    def begin(self, index: int, stop_ids: frozenset[int]) -> Choice:
        """Begin choice number `index`, with its own cache and random numbers."""


class Engine(Protocol):
    """Loads weights and computes prompts with them."""

    is_inline: bool

    def load(self, directory: Path, adapter: Path | None = None) -> Any:
        """Weights of the checkpoint in `directory`, an adapter applied to them if given.

        Raises:
            UnsupportedModelError: the files are not a model of this engine.
            HotLoadError: the files are not readable as safetensors.
        """

    def prefill(
        self,
        weights: Any,
        ids: Sequence[int],
        sampling: SamplingParameters,
        cache: Any,
        *,
        echo: bool,
    ) -> Prompt:
        """Compute the prompt, going on from `cache` (a prefix of it) if given."""
