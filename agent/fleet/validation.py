"""What the service checks of a full or a LoRA during the signal (protocol §10, wire-format §6).

Written from the contract, not from the client's checks: the two are to find each other's mistakes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.loading.bucket import MissingObjectError, SnapshotBucket
from agent.loading.checkpoint_files import read_json, shard_names
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import (
    PREFIX_BYTES,
    SHARD_SUFFIX,
    ShardHeader,
    header_size,
    read_header,
)
from hotload.directory.shards import open_shard
from hotload.errors import InvalidCheckpointError

ADAPTER_PREFIX = "adapter_model"
TORCH_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "BOOL": "bool",
}
QUANTIZATION = "quantization_config"
# Endings of what only serves to dequantize another tensor, and of weights in packed form.
SCALES = re.compile(
    r"(_scale(_inv|_2|_global)?|[._]scales|\.scale|_zero_point|\.qzeros|[._]g_idx|\.weight_shape)$"
)
PACKED = re.compile(r"(?<=weight)_packed$|_blocks$")


class InvalidSnapshotError(ValueError):
    """The snapshot is refused; the text goes into the 400."""


@dataclass(frozen=True)
class BaseModel:
    """The model a service serves before any snapshot: its directory, config.json, tensor shapes."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, name: str, directory: Path) -> BaseModel:
        """Read the base model in `directory`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in shard_names(directory):
            with open_shard(directory / file) as shard:
                shapes |= {tensor.name: tensor.shape for tensor in shard.header.tensors}
        return cls(name, directory, read_json(directory / CONFIG_FILE), shapes)


def validate_full(
    bucket: SnapshotBucket,
    identity: str,
    files: Mapping[str, int],
    base: BaseModel | None,
    ignored: list[str],
    *,
    needs_spec: bool = True,
) -> None:
    """Return if the full snapshot `identity` may be loaded over `base`, where that is known.

    Raises:
        InvalidSnapshotError: with the first broken rule, in the vendor's words where known.
        MissingObjectError: a file is not there (yet).
    """
    config = _document(bucket, identity, files, CONFIG_FILE)
    if base is not None:
        validate_config(config, base.config, ignored)
    weight_map = _document(bucket, identity, files, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidSnapshotError(f"{INDEX_FILE}: weight_map is not an object with tensors")
    listed = set(map(str, weight_map.values()))
    stray = {name for name in files if name.endswith(SHARD_SUFFIX)} - listed
    if stray:
        raise InvalidSnapshotError(f"{min(stray)}: not listed in {INDEX_FILE}")
    headers = {name: _header(bucket, identity, files, name) for name in sorted(listed)}
    for name, header in headers.items():
        indexed = {tensor for tensor, file in weight_map.items() if file == name}
        differing = indexed ^ set(header.by_name)
        if differing:
            reason = f"{name}: tensor {min(differing)!r}: shard and {INDEX_FILE} disagree"
            raise InvalidSnapshotError(reason)
    if needs_spec or SPEC_FILE in files:
        _check_spec(_document(bucket, identity, files, SPEC_FILE), headers)
    is_quantized = _without_quantization(config) != config
    _check_scales(headers, is_quantized=is_quantized)
    if base is None:
        return
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    missing = _weights(base.shapes) - _weights(weight_map) - tied
    if missing:
        raise InvalidSnapshotError(f"tensor {min(missing)!r} of the base model is missing")
    extra = _weights(weight_map) - _weights(base.shapes) - tied
    if extra and not is_quantized:
        raise InvalidSnapshotError(f"tensor {min(extra)!r} is not of the base model")
    for header in headers.values():
        for tensor in header.tensors:
            expected = base.shapes.get(tensor.name, tensor.shape)
            if tensor.shape != expected and not is_quantized:
                reason = f"tensor {tensor.name!r}: shape {list(tensor.shape)}, base model has"
                raise InvalidSnapshotError(f"{reason} {list(expected)}")


def validate_config(config: Mapping[str, Any], base: Mapping[str, Any], ignored: list[str]) -> None:
    """Return if `config` is the base model's, but for ignored keys and `quantization_config`."""
    ignoring = {*ignored}
    config, base = _without_quantization(config), _without_quantization(base)
    lacking = base.keys() - config.keys() - ignoring
    if lacking:
        raise InvalidSnapshotError(f"Extra base model config options: {sorted(lacking)}")
    extra = config.keys() - base.keys() - ignoring
    if extra:
        raise InvalidSnapshotError(f"Extra snapshot model config options: {sorted(extra)}")
    for key in sorted(base.keys() - ignoring):
        if type(config[key]) is not type(base[key]):
            names = f"{type(config[key]).__name__} and {type(base[key]).__name__}"
            raise InvalidSnapshotError(f"Types mismatch for {key}: {names}")
        if config[key] != base[key]:
            raise InvalidSnapshotError(f"Config value mismatch for {key}")


