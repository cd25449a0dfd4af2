"""The client checks of wire-format §6 for full, delta and LoRA snapshots.

Values in, findings out. A finding of severity "warning" concerns what no public source settles: it
is shown and does not stop a publication. Names, shapes and dtypes come from shard headers, which
`hotload.shards.read_header` has already held to the size of the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from hotload.envelope import ARC_V2, Envelope
from hotload.errors import InvalidCheckpointError
from hotload.manifests import SpecDtypeStyle, check_index, check_spec
from hotload.model_config import check_base, check_config, check_quantization
from hotload.shards import (
    SHARD_SUFFIX,
    Checkpoint,
    Finding,
    ShardHeader,
    TensorInfo,
    read_json_object,
    shorten,
)
from hotload.snapshot import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE, FileDigest

SHARD_LIMIT_BYTES = 5_000_000_000  # documented "about 5 GB"; the unit is our decision
SHARD_WARNING_BYTES = 4_500_000_000

_LAYER = re.compile(r"(?:.*?\.)??(?:layers|blocks|block|h)\.\d+(?=\.|$)")
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|wpe|tok_embeddings|word_embeddings|embed_in)\."
)
_FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|norm_f|ln_f|final_layernorm|final_layer_norm)\.[^.]+$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_TENSOR_PARALLEL = re.compile(r"(?i)(?:^|[^a-z0-9])(?:mp_?rank|tp(?:_?rank)?)(?![a-z])")
FOREIGN_WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack")
_ADAPTER_SHARD = re.compile(r"adapter_model(?:-.+)?\.(?:safetensors|bin)")


def check_full(
    checkpoint: Checkpoint,
    *,
    base_config: Mapping[str, Any] | None = None,
    base_shapes: Mapping[str, tuple[int, ...] | None] | None = None,
    extra_fields_ignore: Collection[str] = (),
    spec_dtype_style: SpecDtypeStyle = "torch",
) -> tuple[Finding, ...]:
    """Every broken rule of a full snapshot (wire-format §6, protocol §10).

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
    for shard in checkpoint.shards:
        findings += _check_size(shard.file, shard.size_bytes)
        findings += _check_name(shard.file)
        findings += _check_layers(shard)
    findings += _check_foreign_weights(checkpoint)
    if config is not None:
        findings += check_quantization(checkpoint, config)
        if base_config is not None:
            findings += check_config(config, base_config, extra_fields_ignore)
        if base_shapes is not None:
            findings += check_base(checkpoint, config, base_shapes)
    return tuple(findings)


def check_lora(checkpoint: Checkpoint, *, base_model: str | None = None) -> tuple[Finding, ...]:
    """Every broken rule of a LoRA snapshot in PEFT format (wire-format §6, protocol §10).

    `base_model` is the name the service serves the base under; without it any name passes. Adapters
    in `.bin` are pickles, which nothing here opens: a warning says that they went unchecked.
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
        findings += _check_size(file.file, file.size_bytes)
        if file.file.endswith(".bin"):
            expected = "safetensors, which can be checked before the service opens it"
            finding = Finding("pickle", file.file, None, "a pickle", expected, severity="warning")
            findings.append(finding)
    for shard in checkpoint.shards:
        if shard not in adapters:
            expected = "only adapter_model shards beside adapter_config.json"
            findings.append(Finding("stray_shard", shard.file, None, "a shard", expected))
    findings += _check_adapter_tensors([shard for shard in checkpoint.shards if shard in adapters])
    return tuple(findings)


def check_delta(delta: Checkpoint, previous: Checkpoint) -> tuple[Finding, ...]:
    """Every broken rule of a delta snapshot on the layout it follows (wire-format §2, §6).

    The shards of `previous` and no other, the same tensors in each, payloads as vectors of U8, one
    decimal Adler-32 per tensor, every other file byte-equal. Whether the frames decode is for
    `hotload.codec` to say.
    """
    findings: list[Finding] = []
    if delta.is_lora:
        findings.append(
            _ours("adapter_in_delta", ADAPTER_CONFIG_FILE, None, "a file", "none in a delta")
        )
    shards, parents = _by_file(delta), _by_file(previous)
    for file in sorted(parents.keys() - shards.keys()):
        findings.append(
            _ours("missing_shard", file, None, "no such file", "every shard of previous")
        )
    for file in sorted(shards.keys() - parents.keys()):
        findings.append(_ours("stray_shard", file, None, "a shard", "only the shards of previous"))
    for file in sorted(shards.keys() & parents.keys()):
        findings += check_delta_shard(shards[file], parents[file])
        findings += _check_size(file, shards[file].size_bytes)
    for file in _changed_side_files(previous, delta):
        findings.append(_ours("side_file", file, None, "other bytes", "the bytes of previous"))
    return tuple(findings)


def check_delta_shard(delta: ShardHeader, base: ShardHeader) -> Iterator[Finding]:
    """Broken rules of a delta shard's header on the shard it applies to (wire-format §1, §2)."""
    for name in sorted(base.by_name.keys() - delta.by_name.keys()):
        yield _ours(
            "missing_tensor", delta.file, name, "no payload", "every tensor of the base shard"
        )
    for name in sorted(delta.by_name.keys() - base.by_name.keys()):
        yield _ours("extra_tensor", delta.file, name, "a payload", "only tensors of the base shard")
    for tensor in delta.tensors:
        yield from check_payload(delta, tensor, ARC_V2)


