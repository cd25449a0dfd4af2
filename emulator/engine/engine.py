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


class UnsupportedModelError(ValueError):
    """The files describe a model this engine does not compute."""


class Cache(Protocol):
    """Keys and values of the positions computed so far."""

    length: int

    @property
    def size_bytes(self) -> int:
        """Bytes held."""

    def prefix(self, length: int) -> Self:
        """Copy the first `length` positions, free to grow on their own."""


class EngineWeights(Protocol):
    """Weights of one snapshot, ready to compute; safe to share between threads."""

    vocab_size: int
    context_length: int

    def empty_cache(self) -> Any:
        """Make a cache without positions."""

    def forward(
        self, ids: Sequence[int], cache: Any, *, all_positions: bool = False
    ) -> npt.NDArray[np.float32]:
        """Compute the logits after `ids`: `[T, vocab]` with `all_positions`, else `[1, vocab]`."""


class Token(NamedTuple):
    """One sampled, or echoed, token.

    `logprob` is raw, at temperature 1; `sampling_logprob` is under the distribution really sampled
    (protocol §12). Both are None for the first prompt token, the second for every prompt token.
    """

    id: int
    logprob: float | None
    sampling_logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    routing: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a token is drawn; `top_k` 0 means all, `temperature` 0 the most likely one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    top_logprobs: int = 0
    seed: int | None = None


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
