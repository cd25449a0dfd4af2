"""The client checks of wire-format §6 for full, delta and LoRA snapshots.

Values in, findings out. A finding of severity "warning" concerns what no public source settles: it
is shown and does not stop a publication. Names, shapes and dtypes come from shard headers, which
`hotload.checkpoint.safetensors.read_header` has already held to the size of the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from hotload.checkpoint.anatomy import Parts, find_parts
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.completeness import check_complete
from hotload.checkpoint.index_and_spec import SpecDtypeStyle, check_index, check_spec
from hotload.checkpoint.model_config import check_base, check_config
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.quantization import check_quantization
from hotload.checkpoint.safetensors import (
    ShardHeader,
    TensorInfo,
    check_size,
    first_names,
    read_json_object,
)
from hotload.errors import Finding, InvalidCheckpointError, shorten
from hotload.records import FileDigest

_TENSOR_PARALLEL = re.compile(r"(?i)(?:^|[^a-z0-9])(?:mp_?rank|tp(?:_?rank)?)(?![a-z])")
_ADAPTER_SHARD = re.compile(r"adapter_model(?:-.+)?\.(?:safetensors|bin)")


def check_full(
    checkpoint: Checkpoint,
    *,
    base_config: Mapping[str, Any] | None = None,
    base_shapes: Mapping[str, tuple[int, ...] | None] | None = None,
    extra_fields_ignore: Collection[str] = (),
    spec_dtype_style: SpecDtypeStyle = "torch",
) -> tuple[Finding, ...]:
    """Collect every broken rule of a full snapshot (wire-format §6, protocol §10).

    `base_config` is the served base model's config.json and `base_shapes` its tensors by name, a
    shape being None where only an index is known; what is not given is not compared. A spec that
    spells dtypes in another style than `spec_dtype_style` is a warning.
    """
    findings: list[Finding] = []
    if checkpoint.is_lora:
        expected = "no such file: its presence alone makes the service load a LoRA"
        findings.append(Finding("adapter_in_full", ADAPTER_CONFIG_FILE, None, "a file", expected))
    config = _document(checkpoint, CONFIG_FILE, findings)
    weight_map = _member(
        _document(checkpoint, INDEX_FILE, findings), "weight_map", INDEX_FILE, findings
    )
    tensor_map = _member(
        _document(checkpoint, SPEC_FILE, findings), "tensor_map", SPEC_FILE, findings
    )
    if weight_map is not None:
        findings += check_index(checkpoint, weight_map)
        if tensor_map is not None:
            findings += check_spec(checkpoint, weight_map, tensor_map, spec_dtype_style)
    parts = find_parts((tensor for _, tensor in checkpoint.tensors), config or {})
    for shard in checkpoint.shards:
        findings += check_size(shard.file, shard.size_bytes)
        findings += _check_name(shard.file)
        findings += _check_layers(shard, parts)
    findings += _check_left_out(checkpoint)
    if config is not None:
        findings += check_complete(parts, config)
        findings += check_quantization(tuple(checkpoint.tensors), config)
        if base_config is not None:
            findings += check_config(config, base_config, extra_fields_ignore)
        if base_shapes is not None:
            findings += check_base(checkpoint, config, base_shapes, parts)
    return tuple(findings)


def check_lora(checkpoint: Checkpoint, *, base_model: str | None = None) -> tuple[Finding, ...]:
    """Collect every broken rule of a LoRA snapshot in PEFT format (wire-format §6, protocol §10).

    `base_model` is the name the service serves the base under; without it any name passes here, and
    the cycle asks the service. Adapters in `.bin` are pickles, which nothing here opens: a warning
    says that they went unchecked.
    """
    findings: list[Finding] = []
    config = _document(checkpoint, ADAPTER_CONFIG_FILE, findings)
    if config is not None:
        findings += _check_adapter_config(config, base_model)
    files: list[ShardHeader | FileDigest] = [*checkpoint.shards, *checkpoint.side_files]
    adapters = [file for file in files if _ADAPTER_SHARD.fullmatch(file.file)]
    if not adapters:
        expected = "adapter_model.safetensors, adapter_model-*.safetensors or adapter_model.bin"
        findings.append(
            Finding("missing_adapter", ADAPTER_CONFIG_FILE, None, "no weights", expected)
        )
    for file in adapters:
        findings += check_size(file.file, file.size_bytes)
        if file.file.endswith(".bin"):
            expected = "safetensors, which can be checked before the service opens it"
            finding = Finding("pickle", file.file, None, "a pickle", expected, severity="warning")
            findings.append(finding)
    findings += _check_left_out(checkpoint)
    for shard in checkpoint.shards:
        if shard not in adapters:
            expected = "only adapter_model shards beside adapter_config.json"
            findings.append(Finding("stray_shard", shard.file, None, "a shard", expected))
    findings += _check_adapter_tensors([shard for shard in checkpoint.shards if shard in adapters])
    return tuple(findings)


def check_adapted_model(name: str, base_model: str) -> Iterator[Finding]:
    """Check that an adapter's `base_model_name_or_path` is the model that a service serves.

    Hubs, directories and services write one model under several names: where only the spelling
    differs, `Qwen/Qwen3-8B` for `accounts/fireworks/models/qwen3-8b`, a warning says so.
    """
    if name == base_model:
        return
    is_alike = _model_id(name) == _model_id(base_model)
    expected = f"{shorten(base_model)}, the model that the service serves"
    if is_alike:
        expected += "; which spellings of it the service reads is not documented"
    found = f"an adapter of {shorten(name)}"
    severity: Literal["error", "warning"] = "warning" if is_alike else "error"
    yield Finding("base_model", ADAPTER_CONFIG_FILE, None, found, expected, severity=severity)


def _model_id(name: str) -> str:
    """The last part of a model's name; resource names have no dot and no capital."""
    return name.rstrip("/").rpartition("/")[2].casefold().replace(".", "p")


