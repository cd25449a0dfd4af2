"""Safetensors headers: what a shard says it holds, read from bytes that may be hostile.

Nothing here opens a file. Read 8 bytes, ask `header_size` how many belong to the header, read
those, hand them to `read_header`. Every refusal is a `Finding` inside an `InvalidCheckpointError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from hotload.errors import Finding, InvalidCheckpointError, shorten

SHARD_LIMIT_BYTES = 5_000_000_000  # documented "about 5 GB"; the unit is our decision
SHARD_WARNING_BYTES = 4_500_000_000
HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library refuses longer ones
PREFIX_BYTES = 8
SHARD_SUFFIX = ".safetensors"
DEPTH_LIMIT = 64  # of JSON read here, so that nobody who walks it overflows the stack


# What is often found under the name of a shard: first bytes, what they begin, and the remedy.
_FOREIGN = (
    (b"version ", "a Git LFS pointer, not the file it stands for", "the file: git lfs pull"),
    (b"<", "an HTML or XML page", "the file: what was downloaded is a web page or an error"),
    (b"PK\3\4", "a zip archive, as torch.save writes", "weights from safetensors' save_file"),
    (b"\x80\2", "a pickle, as torch.save writes", "weights from safetensors' save_file"),
    (b"GGUF", "a GGUF file", "the model's safetensors files"),
    (b"\x89HDF", "an HDF5 file", "the model's safetensors files"),
    (b"\x1f\x8b", "a gzip archive", "the file unpacked"),
    (b'{"', "a JSON document", "the file: what was downloaded is an answer about it"),
    (bytes(PREFIX_BYTES), "zeros", "the file: a copy or download that never finished"),
)

# Bits per element of every dtype the format knows; F4 and F6 are packed without padding between
# elements.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a shard; `dtype` is the safetensors tag.

    `start` (inclusive) and `end` (exclusive) are byte offsets counted from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of raw storage."""
        return self.end - self.start


@dataclass(frozen=True)
class ShardHeader:
    """The header of one safetensors file: tensors in file order, without gaps between them."""

    file: str
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int
    size_bytes: int

    @cached_property
    def by_name(self) -> Mapping[str, TensorInfo]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}


def header_size(prefix: bytes, *, file: str, size_bytes: int) -> int:
    """Compute how many leading bytes of the file `read_header` needs, the 8-byte prefix included.

    `prefix` is the first 8 bytes, `size_bytes` the size of the file. The answer is never more than
    the file and never more than 100 MB, so a caller may allocate it.

    Raises:
        InvalidCheckpointError: the file is cut off or declares an impossible header.
    """
    if len(prefix) < PREFIX_BYTES:
        _refuse("truncated", file, None, f"{len(prefix)} bytes", "an 8-byte header length")
    for start, found, remedy in _FOREIGN:
        # Read as the length of a header, all of them are zero or far above the limit.
        if prefix.startswith(start) and not _is_possible(prefix):
            _refuse("not_safetensors", file, None, found, remedy)
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > HEADER_LIMIT_BYTES:
        limit = f"at most {HEADER_LIMIT_BYTES}"
        _refuse("header_too_large", file, None, f"header of {length} bytes", limit)
    if PREFIX_BYTES + length > size_bytes:
        found = f"header of {length} bytes in a file of {size_bytes}"
        _refuse("truncated", file, None, found, "a header that ends inside the file")
    return PREFIX_BYTES + length


def read_header(head: bytes, *, file: str, size_bytes: int) -> ShardHeader:
    """Read and check the header of a shard (wire-format §1, §6).

    `head` is the beginning of the file, at least `header_size` bytes; `size_bytes` the size of the
    file. Refused: duplicate keys, non-string metadata, unknown dtypes, a size other than dtype ×
    shape, offsets that overlap, leave gaps or leave the file, bytes after the last tensor.

    Raises:
        InvalidCheckpointError: with the first broken rule.
    """
    data_start = header_size(head[:PREFIX_BYTES], file=file, size_bytes=size_bytes)
    if len(head) < data_start:
        _refuse("truncated", file, None, f"{len(head)} bytes", f"the {data_start} of the header")
    text = head[PREFIX_BYTES:data_start]
    if text[:1] != b"{":
        _refuse("header_not_json", file, None, shorten(bytes(text[:16])), "a JSON object")
    entries = read_json_object(text, file=file)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the safetensors library takes null for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse("metadata", file, "__metadata__", shorten(metadata), "an object of strings")
    if not all(_is_utf8(text) for pair in metadata.items() for text in pair):
        _refuse("metadata", file, "__metadata__", shorten(metadata), "text that UTF-8 can hold")
    tensors = [_read_entry(name, entry, file) for name, entry in entries.items()]
    # Zero-element tensors share their start with the next one; they sort before it by their end.
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            rule = "overlap" if tensor.start < position else "gap"
            found = f"data_offsets [{tensor.start}, {tensor.end}]"
            _refuse(rule, file, tensor.name, found, f"a start at {position}")
        position = tensor.end
    if data_start + position != size_bytes:
        rule = "truncated" if data_start + position > size_bytes else "trailing_bytes"
        expected = f"{data_start + position}, header and tensors"
        _refuse(rule, file, None, f"a file of {size_bytes} bytes", expected)
    return ShardHeader(file, tuple(tensors), metadata, data_start, size_bytes)


