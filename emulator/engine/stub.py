"""The stub engine: canned tokens, no weights computed. For benchmarks of the client."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.loading.checkpoint_files import read_json, shard_names
from emulator.engine.engine import SamplingParameters, Token, first_of_prompt
from hotload.checkpoint.names import CONFIG_FILE
from hotload.checkpoint.sub_configs import language_config, vocab_size
from hotload.directory.shards import open_shard

# Four layers of two experts: the form of a routing matrix, for clients that ask for one.
ROUTING = base64.b64encode(bytes([0, 1, 2, 3, 0, 2, 1, 3])).decode()
FIRST_ID, CYCLE = 5, 11
LOGPROB = -0.5
# Of a model whose config does not tell.
VOCAB_SIZE, CONTEXT_LENGTH = 1000, 2048


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
    has_experts: bool = True

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
        """Vocabulary and context length of any model; every tensor is read once."""
        config = read_json(directory / CONFIG_FILE)
        for name in shard_names(directory):
            with open_shard(directory / name) as shard:
                for tensor in shard.header.tensors:
                    raw = bytearray(tensor.size_bytes)
                    shard.read_into(shard.header.data_start + tensor.start, memoryview(raw))
        length = language_config(config).get("max_position_embeddings")
        context_length = length if isinstance(length, int) and length > 0 else CONTEXT_LENGTH
        return StubWeights(vocab_size(config) or VOCAB_SIZE, context_length)

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
        top = sampling.top_logprobs
        echoed = [first_of_prompt(ids[0], top)] if echo else []
        for token in ids[1:] if echo else ():
            echoed.append(Token(token, LOGPROB, None, ((token, LOGPROB),) * min(1, top)))
        return StubPrompt(weights.vocab_size, top, cached_count, StubCache(len(ids) - 1), echoed)
