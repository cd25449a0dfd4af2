"""Tensors that a trainer holds, read as the shard that is served has them: without a copy."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from hotload.checkpoint.safetensors import DTYPE_BITS, ShardHeader, TensorInfo
from hotload.delta.libzstd import ByteArray
from hotload.errors import Finding, InvalidCheckpointError

# What numpy, torch, jax and ml_dtypes call the dtypes of safetensors.
DTYPE_TAGS = {
    "bool": "BOOL",
    "complex64": "C64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
UNKNOWN_TO_NUMPY = frozenset(tag for tag in DTYPE_TAGS.values() if tag.startswith(("BF", "F8")))
DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "CUDA managed"}
CONTIGUOUS = "a contiguous tensor: copy it first"
IN_SERVED = "a tensor of that name: the shard that is served has one"
NOT_IN_SERVED = "none of that name: the shard that is served has none"
ON_CPU = frozenset({1, 3})  # 3: memory of the CPU's, pinned


class TensorShard:
    """The shard that tensors make behind a head (`hotload.delta.byte_io.Readable`); any thread may
    read.

    Args:
        head: header of the shard as it is served, with its first eight bytes.
        header: the same, parsed; the tensors have its names, dtypes and shapes.
        tensors: by name: whatever has a buffer or `__dlpack__`, on the CPU, contiguous.

    Raises:
        InvalidCheckpointError: other tensors, dtypes or shapes, or bytes that are not here; every
            finding names a tensor.
    """

    def __init__(self, head: bytes, header: ShardHeader, tensors: Mapping[str, object]) -> None:
        missing = sorted(header.by_name.keys() - tensors.keys())
        extra = sorted(tensors.keys() - header.by_name.keys())
        findings = [
            *(Finding("missing_tensor", header.file, one, "none", IN_SERVED) for one in missing),
            *(
                Finding("extra_tensor", header.file, one, "a tensor", NOT_IN_SERVED)
                for one in extra
            ),
        ]
        parts: list[ByteArray] = [np.frombuffer(head, np.uint8)]
        for tensor in () if findings else header.tensors:
            try:
                parts.append(bytes_of(tensors[tensor.name], tensor, header.file))
            except InvalidCheckpointError as error:
                findings += error.findings
        if findings:
            raise InvalidCheckpointError(tuple(findings))
        self._parts = [part for part in parts if part.size]
        self._starts = [0, *np.cumsum([part.size for part in self._parts]).tolist()]

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on."""
        room, filled = np.frombuffer(view, np.uint8), 0
        while filled < room.size:
            at = offset + filled
            number = bisect_right(self._starts, at) - 1
            begin = at - self._starts[number]
            piece = self._parts[number][begin : begin + room.size - filled]
            room[filled : filled + piece.size] = piece  # copied without the interpreter's lock
            filled += piece.size


def bytes_of(value: object, tensor: TensorInfo, file: str) -> ByteArray:
    """View the storage of `value`, which is to be `tensor` of a shard: u8 [bytes].

    numpy has no bf16 and no fp8: their bits are taken as unsigned integers of that width.

    Raises:
        InvalidCheckpointError: not on the CPU, not contiguous, or of another dtype or shape.
    """
    given: Any = value

    def refuse(rule: str, found: str, expected: str) -> NoReturn:
        raise InvalidCheckpointError((Finding(rule, file, tensor.name, found, expected),))

    if hasattr(given, "__dlpack_device__"):
        try:
            device = int(given.__dlpack_device__()[0])
        except (BufferError, RuntimeError, ValueError) as error:
            refuse("device", str(error)[:200], "a tensor on the CPU")
        if device not in ON_CPU:
            found = f"on {DEVICES.get(device, f'a device of DLPack type {device}')}"
            refuse("device", found, "a tensor on the CPU: copy it there first")
    elif not isinstance(given, np.ndarray):
        try:
            given = np.asarray(memoryview(given))
        except (TypeError, ValueError) as error:
            found = f"{type(given).__name__}: {str(error)[:200]}"
            refuse("buffer", found, "a tensor with `__dlpack__` or a buffer")
    name = str(given.dtype).removeprefix("torch.")
    tag, shape = DTYPE_TAGS.get(name, name), tuple(given.shape)
    bits = f"U{DTYPE_BITS[tensor.dtype]}" if tensor.dtype in UNKNOWN_TO_NUMPY else None
    if tag not in (tensor.dtype, bits):
        refuse("dtype", tag, f"{tensor.dtype}, as served")
    if shape != tensor.shape:
        refuse("shape", str(list(shape)), f"{list(tensor.shape)}, as served")
    if hasattr(given, "is_contiguous") and not given.is_contiguous():  # torch
        refuse("contiguous", f"strides {list(given.stride())} of elements", CONTIGUOUS)
    try:
        array = given if isinstance(given, np.ndarray) else _from_dlpack(given)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        refuse("buffer", str(error)[:200], "storage that numpy can view")
    if not array.flags.c_contiguous:
        refuse("contiguous", f"strides {list(array.strides)} of bytes", CONTIGUOUS)
    return array.reshape(-1).view(np.uint8)


def _from_dlpack(given: Any) -> np.ndarray[Any, Any]:
    """View a tensor of another library; torch's own bits, since DLPack of bf16 is none of
    numpy's."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        given = given.detach().reshape(-1).view(torch.uint8)
    return np.from_dlpack(given)
