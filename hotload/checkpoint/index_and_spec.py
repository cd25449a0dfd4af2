"""Index and weight spec: which tensor lies in which shard, and what it is (wire-format §6).

Both are rendered from shard headers and checked against them. Findings only; nothing is read or
written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.names import INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX, ShardHeader, name_obstacle
from hotload.errors import Finding, shorten

SpecDtypeStyle = Literal["torch", "safetensors"]

# How torch spells a safetensors dtype; it has no name for the two F6 formats.
TORCH_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


def build_index(shards: Iterable[ShardHeader]) -> bytes:
    """Build the `model.safetensors.index.json` of these shards: total size in bytes, file by tensor
    name.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for tensor in shard.tensors:
            weight_map[tensor.name] = shard.file
            total += tensor.size_bytes
    return _document({"metadata": {"total_size": total}, "weight_map": weight_map})


def build_spec(shards: Iterable[ShardHeader], style: SpecDtypeStyle = "torch") -> bytes:
    """Build the `model.weight.spec.json` of these shards: shape and dtype by tensor name; a scalar
    is [].
    """
    tensor_map = {
        tensor.name: {"shape": list(tensor.shape), "dtype": spell_dtype(tensor.dtype, style)}
        for shard in shards
        for tensor in shard.tensors
    }
    return _document({"tensor_map": tensor_map})


def spell_dtype(tag: str, style: SpecDtypeStyle) -> str:
    """Spell a safetensors dtype as the spec does; a dtype torch does not know keeps its tag."""
    return TORCH_DTYPES.get(tag, tag) if style == "torch" else tag


def check_places(
    shards: Sequence[ShardHeader], weight_map: Mapping[str, Any] | None
) -> Iterator[Finding]:
    """Check that every tensor is in one shard: the one that the index names, where there is an
    index."""
    if weight_map is not None:
        yield from check_index(Checkpoint(tuple(shards), {}, ()), weight_map)
        return
    places: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if (first := places.setdefault(tensor.name, shard.file)) != shard.file:
                found, expected = f"a tensor that is in {first}, too", "every tensor in one shard"
                yield Finding("duplicate_tensor", shard.file, tensor.name, found, expected)


def check_index(checkpoint: Checkpoint, weight_map: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that index and shards name each other: no file missing or stray, all key sets equal."""
    files = {shard.file: shard for shard in checkpoint.shards}
    mapped: dict[str, set[str]] = {}
    if not weight_map:
        yield Finding("empty_index", INDEX_FILE, None, "no tensor", "every tensor in weight_map")
    for name, file in weight_map.items():
        if isinstance(file, str) and file in mapped:  # thousands of tensors, few files
            mapped[file].add(name)
        elif reason := name_obstacle(file):
            expected = "a plain file name"
            yield Finding("file_name", INDEX_FILE, name, reason, expected)
        elif not file.endswith(SHARD_SUFFIX):
            expected = f"a file ending {SHARD_SUFFIX}"
            yield Finding("file_name", INDEX_FILE, name, shorten(file), expected)
        else:
            mapped[file] = {name}
    for file in sorted(mapped.keys() - files.keys()):
        found = f"no such file, though {len(mapped[file])} tensors are mapped to it"
        yield Finding(
            "missing_shard", file, min(mapped[file]), found, f"the file {INDEX_FILE} lists"
        )
    for file, shard in files.items():
        if file not in mapped:
            expected = f"only shards that {INDEX_FILE} lists"
            yield Finding("stray_shard", file, None, f"{len(shard.tensors)} tensors", expected)
            continue
        for name in sorted(mapped[file] - shard.by_name.keys()):
            expected = f"the tensor {INDEX_FILE} maps to this file"
            yield Finding("missing_tensor", file, name, "no such tensor", expected)
        for name in sorted(shard.by_name.keys() - mapped[file]):
            other = weight_map.get(name)
            if other is None:
                expected = f"an entry in {INDEX_FILE}"
                yield Finding("unindexed_tensor", file, name, "a tensor without entry", expected)
            else:
                found = f"a tensor mapped to {shorten(other)}"
                yield Finding("duplicate_tensor", file, name, found, "every tensor in one shard")


def check_spec(
    checkpoint: Checkpoint,
    weight_map: Mapping[str, Any],
    tensor_map: Mapping[str, Any],
    style: SpecDtypeStyle,
) -> Iterator[Finding]:
    """Check that the spec covers exactly the names of the index, with the headers' shapes and
    dtypes.

    Torch names, with or without `torch.`, and safetensors tags all count as equal; a spelling other
    than `style` is a warning, since no public source says which one the service reads.
    """
    for name in sorted(weight_map.keys() - tensor_map.keys()):
        expected = f"every name of {INDEX_FILE}"
        yield Finding("spec_missing", SPEC_FILE, name, "no entry", expected)
    for name in sorted(tensor_map.keys() - weight_map.keys()):
        expected = f"only names of {INDEX_FILE}"
        yield Finding("spec_extra", SPEC_FILE, name, "an entry", expected)
    spellings: dict[str, str] = {}
    for file, tensor in checkpoint.tensors:
        entry = tensor_map.get(tensor.name)
        if entry is None:
            continue
        if not isinstance(entry, dict) or not {"shape", "dtype"} <= entry.keys():
            expected = '{"shape": […], "dtype": "…"}'
            yield Finding("spec_entry", SPEC_FILE, tensor.name, shorten(entry), expected)
            continue
        shape = entry["shape"]
        # True and 1.0 equal 1 in Python; the type keeps them out.
        is_equal = shape == list(tensor.shape) and all(type(size) is int for size in shape)
        if not is_equal:
            expected = f"{shorten(list(tensor.shape))} as in {file}"
            yield Finding("spec_shape", SPEC_FILE, tensor.name, shorten(shape), expected)
        torch = spell_dtype(tensor.dtype, "torch")
        if entry["dtype"] not in (tensor.dtype, torch, f"torch.{torch}"):
            expected = f"{torch} ({tensor.dtype} in {file})"
            yield Finding("spec_dtype", SPEC_FILE, tensor.name, shorten(entry["dtype"]), expected)
        elif entry["dtype"] != spell_dtype(tensor.dtype, style):
            spellings.setdefault(entry["dtype"], tensor.name)
    for spelling, name in spellings.items():
        expected = f"{style} names; which spelling the service reads is not documented"
        yield Finding("spec_spelling", SPEC_FILE, name, spelling, expected, severity="warning")


def _document(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