def render_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Write the head of a safetensors file: length, compact JSON in the order given (wire-format
    §1).

    Padded with spaces to a multiple of 8.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def storage_bytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Compute the bytes a tensor occupies; None where dtype × shape is no whole number of bytes, or
    2^63 elements and more.

    Raises:
        KeyError: no such dtype.
    """
    elements = _element_count(shape)
    if elements is None or elements * DTYPE_BITS[dtype] % 8:
        return None
    return elements * DTYPE_BITS[dtype] // 8


def read_json_object(data: bytes, *, file: str) -> dict[str, Any]:
    """Parse the JSON object in `data`; duplicate keys, at any depth, are refused.

    Raises:
        InvalidCheckpointError: not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        value = json.loads(str(data, "utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        _refuse("json", file, None, "values nested too deeply", f"{DEPTH_LIMIT} levels at most")
    except (
        ValueError
    ) as error:  # also JSONDecodeError, UnicodeDecodeError, numbers of thousands of digits
        _refuse("json", file, None, shorten(str(error)), "valid JSON in UTF-8, every key once")
    if not isinstance(value, dict):
        _refuse("json", file, None, f"a {type(value).__name__}", "a JSON object")
    if not _is_shallow(value):
        _refuse("json", file, None, "values nested too deeply", f"{DEPTH_LIMIT} levels at most")
    return value


def name_obstacle(name: object) -> str | None:
    """Say why `name` is not a plain file name; None if it is.

    No separators, nothing unprintable, and no `?` or `#`, which object stores take for their own.
    """
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    if name in ("", ".", "..") or re.search(r"[/\\?#]", name) or not name.isprintable():
        return shorten(name)
    return None if _is_utf8(name) and len(name.encode()) <= 255 else shorten(name)


def check_size(file: str, size_bytes: int) -> Iterator[Finding]:
    """Hold a stored file to the service's limit, "about 5 GB" (wire-format §6)."""
    if size_bytes > SHARD_LIMIT_BYTES:
        expected = f"at most {SHARD_LIMIT_BYTES} bytes"
        yield Finding("shard_size", file, None, f"{size_bytes} bytes", expected)
    elif size_bytes >= SHARD_WARNING_BYTES:
        expected = f"well below {SHARD_LIMIT_BYTES} bytes: the documented limit is 'about 5 GB'"
        yield Finding("shard_size", file, None, f"{size_bytes} bytes", expected, severity="warning")


def first_names(names: Collection[str]) -> str:
    """Name the first three, and count the others."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _read_entry(name: str, entry: object, file: str) -> TensorInfo:
    if not _is_utf8(name):
        _refuse("tensor_name", file, name, shorten(name), "text that UTF-8 can hold")
    # Other keys are passed over, as the safetensors library does.
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _refuse("tensor_entry", file, name, shorten(entry), "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse("dtype", file, name, shorten(dtype), "a safetensors dtype")
    if not isinstance(shape, list) or not all(map(_is_natural, shape)):
        _refuse("shape", file, name, shorten(shape), "a list of sizes from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_natural, offsets)):
        _refuse("offsets", file, name, shorten(offsets), "[start, end] in bytes")
    start, end = offsets
    if _element_count(shape) is None:
        _refuse("shape", file, name, shorten(shape), "fewer than 2^63 elements")
    expected = storage_bytes(dtype, shape)
    if end < start or end - start != expected:
        size = "whole bytes" if expected is None else f"{expected} bytes"
        found = f"data_offsets [{start}, {end}]"
        _refuse("tensor_size", file, name, found, f"{size} for {dtype} {shorten(shape)}")
    return TensorInfo(name, dtype, tuple(shape), start, end)


def _is_possible(prefix: bytes) -> bool:
    return 0 < int.from_bytes(prefix[:PREFIX_BYTES], "little") <= HEADER_LIMIT_BYTES


def _element_count(shape: Iterable[int]) -> int | None:
    """None for 2^63 and more: the product of many dimensions would be one very large integer."""
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements >= 1 << 63:
            return None
    return elements


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {shorten(key)} twice")
        values[key] = value
    return values


def _is_shallow(value: object) -> bool:
    level = [value]
    for _ in range(DEPTH_LIMIT):
        inner = [node for node in level if isinstance(node, (dict, list))]
        if not inner:
            return True
        level = [child for node in inner for child in _children(node)]
    return False


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def _is_natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, legal in JSON
        return False
    return True


def _refuse(rule: str, file: str, tensor: str | None, found: str, expected: str) -> NoReturn:
    raise InvalidCheckpointError((Finding(rule, file, tensor, found, expected),))