def validate_lora(
    bucket: SnapshotBucket, identity: str, files: Mapping[str, int], base: BaseModel | None
) -> None:
    """Return if the adapter `identity` names `base` and holds readable weights.

    Raises:
        InvalidSnapshotError: with the first broken rule.
    """
    config = _document(bucket, identity, files, ADAPTER_CONFIG_FILE)
    named = config.get("base_model_name_or_path")
    if base and named not in (base.name, base.name.rpartition("/")[2], str(base.directory)):
        raise InvalidSnapshotError(
            f"{ADAPTER_CONFIG_FILE}: base_model_name_or_path {str(named)[:200]!r} "
            f"is not the served base model {base.name!r}"
        )
    adapters = [name for name in files if name.startswith(ADAPTER_PREFIX)]
    shards = [name for name in adapters if name.endswith(SHARD_SUFFIX)]
    if not shards:
        # Reading a .bin would mean unpickling what somebody uploaded.
        found = "only a pickle" if adapters else "none"
        raise InvalidSnapshotError(f"adapter_model.safetensors is needed, there is {found}")
    for name in shards:
        _header(bucket, identity, files, name)


def _check_scales(headers: Mapping[str, ShardHeader], *, is_quantized: bool) -> None:
    """Return if every tensor in FP8 or FP4 has `quantization_config` and a scale."""
    names = {name for header in headers.values() for name in header.by_name}
    for header in headers.values():
        for tensor in header.tensors:
            if not tensor.dtype.startswith(("F8", "F4")) or SCALES.search(tensor.name):
                continue
            if not is_quantized:
                reason = f"{tensor.dtype}, and no {QUANTIZATION} in {CONFIG_FILE}"
                raise InvalidSnapshotError(f"tensor {tensor.name!r}: {reason}")
            stem = PACKED.sub("", tensor.name)
            module = stem.rpartition(".")[0]
            scales = {f"{stem}_scale", f"{stem}_scale_inv", f"{stem}_scales", f"{module}.scale"}
            if names.isdisjoint(scales):
                raise InvalidSnapshotError(f"tensor {tensor.name!r}: {tensor.dtype} without scale")


def _weights(names: Iterable[str]) -> set[str]:
    """Names of the weights where none is packed, without what serves to dequantize them."""
    plain = (name.replace(".qweight", ".weight") for name in names if not SCALES.search(name))
    return {PACKED.sub("", name) for name in plain}


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave `quantization_config` out, of a composite model's parts, too."""
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != QUANTIZATION
    }


def _check_spec(spec: Mapping[str, Any], headers: Mapping[str, ShardHeader]) -> None:
    tensor_map = spec.get("tensor_map")
    if not isinstance(tensor_map, dict):
        raise InvalidSnapshotError(f"{SPEC_FILE}: tensor_map is not an object")
    tensors = {t.name: t for header in headers.values() for t in header.tensors}
    differing = tensors.keys() ^ tensor_map.keys()
    if differing:
        raise InvalidSnapshotError(f"{SPEC_FILE}: tensor {min(differing)!r}: not in both")
    for name, entry in tensor_map.items():
        tensor = tensors[name]
        torch_name = TORCH_DTYPES.get(tensor.dtype, tensor.dtype)
        if not isinstance(entry, dict) or entry.get("shape") != list(tensor.shape):
            raise InvalidSnapshotError(
                f"{SPEC_FILE}: tensor {name!r}: shape differs from the shard"
            )
        # Which of the three spellings the service reads is in no public source.
        if entry.get("dtype") not in (tensor.dtype, torch_name, f"torch.{torch_name}"):
            raise InvalidSnapshotError(
                f"{SPEC_FILE}: tensor {name!r}: dtype differs from the shard"
            )


def _document(
    bucket: SnapshotBucket, identity: str, files: Mapping[str, int], name: str
) -> dict[str, Any]:
    if name not in files:
        raise MissingObjectError(f"{name} is missing")
    try:
        value = json.loads(bucket.read(identity, name))
    except (ValueError, RecursionError):
        raise InvalidSnapshotError(f"{name} is not JSON") from None
    if not isinstance(value, dict):
        raise InvalidSnapshotError(f"{name} is not a JSON object")
    return value


def _header(
    bucket: SnapshotBucket, identity: str, files: Mapping[str, int], name: str
) -> ShardHeader:
    size = files.get(name)
    if size is None:
        raise MissingObjectError(f"{name} is listed in {INDEX_FILE} and missing")
    try:
        prefix = bucket.read(identity, name, 0, min(PREFIX_BYTES, size))
        head = bucket.read(identity, name, 0, header_size(prefix, file=name, size_bytes=size))
        return read_header(head, file=name, size_bytes=size)
    except InvalidCheckpointError as error:
        raise InvalidSnapshotError(str(error)) from None
