"""A plan that brings a checkpoint into the layout a service wants (wire-format §6).

Names, headers and documents in, plan out; `hotload.directory.relayout` carries it out. One layer a
file, embeddings, final norm and head each in a file of their own, every file below 5 GB, index and
spec to match. Which tensor goes where depends on nothing but names, dtypes and shapes, so two
checkpoints of a run get the same layout, and a delta between them stays possible. No byte of a
weight changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from hotload.checkpoint.anatomy import Place, find_parts, is_delta, natural_key
from hotload.checkpoint.checkpoint import Checkpoint, LeftOut
from hotload.checkpoint.index_and_spec import (
    SpecDtypeStyle,
    build_index,
    build_spec,
    check_places,
)
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.rules import check_full, refuse_errors
from hotload.checkpoint.safetensors import (
    DTYPE_BITS,
    SHARD_SUFFIX,
    SHARD_WARNING_BYTES,
    ShardHeader,
    TensorInfo,
    read_json_object,
    render_header,
)
from hotload.checkpoint.side_files import FOREIGN_WEIGHT_SUFFIXES, reason_to_leave_out
from hotload.checkpoint.tied_head import (
    TiedHead,
    check_forms,
    find_tied_heads,
    without_unwritten_heads,
)
from hotload.errors import Finding, InvalidCheckpointError, shorten

SINGLE_FILE = "model.safetensors"

_ENTRY_BYTES = 200  # of a header, beside the name of its tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of a checkpoint directory by their part in the output."""

    shards: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A file to write: its head, then each tensor's bytes, from a source shard by name and the
    tensor's place there."""

    header: ShardHeader
    head: bytes
    sources: tuple[tuple[str, TensorInfo], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write.

    Of `heads`, those that config.json ties are left out, if their bytes are a copy of the
    embeddings; `others` names tensors that were recognised as no part of a model.
    """

    shards: tuple[PlannedShard, ...]
    index: bytes
    spec: bytes
    heads: tuple[TiedHead, ...]
    others: tuple[str, ...]
    dropped_metadata: tuple[str, ...]


def select_files(
    files: Iterable[str], index: bytes | None, code: frozenset[str] = frozenset()
) -> Selection:
    """Sort the files into those that hold the weights, travel along, or stay behind.

    `code` names the modules that a server loads.

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
        if reason := reason_to_leave_out(file, code):
            left_out.append(LeftOut(file, reason))
        else:
            side_files.append(file)
    return Selection(tuple(taken), tuple(side_files), tuple(left_out))


def plan_relayout(
    shards: Sequence[ShardHeader],
    config: bytes | None,
    index: bytes | None,
    *,
    limit_bytes: int = SHARD_WARNING_BYTES,
    spec_dtype_style: SpecDtypeStyle = "torch",
) -> Plan:
    """Plan the shards to write; no file of more than one tensor reaches `limit_bytes`.

    A layer above it is spread over several files. With `tie_word_embeddings` a head is left out;
    its bytes are compared before that is done. A tensor that a header names as another name of one
    in its file (`save_model` of the safetensors library) is written as well.

    Raises:
        InvalidCheckpointError: shards and index disagree, a tensor is there twice, it is a delta,
        a tied head has no embeddings of its dtype and shape, or the planned layout breaks a rule
        that moving tensors cannot mend. All findings of one kind at once.
    """
    if config is None:
        _refuse("missing_file", CONFIG_FILE, "no such file", "the model's configuration")
    settings = read_json_object(config, file=CONFIG_FILE)
    weight_map = None if index is None else _weight_map(index)
    if is_delta(shards, None):
        _refuse("delta", shards[0].file, "payloads of a delta", "a full checkpoint")
    tensors = [(shard.file, tensor) for shard in shards for tensor in shard.tensors]
    if weight_map is not None:
        names = (tensor.name for _, tensor in tensors)
        weight_map = without_unwritten_heads(weight_map, names, settings)
    refuse_errors(check_places(shards, weight_map))
    aliases = _aliases(shards)
    tensors += aliases.values()
    parts = find_parts((tensor for _, tensor in tensors), settings)
    heads = find_tied_heads(tensors, parts, settings)
    refuse_errors(check_forms(heads))
    copies = {tied.head[1].name for tied in heads if tied.is_told}
    groups: dict[Place, list[tuple[str, TensorInfo]]] = {}
    for file, tensor in tensors:
        if tensor.name not in copies:
            groups.setdefault(parts.place(tensor.name), []).append((file, tensor))
    contents = [one for key in sorted(groups) for one in _split(groups[key], limit_bytes)]
    shared, own, dropped_metadata = _metadata(shards, aliases)
    planned = []
    for number, content in enumerate(contents, start=1):
        name = f"model-{number:05d}-of-{len(contents):05d}{SHARD_SUFFIX}"
        planned.append(_planned(name, content, shared, own))
    headers = tuple(one.header for one in planned)
    written = {INDEX_FILE: build_index(headers), SPEC_FILE: build_spec(headers, spec_dtype_style)}
    refuse_errors(check_full(Checkpoint(headers, {CONFIG_FILE: config, **written}, ())))
    return Plan(
        tuple(planned),
        written[INDEX_FILE],
        written[SPEC_FILE],
        heads,
        tuple(sorted(tensor.name for _, tensor in tensors if tensor.name not in parts.by_name)),
        dropped_metadata,
    )


def _aliases(shards: Sequence[ShardHeader]) -> dict[str, tuple[str, TensorInfo]]:
    """Find the further names of tensors: `save_model` writes one of those that share their bytes,
    and the others into the metadata, as the key of its name."""
    written = {tensor.name for shard in shards for tensor in shard.tensors}
    found: dict[str, tuple[str, TensorInfo]] = {}
    for shard in shards:
        for name, of in shard.metadata.items():
            if name in written or of not in shard.by_name:
                continue
            if name in found:
                twin, expected = found[name][0], "every tensor in one shard"
                _refuse("duplicate_tensor", shard.file, f"also in {twin}", expected, tensor=name)
            found[name] = shard.file, replace(shard.by_name[of], name=name)
    return found


def _weight_map(index: bytes) -> Mapping[str, Any]:
    document = read_json_object(index, file=INDEX_FILE)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        _refuse("weight_map", INDEX_FILE, shorten(weight_map), "an object 'weight_map'")
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "delta_encoding" in metadata:
        _refuse("delta", INDEX_FILE, "the index of a delta", "a full checkpoint")
    return weight_map


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
    shards: Sequence[ShardHeader], aliases: Collection[str]
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
            elif key not in aliases:
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
    return PlannedShard(header, head, tuple(placed))


def _refuse(
    rule: str, file: str, found: str, expected: str, *, tensor: str | None = None
) -> NoReturn:
    raise InvalidCheckpointError((Finding(rule, file, tensor, found, expected),))
