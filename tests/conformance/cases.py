"""What a receiver is handed, and what has to come of it (wire-format §11).

`expects` is one of
    target   the receiver restores the target, bit for bit
    refused  it says no: nothing at the output, base and delta as they were
    either   the contract leaves it open, or peers differ (§4): target or refused, never other bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.conformance.pairs import PAIRS, Pair, pair, raw, sides_of, step
from tests.conformance.plain import Delta, Dress, Shards, Sides, Tensor, fold, make_delta

Expects = Literal["target", "refused", "either"]


@dataclass(frozen=True)
class Case:
    """A base, the deltas to apply one after the other, and what becomes of the last of them.

    All before the last have to be accepted.
    """

    expects: Expects
    base: Shards
    sides: Sides
    deltas: Sequence[Delta]
    target: Shards


Build = Callable[[Dress], Case]
Spoil = Callable[[Delta, Dress], None]

W = "model.layers.0.w"
V = "model.layers.1.w"
FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"


def vectors() -> Pair:
    """The tensor of wire-format §10, v0 and v1, and a second layer in a shard of its own."""
    v0 = Tensor("BF16", (2, 3), bytes.fromhex("803f80bf233c00007f7fcc3d"))
    v1 = Tensor("BF16", (2, 3), bytes.fromhex("803f81bf233c00007e7fcd3d"))
    other = raw("F32", 0x3F800000, 0x7FC00000, 0x80000000)
    moved = raw("F32", 0x3F800001, 0x7FC00000, 0x00000000)
    return pair({FIRST: {W: v0}, SECOND: {V: other}}, {FIRST: {W: v1}, SECOND: {V: moved}})


def long_vectors() -> Pair:
    """A tensor of more than one zstd block, half of it unchanged."""
    base = bytes(range(256)) * 1200
    target = bytearray(base)
    target[: len(base) // 2 : 97] = bytes(byte ^ 1 for byte in base[: len(base) // 2 : 97])
    old, new = (Tensor("U8", (len(base),), bytes(data)) for data in (base, target))
    return pair({FIRST: {W: old}}, {FIRST: {W: new}})


def of_pair(make: Callable[[], Pair]) -> Build:
    """The delta of a pair as it should be."""
    return spoiled("target", lambda delta, dress: None, make)


def spoiled(expects: Expects, spoil: Spoil, make: Callable[[], Pair] = vectors) -> Build:
    """The case of one delta in which `spoil` changed something."""

    def build(dress: Dress) -> Case:
        found = make()
        delta = make_delta(dress, found.base, found.target, found.sides)
        spoil(delta, dress)
        return Case(expects, found.base, found.sides, [delta], found.target)

    return build


# Chain (§1, §7)


def states(count: int) -> list[Shards]:
    """Checkpoints of one run, every tensor changed in every step."""
    found = [PAIRS["dtypes"]().base]
    for number in range(count):
        found.append(step(found[-1], seed=1000 * number))
    return found


def chain(expects: Expects, length: int, applied: Sequence[int], start: int = 0) -> Build:
    """The deltas `applied`, counted from 1, to state `start` of a chain."""

    def build(dress: Dress) -> Case:
        found = states(length)
        sides = sides_of(found[0])
        deltas = [
            make_delta(dress.step(number), found[number - 1], found[number], sides)
            for number in range(1, length + 1)
        ]
        chosen = [deltas[number - 1] for number in applied]
        return Case(expects, found[start], sides, chosen, found[applied[-1]])

    return build


def folded(dress: Dress) -> Case:
    found = states(4)
    sides = sides_of(found[0])
    deltas = [
        make_delta(dress.step(number), found[number - 1], found[number], sides)
        for number in range(1, 5)
    ]
    return Case("target", found[0], sides, [fold(deltas)], found[-1])


CHAIN: dict[str, Build] = {
    "three-steps": chain("target", 3, [1, 2, 3]),
    "twenty-five-steps": chain("target", 25, range(1, 26)),
    "fold-of-four": folded,
    "applied-twice": chain("refused", 2, [1, 1]),
    "out-of-order": chain("refused", 2, [2]),
    "one-left-out": chain("refused", 3, [1, 3]),
    "wrong-parent": chain("refused", 3, [1], start=2),
}
