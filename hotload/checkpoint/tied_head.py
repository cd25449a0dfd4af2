"""A head that config.json ties to the embeddings: left out, or a copy of them byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hotload.checkpoint.anatomy import Parts, is_name_of_head
from hotload.checkpoint.names import CONFIG_FILE
from hotload.checkpoint.safetensors import TensorInfo
from hotload.checkpoint.sub_configs import is_tied
from hotload.errors import Finding, shorten


@dataclass(frozen=True, slots=True)
class TiedHead:
    """A head, and the embeddings of its dtype and shape; (file, tensor) each.

    `is_told` says that config.json ties it; else the config is silent.
    """

    head: tuple[str, TensorInfo]
    embeddings: tuple[tuple[str, TensorInfo], ...]
    is_told: bool


def find_tied_heads(
    tensors: Iterable[tuple[str, TensorInfo]], parts: Parts, config: Mapping[str, Any]
) -> tuple[TiedHead, ...]:
    """Find the heads that may be copies of the embeddings: none where config.json unties them.

    Told by shape alone, a matrix may be something else of the vocabulary: it is kept.
    """
    tied = is_tied(config)
    if tied is False:
        return ()
    files = {one.name: file for file, one in tensors}
    embeddings = [(files[one.name], one) for one in parts.embeddings]
    found = []
    for head in filter(lambda one: is_name_of_head(one.name), parts.heads):
        form = head.dtype, head.shape
        alike = tuple(each for each in embeddings if (each[1].dtype, each[1].shape) == form)
        found.append(TiedHead((files[head.name], head), alike, is_told=tied is True))
    return tuple(found)


def check_forms(heads: Iterable[TiedHead]) -> Iterator[Finding]:
    """Check that every head which config.json ties has embeddings of its form."""
    for tied in heads:
        file, head = tied.head
        if tied.is_told and not tied.embeddings:
            found = f"{head.dtype} {shorten(list(head.shape))}, and no embeddings of that form"
            expected = f"embeddings to be tied to, or tie_word_embeddings: false in {CONFIG_FILE}"
            yield Finding("tied_head", file, head.name, found, expected)


def head_finding(tied: TiedHead, *, is_copy: bool) -> Finding | None:
    """Say what is wrong with a head whose bytes were compared with the embeddings; None if nothing
    is.
    """
    file, head = tied.head
    names = ", ".join(shorten(tensor.name) for _, tensor in tied.embeddings)
    if tied.is_told and not is_copy:
        expected = f"the bytes of {names}, or tie_word_embeddings: false in {CONFIG_FILE}"
        return Finding("tied_head", file, head.name, "other bytes", expected)
    if is_copy and not tied.is_told:
        found = f"the bytes of {names}, and no tie_word_embeddings in {CONFIG_FILE}: it is kept"
        expected = "that field to be true, if the base model has no head"
        return Finding("tied_head", file, head.name, found, expected, severity="warning")
    return None


def without_unwritten_heads(
    weight_map: Mapping[str, Any], names: Iterable[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Leave out of an index the tied heads that no shard holds: some writers list them all the
    same.
    """
    missing = weight_map.keys() - set(names) if is_tied(config) else set()
    unwritten = {name for name in missing if is_name_of_head(name)}
    return {name: file for name, file in weight_map.items() if name not in unwritten}
