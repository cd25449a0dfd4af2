"""The fuzz targets hold for the corpus, and for some thousand inputs that are like it."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from tests.fuzz.__main__ import mutated
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS, any_of

SEEDS = list(seeds())
# The codec's own buffers: a piece, its base, and what the writer of sequences makes of a piece.
ROOM_BYTES = 48 << 20


def name(seed: bytes) -> str:
    return list(TARGETS)[seed[0] % len(TARGETS)]


def test_every_target_has_seeds() -> None:
    assert {name(seed) for seed in SEEDS if seed} == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_finds_nothing_and_costs_little_memory(target: str) -> None:
    for seed in SEEDS:
        if not seed or name(seed) != target:
            continue
        tracemalloc.start()
        try:
            any_of(seed)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < ROOM_BYTES + 16 * len(seed), seed.hex()


@pytest.mark.parametrize("target", TARGETS)
def test_nor_does_what_is_like_the_corpus(target: str) -> None:
    chance = random.Random(target)
    alike = [seed for seed in SEEDS if seed and name(seed) == target]
    for _ in range(100 if target == "written" else 1000):
        data = mutated(chance.choice(alike), chance.choice(alike), chance)
        any_of(alike[0][:1] + data[1:])
