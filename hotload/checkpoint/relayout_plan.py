"""A plan that brings a checkpoint into the layout a service wants (wire-format §6).

Names, headers and documents in, plan out; `hotload.directory.relayout` carries it out. One layer a
file, embeddings, final norm and head each in a file of their own, every file below 5 GB, index and
spec to match. Which tensor goes where depends on nothing but names, dtypes and shapes, so two
checkpoints of a run get the same layout, and a delta between them stays possible. No byte of a
weight changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hotload.checkpoint.anatomy import Place, is_delta, natural_key, part_of, place_key
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.index_and_spec import build_index, build_spec, check_index
from hotload.checkpoint.model_config import is_head, is_tied
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.rules import FOREIGN_WEIGHT_SUFFIXES, check_full, refuse_errors
from hotload.checkpoint.safetensors import (
    DTYPE_BITS,
    SHARD_SUFFIX,
    SHARD_WARNING_BYTES,
    ShardHeader,
    TensorInfo,
    read_json_object,
    render_header,
)
from hotload.errors import Finding, InvalidCheckpointError, shorten

SINGLE_FILE = "model.safetensors"

_ENTRY_BYTES = 200  # of a header, beside the name of its tensor


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file of the source that the output does not have, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of a checkpoint directory by their part in the output."""

    shards: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class TiedHead:
    """A head, and the embeddings of its dtype and shape; (file, tensor) each."""

    head: tuple[str, TensorInfo]
    embeddings: tuple[tuple[str, TensorInfo], ...]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A file to write: its head, then each tensor's bytes from the source shard of that name."""

    header: ShardHeader
    head: bytes
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write.

    `tied_heads` are left out, if their bytes are a copy of the embeddings; `untold_heads` are kept,
    since config.json does not say whether they are tied.
    """

    shards: tuple[PlannedShard, ...]
    index: bytes
    spec: bytes
    tied_heads: tuple[TiedHead, ...]
    untold_heads: tuple[TiedHead, ...]
    dropped_metadata: tuple[str, ...]


def select_files(files: Iterable[str], index: bytes | None) -> Selection:
    """Sort the files into those that hold the weights, travel along, or stay behind.

    With an index the shards are those it lists, as for a loader; without one `model.safetensors`,
    or else every shard.

    Raises:
        InvalidCheckpointError: a LoRA, no shard at all, or `model.safetensors` beside an index that
        does not list it.
    """
    files = sorted(files)
    if ADAPTER_CONFIG_FILE in files:
        _refuse("adapter", ADAPTER_CONFIG_FILE, "a LoRA", "a full checkpoint; a LoRA stays as is")
    shards = [file for file in files if file.endswith(SHARD_SUFFIX)]
    if not shards:
        others = [file for file in files if file.endswith(FOREIGN_WEIGHT_SUFFIXES)]
        found = f"only {', '.join(others[:3])}" if others else "no such file"
        _refuse("missing_shard", f"*{SHARD_SUFFIX}", found, "weights in safetensors")
    taken = shards
    if index is not None:
        listed = set(map(str, _weight_map(index).values()))
        taken = [file for file in shards if file in listed]
        if SINGLE_FILE in shards and SINGLE_FILE not in listed:
            expected = f"one of the two: remove {SINGLE_FILE} or {INDEX_FILE}, whichever is old"
            _refuse("two_models", SINGLE_FILE, f"a file that {INDEX_FILE} does not list", expected)
    elif SINGLE_FILE in shards:
        taken = [SINGLE_FILE]
    rivals = INDEX_FILE if index is not None else SINGLE_FILE
    left_out = [LeftOut(file, f"not of {rivals}") for file in shards if file not in taken]
    side_files: list[str] = []
    for file in files:
        if file in shards or file in (INDEX_FILE, SPEC_FILE):
            continue
        if file.endswith(FOREIGN_WEIGHT_SUFFIXES):
            left_out.append(LeftOut(file, f"weights are read from {SHARD_SUFFIX} alone"))
        elif file.endswith(".index.json"):
            left_out.append(LeftOut(file, "index of weights in another format"))
        else:
            side_files.append(file)
    return Selection(tuple(taken), tuple(side_files), tuple(left_out))


def plan_relayout(
    shards: Sequence[ShardHeader],
    config: bytes | None,
    index: bytes | None,
    *,
    limit_bytes: int = SHARD_WARNING_BYTES,
) -> Plan:
    """Plan the shards to write; no file of more than one tensor reaches `limit_bytes`.

    A layer above it is spread over several files. With `tie_word_embeddings` a head is left out;
    its bytes are compared before that is done.

    Raises:
        InvalidCheckpointError: shards and index disagree, a tensor is there twice, it is a delta,
        a tied head has no embeddings of its dtype and shape, or the planned layout breaks a rule
        that moving tensors cannot mend. All findings of one kind at once.
    """
    if config is None:
        _refuse("missing_file", CONFIG_FILE, "no such file", "the model's configuration")
    settings = read_json_object(config, file=CONFIG_FILE)
    if is_delta(shards, None):
        _refuse("delta", shards[0].file, "payloads of a delta", "a full checkpoint")
    refuse_errors(_check_source(shards, index))
    tensors = [(shard.file, tensor) for shard in shards for tensor in shard.tensors]
    tied_heads = tuple(_heads(tensors)) if is_tied(settings) else ()
    refuse_errors(_untieable(tied_heads))
    untold_heads = tuple(_heads(tensors)) if is_tied(settings) is None else ()
    heads = {tied.head[1].name for tied in tied_heads}
    groups: dict[Place, list[tuple[str, TensorInfo]]] = {}
    for file, tensor in tensors:
        if tensor.name not in heads:
            groups.setdefault(place_key(tensor.name), []).append((file, tensor))
    contents = [one for key in sorted(groups) for one in _split(groups[key], limit_bytes)]
    shared, own, dropped_metadata = _metadata(shards)
    planned = []
    for number, content in enumerate(contents, start=1):
        name = f"model-{number:05d}-of-{len(contents):05d}{SHARD_SUFFIX}"
        planned.append(_planned(name, content, shared, own))
    headers = tuple(one.header for one in planned)
    written = {INDEX_FILE: build_index(headers), SPEC_FILE: build_spec(headers)}
    refuse_errors(check_full(Checkpoint(headers, {CONFIG_FILE: config, **written}, ())))
    return Plan(
        tuple(planned),
        written[INDEX_FILE],
        written[SPEC_FILE],
        tied_heads,
        untold_heads,
        dropped_metadata,
    )


def head_warning(tied: TiedHead, *, is_copy: bool, is_told: bool) -> Finding | None:
    """Say what is wrong with a head whose bytes were compared with the embeddings; None if nothing
    is.

    `is_told` says that config.json ties it.
    """
    file, head = tied.head
    names = ", ".join(shorten(tensor.name) for _, tensor in tied.embeddings)
    if is_told and not is_copy:
        expected = f"the bytes of {names}, or tie_word_embeddings: false in {CONFIG_FILE}"
        return Finding("tied_head", file, head.name, "other bytes", expected)
    if is_copy and not is_told:
        found = f"the bytes of {names}, and no tie_word_embeddings in {CONFIG_FILE}: it is kept"
        expected = "that field to be true, if the base model has no head"
        return Finding("tied_head", file, head.name, found, expected, severity="warning")
    return None


def _check_source(shards: Sequence[ShardHeader], index: bytes | None) -> Iterator[Finding]:
    if index is not None:
        yield from check_index(Checkpoint(tuple(shards), {}, ()), _weight_map(index))
        return
    places: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if (first := places.setdefault(tensor.name, shard.file)) != shard.file:
                found, expected = f"a tensor that is in {first}, too", "every tensor in one shard"
                yield Finding("duplicate_tensor", shard.file, tensor.name, found, expected)


def _weight_map(index: bytes) -> Mapping[str, Any]:
    document = read_json_object(index, file=INDEX_FILE)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        _refuse("weight_map", INDEX_FILE, shorten(weight_map), "an object 'weight_map'")
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "delta_encoding" in metadata:
        _refuse("delta", INDEX_FILE, "the index of a delta", "a full checkpoint")
    return weight_map


def _heads(tensors: Sequence[tuple[str, TensorInfo]]) -> Iterator[TiedHead]:
    embeddings = [(file, one) for file, one in tensors if part_of(one.name) == "embeddings"]
    for file, head in tensors:
        if is_head(head.name):
            form = head.dtype, head.shape
            alike = (one for one in embeddings if (one[1].dtype, one[1].shape) == form)
            yield TiedHead((file, head), tuple(alike))


def _untieable(heads: Iterable[TiedHead]) -> Iterator[Finding]:
    for tied in heads:
        file, head = tied.head
        if not tied.embeddings:
            found = f"{head.dtype} {shorten(list(head.shape))}, and no embeddings of that form"
            expected = f"embeddings to be tied to, or tie_word_embeddings: false in {CONFIG_FILE}"
            yield Finding("tied_head", file, head.name, found, expected)


def _split(
    content: Iterable[tuple[str, TensorInfo]], limit_bytes: int
) -> Iterator[list[tuple[str, TensorInfo]]]:
    piece: list[tuple[str, TensorInfo]] = []
    size = 0
    for source, tensor in sorted(content, key=lambda one: natural_key(one[1].name)):
        more = tensor.size_bytes + 6 * len(tensor.name) + _ENTRY_BYTES  # JSON escapes take 6
        if piece and size + more >= limit_bytes:
            yield piece
            piece, size = [], 0
        piece.append((source, tensor))
        size += more
    yield piece


def _metadata(
    shards: Sequence[ShardHeader],
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """What every file gets, what goes with the tensor it is named after, and what is dropped.

    Dropped are keys on which the source's shards disagree: no single value is true of them all.
    """
    own: dict[str, str] = {}
    values: dict[str, set[str]] = {}
    for shard in shards:
        for key, value in shard.metadata.items():
            if key in shard.by_name:
                own[key] = value
            else:
                values.setdefault(key, set()).add(value)
    shared = {key: min(found) for key, found in values.items() if len(found) == 1}
    return shared, own, tuple(sorted(values.keys() - shared.keys()))


def _planned(
    file: str,
    content: Sequence[tuple[str, TensorInfo]],
    shared: Mapping[str, str],
    own: Mapping[str, str],
) -> PlannedShard:
    # Widest elements first, as the safetensors library writes them: each tensor lies aligned.
    placed = sorted(content, key=lambda one: (-DTYPE_BITS[one[1].dtype], one[1].name))
    tensors, end = [], 0
    for _, tensor in placed:
        start, end = end, end + tensor.size_bytes
        tensors.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, start, end))
    metadata = {**shared, **{one.name: own[one.name] for one in tensors if one.name in own}}
    head = render_header(tensors, metadata)
    header = ShardHeader(file, tuple(tensors), metadata, len(head), len(head) + end)
    return PlannedShard(header, head, tuple(source for source, _ in placed))


def _refuse(
    rule: str, file: str, found: str, expected: str, *, tensor: str | None = None
) -> NoReturn:
    raise InvalidCheckpointError((Finding(rule, file, tensor, found, expected),))
