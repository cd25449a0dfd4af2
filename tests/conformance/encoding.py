"""What an encoder is handed: pairs to encode, and pairs that are no delta (wire-format §11)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from tests.conformance.cases import FIRST, SECOND, V, W, vectors
from tests.conformance.pairs import CONFIG, PAIRS, Pair, sides_of
from tests.conformance.plain import Dress, Shards, Sides, Tensor


@dataclass(frozen=True)
class Task:
    """Two checkpoints, and whether there is a delta between them."""

    is_possible: bool
    base: Shards
    base_sides: Sides
    target: Shards
    target_sides: Sides


def of_pair(make: Callable[[], Pair]) -> Callable[[], Task]:
    def build() -> Task:
        found = make()
        return Task(True, found.base, found.sides, found.target, found.sides)

    return build


def drifted(change: Callable[[Shards], None]) -> Callable[[], Task]:
    """The second checkpoint, index and spec included, is one of another layout."""

    def build() -> Task:
        found = vectors()
        target = {file: dict(shard) for file, shard in found.target.items()}
        change(target)
        return Task(False, found.base, found.sides, target, sides_of(target))

    return build


def side_changed(file: str, data: bytes) -> Callable[[], Task]:
    def build() -> Task:
        found = vectors()
        return Task(False, found.base, found.sides, found.target, {**found.sides, file: data})

    return build


def other_dtype(shards: Shards) -> None:
    shards[FIRST][W] = Tensor("F16", (2, 3), shards[FIRST][W].data)


def other_shape(shards: Shards) -> None:
    shards[FIRST][W] = Tensor("BF16", (3, 2), shards[FIRST][W].data)


def wider(shards: Shards) -> None:
    shards[FIRST][W] = Tensor("BF16", (2, 4), shards[FIRST][W].data + bytes(4))


def added(shards: Shards) -> None:
    shards[FIRST]["model.layers.0.bias"] = Tensor("F32", (1,), bytes(4))


def removed(shards: Shards) -> None:
    shards[FIRST]["model.layers.0.v"] = shards[FIRST].pop(W)


def shard_removed(shards: Shards) -> None:
    del shards[SECOND]


def resharded(shards: Shards) -> None:
    shards[FIRST][V] = shards.pop(SECOND)[V]


DRIFT: dict[str, Callable[[], Task]] = {
    "other-dtype": drifted(other_dtype),
    "other-shape": drifted(other_shape),
    "other-size": drifted(wider),
    "tensor-added": drifted(added),
    "tensor-renamed": drifted(removed),
    "shard-removed": drifted(shard_removed),
}
# Only Fireworks wants the shards of the parent, and its config and tokenizer unchanged (§2, §6).
FIREWORKS_DRIFT: dict[str, Callable[[], Task]] = {
    "resharded": drifted(resharded),
    "other-config": side_changed("config.json", json.dumps({**CONFIG, "vocab_size": 7}).encode()),
    "other-tokenizer": side_changed("tokenizer.json", b'{"version": "2.0"}'),
}


def for_encoders(dress: Dress) -> dict[str, Callable[[], Task]]:
    """What an encoder of this dress is handed."""
    drift = DRIFT | (FIREWORKS_DRIFT if dress.dialect == "fireworks" else {})
    return {
        **{f"encode/{name}": of_pair(make) for name, make in PAIRS.items()},
        **{f"drift/{name}": build for name, build in drift.items()},
    }
