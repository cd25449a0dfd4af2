"""From logits to tokens: bias, penalties, filters, and both log-probabilities (protocol §12)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from emulator.engine.engine import EngineWeights, SamplingParameters, Token, first_of_prompt

Doubles = npt.NDArray[np.float64]


@dataclass(slots=True)
class DecodedPrompt:
    """A prompt in a cache, all but its last token, which the first `advance` feeds."""

    ids: Sequence[int]
    sampling: SamplingParameters
    cached_count: int
    cache: Any
    echoed: list[Token] = field(default_factory=list)

    def begin(self, index: int, stop_ids: frozenset[int]) -> DecodedChoice:
        """Begin choice number `index`; the same seed, index and weights give the same tokens."""
        seed = self.sampling.seed
        rng = np.random.default_rng(None if seed is None else [seed, index])
        cache = self.cache.prefix(self.cache.length)
        return DecodedChoice(self.ids[-1], self.sampling, cache, rng, stop_ids)


@dataclass(slots=True)
class DecodedChoice:
    """One answer under way. Its cache outlives a change of weights: no re-prefill (protocol §9)."""

    pending: int
    sampling: SamplingParameters
    cache: Any
    rng: np.random.Generator
    stop_ids: frozenset[int]
    counts: Counter[int] = field(default_factory=Counter)  # of the tokens drawn so far

    def advance(self, weights: EngineWeights, count: int) -> list[Token]:
        """Sample at most `count` tokens from `weights`; ends early after a stop id, which is
        included.
        """
        tokens: list[Token] = []
        for _ in range(count):
            logits = weights.forward([self.pending], self.cache)[-1]
            token = draw(logits, self.sampling, self.rng, self.counts)
            if (routing := self.cache.routing_matrix(self.cache.length - 1)) is not None:
                token = token._replace(routing=routing)
            tokens.append(token)
            self.pending = token.id
            self.counts[self.pending] += 1
            if self.pending in self.stop_ids:
                break
        return tokens


def prefill(
    weights: EngineWeights,
    ids: Sequence[int],
    sampling: SamplingParameters,
    cache: Any,
    *,
    echo: bool,
) -> DecodedPrompt:
    """Compute the prompt `ids` but for its last token; with `echo` also its log-probabilities.

    A prompt to be echoed is computed from its first token, whatever `cache` holds.
    """
    held = weights.empty_cache() if cache is None or echo else cache
    cached_count = held.length
    echoed: list[Token] = []
    rest = list(ids[cached_count:-1])
    if echo:
        echoed.append(first_of_prompt(ids[0], sampling.top_logprobs))
        if rest:
            logits = weights.forward(rest, held, all_positions=True)
            echoed += [
                _observed(token, row, sampling.top_logprobs, held.routing_matrix(position))
                for position, (token, row) in enumerate(zip(ids[1:], logits, strict=True))
            ]
    elif rest:
        weights.forward(rest, held)
    return DecodedPrompt(ids, sampling, cached_count, held, echoed)


def draw(
    logits: npt.NDArray[np.float32],
    sampling: SamplingParameters,
    rng: np.random.Generator,
    counts: Mapping[int, int],
) -> Token:
    """Draw one token from `logits` (`[vocab]`), after those that `counts` counts.

    Raises:
        FloatingPointError: the logits are not numbers, as with weights that are not.
    """
    raw = _raw(logits)
    top = _top(raw, sampling.top_logprobs)
    shifted = _shifted(raw, sampling, counts) if sampling.shifts_logits else raw
    if sampling.temperature == 0.0:
        best = int(shifted.argmax())
        return Token(best, float(raw[best]), 0.0, top)
    sampled = raw if sampling.is_plain else truncated(shifted, sampling)
    # Inverse of the cumulative distribution: one random number a token, whatever the vocabulary.
    cumulative = np.cumsum(np.exp(sampled))
    chosen = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return Token(chosen, float(raw[chosen]), float(sampled[chosen]), top)


def truncated(raw: Doubles, sampling: SamplingParameters) -> Doubles:
    """Compute the log-probabilities really sampled from: temperature, then min-p, then top-k, then
    top-p, renormalised.
    """
    scaled = log_softmax(raw / sampling.temperature)
    keep = np.ones(len(scaled), dtype=bool)
    if sampling.min_p:
        keep = scaled >= scaled.max() + math.log(sampling.min_p)
        scaled = log_softmax(np.where(keep, scaled, -np.inf))
    order = np.argsort(-scaled, kind="stable")
    if 0 < sampling.top_k < len(scaled):
        keep[order[sampling.top_k :]] = False
        scaled = log_softmax(np.where(keep, scaled, -np.inf))
    if sampling.top_p < 1.0:
        mass = np.cumsum(np.exp(scaled[order]))
        # The smallest set that reaches top_p; the first token always stays.
        keep[order[1:][mass[:-1] >= sampling.top_p]] = False
        scaled = log_softmax(np.where(keep, scaled, -np.inf))
    return scaled


def log_softmax(values: Doubles) -> Doubles:
    """Compute the log-probabilities of `values` (`[vocab]`), -inf where a value is."""
    with np.errstate(invalid="ignore"):
        shifted = values - values.max()
        return shifted - np.log(np.exp(shifted).sum())


def _shifted(raw: Doubles, sampling: SamplingParameters, counts: Mapping[int, int]) -> Doubles:
    """Add the bias to `raw`, and subtract the penalties of the tokens that the answer has."""
    shifted = raw.copy()
    for token, bias in sampling.logit_bias:
        shifted[token] += bias
    for token, count in counts.items():
        shifted[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    return shifted


def _observed(
    token: int, logits: npt.NDArray[np.float32], top_logprobs: int, routing: str | None
) -> Token:
    raw = _raw(logits)
    return Token(token, float(raw[token]), None, _top(raw, top_logprobs), routing)


def _raw(logits: npt.NDArray[np.float32]) -> Doubles:
    raw = log_softmax(logits.astype(np.float64))
    if not math.isfinite(raw.max()):
        raise FloatingPointError("the logits are not finite")
    return raw


def _top(raw: Doubles, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    order = np.argsort(-raw, kind="stable")[:count]
    return tuple((int(token), float(raw[token])) for token in order)