def refuse_errors(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Raise the findings that are errors; return those that are warnings.

    Raises:
        InvalidCheckpointError: with the findings that are errors, if there are any.
    """
    findings = tuple(findings)
    if errors := tuple(finding for finding in findings if finding.severity == "error"):
        raise InvalidCheckpointError(errors)
    return findings


def _document(checkpoint: Checkpoint, file: str, findings: list[Finding]) -> dict[str, Any] | None:
    data = checkpoint.documents.get(file)
    if data is None:
        findings.append(Finding("missing_file", file, None, "no such file", "a JSON object"))
        return None
    try:
        return read_json_object(data, file=file)
    except InvalidCheckpointError as error:
        findings += error.findings
        return None


def _member(
    document: dict[str, Any] | None, key: str, file: str, findings: list[Finding]
) -> dict[str, Any] | None:
    if document is None:
        return None
    value = document.get(key)
    if not isinstance(value, dict):
        findings.append(Finding(key, file, None, shorten(value), f"an object {key!r}"))
        return None
    return value


def _check_name(file: str) -> Iterator[Finding]:
    if _TENSOR_PARALLEL.search(file):
        expected = "whole tensors, and names without mp_rank or tp"
        yield Finding(
            "tensor_parallel", file, None, "the name of a tensor-parallel shard", expected
        )


def _check_layers(shard: ShardHeader, places: Parts) -> Iterator[Finding]:
    """One layer per file; embeddings, final norm and head count as a layer each (wire-format §6).

    Other tensors outside the layers have no rule: in company they are a warning.
    """
    parts: dict[str, str] = {}
    others: list[str] = []
    for tensor in shard.tensors:
        if part := places.by_name.get(tensor.name):
            parts.setdefault(part, tensor.name)
        else:
            others.append(tensor.name)
    if len(parts) > 1:
        expected = "one layer per file; embeddings, final norm and head each in a file of their own"
        name = parts[sorted(parts)[1]]
        yield Finding("one_layer", shard.file, name, first_names(parts), expected)
    elif parts and others:
        expected = "a file of its own; the service's rule for such tensors is not documented"
        found = f"beside {min(parts)}"
        yield Finding("one_layer", shard.file, others[0], found, expected, severity="warning")


def _check_left_out(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Warn of what is not published, each reason once."""
    files: dict[str, list[str]] = {}
    for one in checkpoint.left_out:
        name = one.file if one.file.isprintable() else shorten(one.file)
        files.setdefault(one.reason, []).append(name)
    for reason, names in files.items():
        found, expected = f"not published: {reason}", "only what a server reads"
        yield Finding("left_out", first_names(names), None, found, expected, severity="warning")


def _check_adapter_config(config: Mapping[str, Any], base_model: str | None) -> Iterator[Finding]:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        expected = f"base_model_name_or_path {shorten(base_model or 'of the served base model')}"
        yield Finding("base_model", ADAPTER_CONFIG_FILE, None, shorten(name), expected)
    elif base_model is not None:
        yield from check_adapted_model(name, base_model)
    if config.get("peft_type") != "LORA":
        found = f"peft_type {shorten(config.get('peft_type'))}"
        yield Finding("peft_type", ADAPTER_CONFIG_FILE, None, found, "LORA")
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        yield Finding(
            "rank", ADAPTER_CONFIG_FILE, None, f"r = {shorten(rank)}", "a rank of 1 or more"
        )


def _check_adapter_tensors(shards: Iterable[ShardHeader]) -> Iterator[Finding]:
    """Every A has its B, and the rank between them is one (PEFT's `lora_A`, `lora_B`)."""
    tensors: dict[str, tuple[str, TensorInfo]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                found = f"also in {tensors[tensor.name][0]}"
                yield Finding("duplicate_tensor", shard.file, tensor.name, found, "one place")
            tensors[tensor.name] = (shard.file, tensor)
    for name, (file, tensor) in tensors.items():
        if ".lora_A." not in name and ".lora_B." not in name:
            continue
        swap = ("_A.", "_B.") if ".lora_A." in name else ("_B.", "_A.")
        partner = tensors.get(name.replace(f".lora{swap[0]}", f".lora{swap[1]}"))
        if partner is None:
            yield Finding("lora_pair", file, name, "no partner", f"its lora{swap[1][:2]}")
        elif swap[0] == "_A." and (rank := tensor.shape[:1]) != partner[1].shape[1:2]:
            found = f"rank {list(rank)}, partner {shorten(list(partner[1].shape))}"
            yield Finding("lora_rank", file, name, found, "A [rank, in] and B [out, rank]")