def check_payload(delta: ShardHeader, tensor: TensorInfo, envelope: Envelope) -> Iterator[Finding]:
    """Broken rules of one tensor in a delta shard's header (wire-format §1, §3)."""
    if tensor.dtype != "U8" or len(tensor.shape) != 1:
        found = f"{tensor.dtype} {shorten(list(tensor.shape))}"
        yield _ours("payload", delta.file, tensor.name, found, "U8 [bytes of the frame]")
    text = delta.metadata.get(tensor.name)
    if envelope.parse(text) is None:
        found = "no checksum" if text is None else shorten(text)
        expected = f"{envelope.described} in __metadata__"
        yield _ours("checksum", delta.file, tensor.name, found, expected)


def part_of(name: str) -> str | None:
    """What a file may hold one of: a layer by its prefix, "embeddings", "final norm" or "head".

    None for a tensor that belongs to no such part (wire-format §6).
    """
    if match := _LAYER.match(name):
        return match.group()
    if _EMBEDDINGS.search(name):
        return "embeddings"
    if _HEAD.search(name):
        return "head"
    return "final norm" if _FINAL_NORM.search(name) else None


def refuse_errors(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The warnings among the findings.

    Raises:
        InvalidCheckpointError: with the findings that are errors, if there are any.
    """
    findings = tuple(findings)
    if errors := tuple(finding for finding in findings if finding.severity == "error"):
        raise InvalidCheckpointError(errors)
    return findings


def drift(previous: Checkpoint, target: Checkpoint) -> str | None:
    """Why `target` cannot be a delta on `previous`; None when it can (wire-format §6, protocol
    §18).

    A delta needs the same shards holding the same tensors in the same order, and every other file
    byte-equal. Shard metadata may differ: the restored shard carries that of `previous`.
    """
    before, after = _by_file(previous), _by_file(target)
    if before.keys() != after.keys():
        return f"shard files changed: {_some(before.keys() ^ after.keys())}"
    for file in sorted(before):
        if reason := shard_drift(before[file], after[file]):
            return reason
    changed = _changed_side_files(previous, target)
    return f"files beside the shards changed: {_some(changed)}" if changed else None


def shard_drift(base: ShardHeader, target: ShardHeader) -> str | None:
    """Why one shard cannot be a delta on another, or None when it can."""
    if base.tensors == target.tensors:
        return None
    if base.by_name.keys() != target.by_name.keys():
        changed = base.by_name.keys() ^ target.by_name.keys()
        return f"tensors of {target.file} changed: {_some(changed)}"
    for name, old in base.by_name.items():
        new = target.by_name[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            was, now = f"{old.dtype} {list(old.shape)}", f"{new.dtype} {list(new.shape)}"
            return f"{name} in {target.file} changed from {was} to {now}"
    return f"order of tensors in {target.file} changed"


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


def _check_size(file: str, size_bytes: int) -> Iterator[Finding]:
    if size_bytes > SHARD_LIMIT_BYTES:
        expected = f"at most {SHARD_LIMIT_BYTES} bytes"
        yield Finding("shard_size", file, None, f"{size_bytes} bytes", expected)
    elif size_bytes >= SHARD_WARNING_BYTES:
        expected = f"well below {SHARD_LIMIT_BYTES} bytes: the documented limit is 'about 5 GB'"
        yield Finding("shard_size", file, None, f"{size_bytes} bytes", expected, severity="warning")


def _check_name(file: str) -> Iterator[Finding]:
    if _TENSOR_PARALLEL.search(file):
        expected = "whole tensors, and names without mp_rank or tp"
        yield Finding(
            "tensor_parallel", file, None, "the name of a tensor-parallel shard", expected
        )


def _check_layers(shard: ShardHeader) -> Iterator[Finding]:
    """One layer per file; embeddings, final norm and head count as a layer each (wire-format §6).

    Other tensors outside the layers have no rule: in company they are a warning.
    """
    parts: dict[str, str] = {}
    others: list[str] = []
    for tensor in shard.tensors:
        if part := part_of(tensor.name):
            parts.setdefault(part, tensor.name)
        else:
            others.append(tensor.name)
    if len(parts) > 1:
        expected = "one layer per file; embeddings, final norm and head each in a file of their own"
        name = parts[sorted(parts)[1]]
        yield Finding("one_layer", shard.file, name, _some(parts), expected)
    elif parts and others:
        expected = "a file of its own; the service's rule for such tensors is not documented"
        found = f"beside {min(parts)}"
        yield Finding("one_layer", shard.file, others[0], found, expected, severity="warning")


def _check_foreign_weights(checkpoint: Checkpoint) -> Iterator[Finding]:
    for side in checkpoint.side_files:
        if side.file.endswith(FOREIGN_WEIGHT_SUFFIXES):
            expected = (
                f"weights in {SHARD_SUFFIX} alone; this file would be uploaded and not loaded"
            )
            found = f"{side.size_bytes} bytes"
            yield Finding("foreign_weights", side.file, None, found, expected, severity="warning")


def _check_adapter_config(config: Mapping[str, Any], base_model: str | None) -> Iterator[Finding]:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or (base_model is not None and name != base_model):
        expected = f"base_model_name_or_path {shorten(base_model or 'of the served base model')}"
        yield Finding("base_model", ADAPTER_CONFIG_FILE, None, shorten(name), expected)
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


def _by_file(checkpoint: Checkpoint) -> dict[str, ShardHeader]:
    return {shard.file: shard for shard in checkpoint.shards}


def _changed_side_files(previous: Checkpoint, target: Checkpoint) -> list[str]:
    before = {side.file: side.sha256 for side in previous.side_files}
    after = {side.file: side.sha256 for side in target.side_files}
    names = before.keys() | after.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _ours(rule: str, file: str, tensor: str | None, found: str, expected: str) -> Finding:
    return Finding(rule, file, tensor, found, expected, who="publisher")
