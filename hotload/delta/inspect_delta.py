"""What a checkpoint or a delta is: its kind, and per layer how much there is and how much changed.

Facts from headers, documents and frames. A frame is decoded piece by piece and counted, so memory
does not grow with a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hotload.checkpoint.anatomy import OTHER, Place, part_of, place_key
from hotload.checkpoint.index_and_spec import TORCH_DTYPES
from hotload.checkpoint.safetensors import DTYPE_BITS, ShardHeader, storage_bytes
from hotload.delta.apply import Payload
from hotload.delta.frame import PIECE_BYTES, content_size, is_zero_frame, read_frame

# Safetensors dtype and shape.
Form = tuple[str, tuple[int, ...]]
_TAGS = {spelling: tag for tag, spelling in TORCH_DTYPES.items()} | {tag: tag for tag in DTYPE_BITS}


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor as it is loaded and as it is stored.

    `size_bytes` are its own, `stored_size_bytes` those of its frame in a delta. `dtype` is the
    safetensors tag; None in a delta that does not tell it, whose elements are then bytes.
    `changed_element_count` is None where nothing says what changed, as in a full checkpoint.
    """

    name: str
    file: str
    dtype: str | None
    size_bytes: int
    stored_size_bytes: int
    element_count: int
    changed_element_count: int | None


@dataclass(frozen=True, slots=True)
class PartFacts:
    """The tensors of one part, a layer or the embeddings, taken together."""

    part: str
    tensor_count: int
    size_bytes: int
    stored_size_bytes: int
    element_count: int
    changed_element_count: int | None

    @property
    def density(self) -> float | None:
        """Changed elements per element; None where nothing says what changed."""
        if self.changed_element_count is None:
            return None
        return self.changed_element_count / max(1, self.element_count)


def spec_forms(spec: Mapping[str, Any]) -> dict[str, Form]:
    """Read dtype and shape by tensor name from every entry of a spec that states them."""
    tensor_map = spec.get("tensor_map")
    forms: dict[str, Form] = {}
    for name, entry in tensor_map.items() if isinstance(tensor_map, dict) else ():
        if not isinstance(entry, dict):
            continue
        dtype, shape = entry.get("dtype"), entry.get("shape")
        tag = _TAGS.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else None
        if tag and isinstance(shape, list) and all(map(_is_natural, shape)):
            forms[name] = tag, tuple(shape)
    return forms


def plain_facts(shards: Iterable[ShardHeader]) -> Iterator[TensorFacts]:
    """List the tensors of a full checkpoint."""
    for shard in shards:
        for tensor in shard.tensors:
            yield TensorFacts(
                name=tensor.name,
                file=shard.file,
                dtype=tensor.dtype,
                size_bytes=tensor.size_bytes,
                stored_size_bytes=tensor.size_bytes,
                element_count=tensor.size_bytes // _element_bytes(tensor.dtype, tensor.size_bytes),
                changed_element_count=None,
            )


def delta_facts(name: str, payload: Payload, form: Form | None) -> TensorFacts:
    """Count what changed in a tensor: its frame is decoded, unless it says that nothing did.

    `form` is the tensor's dtype and shape as far as they are known.

    Raises:
        DeltaError: not one whole frame, or one of another size than the form's.
    """
    subject = f"{payload.file}: {name}"
    start, end = payload.start, payload.end
    size_bytes = content_size(payload.source, start, end, subject)
    dtype = None
    if form is not None and (expected := storage_bytes(*form)) is not None:
        dtype, size_bytes = form[0], expected
    element_bytes = _element_bytes(dtype, size_bytes)
    changed = 0
    if not is_zero_frame(payload.source, start, end, size_bytes):
        buffer = np.empty(min(PIECE_BYTES, size_bytes), np.uint8)
        for piece in read_frame(payload.source, start, end, size_bytes, buffer, subject):
            changed += int(np.count_nonzero(piece.view(f"u{element_bytes}")))
    return TensorFacts(
        name=name,
        file=payload.file,
        dtype=dtype,
        size_bytes=size_bytes,
        stored_size_bytes=end - start,
        element_count=size_bytes // element_bytes,
        changed_element_count=changed,
    )


def facts_by_part(tensors: Iterable[TensorFacts]) -> tuple[PartFacts, ...]:
    """Add the tensors up by part, in the order of a model."""
    groups: dict[Place, list[TensorFacts]] = {}
    for tensor in tensors:
        groups.setdefault(place_key(tensor.name), []).append(tensor)
    return tuple(
        total_facts(part_of(groups[key][0].name) or OTHER, groups[key]) for key in sorted(groups)
    )


def total_facts(part: str, tensors: Iterable[TensorFacts]) -> PartFacts:
    """Add the tensors up."""
    tensors = tuple(tensors)
    changes = [tensor.changed_element_count for tensor in tensors]
    known = [change for change in changes if change is not None]
    return PartFacts(
        part=part,
        tensor_count=len(tensors),
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        stored_size_bytes=sum(tensor.stored_size_bytes for tensor in tensors),
        element_count=sum(tensor.element_count for tensor in tensors),
        changed_element_count=sum(known) if known and len(known) == len(changes) else None,
    )


def _is_natural(size: object) -> bool:
    return type(size) is int and 0 <= size < 1 << 63


def _element_bytes(dtype: str | None, size_bytes: int) -> int:
    """Bytes per element; 1 where the dtype is packed or unknown."""
    element = 1 if dtype is None else DTYPE_BITS[dtype] // 8 or 1
    return 1 if size_bytes % element else element
