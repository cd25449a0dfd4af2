"""The stub engine: canned tokens, no weights computed. For benchmarks of the client."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emulator.engine.engine import SamplingParameters, Token
from emulator.engine.llama import LlamaShape
from emulator.engine.weights import read_json, read_tensors, shard_names
from hotload.checkpoint.names import CONFIG_FILE

# Four layers of two experts: the form of a routing matrix, for clients that ask for one.
ROUTING = base64.b64encode(bytes([0, 1, 2, 3, 0, 2, 1, 3])).decode()
FIRST_ID, CYCLE = 5, 11
LOGPROB = -0.5


@dataclass(slots=True)
class StubCache:
    """Counts positions and holds none."""

    length: int = 0
    size_bytes: int = 0

    def prefix(self, length: int) -> StubCache:
        """Make a cache of `length` positions."""
        return StubCache(length)


@dataclass(frozen=True, slots=True)
class StubWeights:
    """What is known of a model that is never computed."""

    vocab_size: int
    context_length: int

    def empty_cache(self) -> StubCache:
        """Make a cache without positions."""
        return StubCache()


@dataclass(slots=True)
class StubChoice:
    """Canned tokens, one after the other."""

    vocab_size: int
    top_logprobs: int
    cache: StubCache
    position: int = 0

    def advance(self, weights: Any, count: int) -> list[Token]:
        """Give the next `count` canned tokens; never a stop id."""
        start, self.position = self.position, self.position + count
        self.cache.length += count
        return [
            Token(
                token := (FIRST_ID + position % CYCLE) % self.vocab_size,
                LOGPROB,
                LOGPROB,
                ((token, LOGPROB),) * min(1, self.top_logprobs),
                ROUTING,
            )
            for position in range(start, self.position)
        ]


@dataclass(slots=True)
class StubPrompt:
    """A prompt that was counted."""

    vocab_size: int
    top_logprobs: int
    cached_count: int
    cache: StubCache
    echoed: list[Token] = field(default_factory=list)

    def begin(self, index: int, stop_ids: frozenset[int]) -> StubChoice:
        """Begin a choice; all are alike."""
        return StubChoice(self.vocab_size, self.top_logprobs, StubCache(self.cache.length))


class StubEngine:
    """Reads the files of a snapshot, so that loading is real, and then answers from a list."""

    is_inline = True

    def load(self, directory: Path, adapter: Path | None = None) -> StubWeights:
        """Vocabulary and context length; every shard is read once, as a server would."""
        shape = LlamaShape.parse(read_json(directory / CONFIG_FILE))
        if shard_names(directory):
            read_tensors(directory)
        return StubWeights(shape.vocab_size, shape.context_length)

    def prefill(
        self,
        weights: StubWeights,
        ids: Sequence[int],
        sampling: SamplingParameters,
        cache: Any,
        *,
        echo: bool,
    ) -> StubPrompt:
        """Count the prompt."""
        cached_count = 0 if cache is None or echo else cache.length
        echoed = [Token(ids[0], None, None)] if echo else []
        echoed += [Token(token, LOGPROB, None) for token in ids[1:]] if echo else []
        return StubPrompt(
            weights.vocab_size, sampling.top_logprobs, cached_count, StubCache(len(ids) - 1), echoed
        )
