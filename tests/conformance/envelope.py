"""Checksums, key sets and index as the dialects want them, and otherwise (wire-format §3)."""

from __future__ import annotations

from collections.abc import Callable

from tests.conformance.cases import Build, Case, Spoil, W, spoiled
from tests.conformance.pairs import PAIRS
from tests.conformance.plain import INDEX, Delta, Dress, level_1, make_delta


def checksums(change: Callable[[str], object | None]) -> Spoil:
    """Put `change(text)` in the place of the checksum of W; None takes it away."""

    def spoil(delta: Delta, dress: Dress) -> None:
        texts: dict[str, object] = delta.texts[delta.file_of(W)]  # type: ignore[assignment]
        changed = change(str(texts.pop(W)))
        if changed is not None:
            texts[W] = changed

    return spoil


def respell(delta: Delta, dress: Dress) -> None:
    """Decimal where hex is wanted, and the other way round."""
    for texts in delta.texts.values():
        for name, text in texts.items():
            texts[name] = f"{int(text):08x}" if dress.dialect == "fireworks" else str(int(text, 16))


def extra_metadata(delta: Delta, dress: Dress) -> None:
    for texts in delta.texts.values():
        texts |= {"format": "pt", "written_by": "somebody", f"{W}@sha256": "00" * 32}


def stranger(delta: Delta, dress: Dress) -> None:
    """A tensor that the base does not have."""
    file = delta.file_of(W)
    delta.frames[file]["model.layers.7.w"] = level_1(b"\1\2")
    delta.texts[file]["model.layers.7.w"] = dress.spell(b"\1\2")
    if delta.index:
        delta.index["weight_map"]["model.layers.7.w"] = file


def missing(delta: Delta, dress: Dress) -> None:
    """The index names W, its shard does not hold it."""
    file = delta.file_of(W)
    del delta.frames[file][W], delta.texts[file][W]


def other_index(delta: Delta, dress: Dress) -> None:
    """Fireworks: "identical to the parent's". Others: another encoding than they know."""
    if dress.dialect == "fireworks":
        delta.sides = {**delta.sides, INDEX: delta.sides[INDEX] + b" "}
    else:
        delta.index["metadata"]["delta_encoding"] = "sum"


def index_says(key: str, value: object) -> Spoil:
    def spoil(delta: Delta, dress: Dress) -> None:
        delta.index["metadata"][key] = value

    return spoil


def reordered(delta: Delta, dress: Dress) -> None:
    for file, frames in delta.frames.items():
        delta.frames[file] = dict(reversed(frames.items()))


def changed_only(dress: Dress) -> Case:
    found = PAIRS["half-unchanged"]()
    delta = make_delta(dress, found.base, found.target, found.sides)
    for file, shard in found.base.items():
        for name, tensor in shard.items():
            if tensor.data == found.target[file][name].data:
                del delta.frames[file][name], delta.texts[file][name]
    return Case("refused", found.base, found.sides, [delta], found.target)


def every_tensor(dress: Dress) -> Case:
    found = PAIRS["half-unchanged"]()
    delta = make_delta(dress, found.base, found.target, found.sides, has_every_tensor=True)
    return Case("target", found.base, found.sides, [delta], found.target)


ENVELOPE: dict[str, Build] = {
    "extra-metadata": spoiled("target", extra_metadata),
    "other-order-of-tensors": spoiled("target", reordered, PAIRS["dtypes"]),
    "no-checksum": spoiled("refused", checksums(lambda text: None)),
    "empty-checksum": spoiled("refused", checksums(lambda text: "")),
    "checksum-is-a-number": spoiled("refused", checksums(lambda text: 478807142)),
    "wrong-checksum": spoiled(
        "refused", checksums(lambda text: text[:-1] + ("1" if text[-1] == "0" else "0"))
    ),
    "zero-padded-checksum": spoiled("refused", checksums(lambda text: "0" + text)),
    "checksum-with-a-space": spoiled("refused", checksums(lambda text: text + " ")),
    "unknown-tensor": spoiled("refused", stranger),
    "missing-tensor": spoiled("refused", missing),
    "other-index": spoiled("refused", other_index),
}
ADLER_ONLY: dict[str, Build] = {
    "other-spelling": spoiled("refused", respell),
}
FIREWORKS_ONLY: dict[str, Build] = {
    "changed-tensors-only": changed_only,
}
INDEXED_ONLY: dict[str, Build] = {
    "every-tensor": every_tensor,
    "upper-case-checksum": spoiled("refused", checksums(lambda text: "ABCDEF" + text[6:])),
    "unknown-compression": spoiled("refused", index_says("compression_format", "lz4")),
    "unknown-checksum": spoiled("refused", index_says("checksum_format", "crc32")),
}
