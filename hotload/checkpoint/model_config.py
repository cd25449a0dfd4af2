"""config.json against the base model, quantization, and what the base says the tensor set must be.

wire-format §6, protocol §10. Findings only; nothing is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import TensorInfo
from hotload.errors import Finding, shorten

QUANTIZATION = "quantization_config"

_LOW_PRECISION = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
_PACKED = re.compile(r"(?:weight_packed|qweight|_blocks)$")
# Tensors that only serve to dequantize another one.
_COMPANION = re.compile(
    r"(?:_scale|_scale_inv|_scale_2|_scales|\.scales|_zero_point|\.qzeros|\.g_idx|\.weight_shape)$"
)
_COMPANION_SUFFIXES = ("_scale_inv", "_scale", "_scales")


def check_config(
    config: Mapping[str, Any], base_config: Mapping[str, Any], ignored: Collection[str]
) -> Iterator[Finding]:
    """Find the differences from the base model's config.json that the service refuses (protocol
    §10).

    `ignored` are the top-level keys of `validation.extra_fields_ignore`. Only `quantization_config`
    may be extra.
    """
    advice = "; take the base value or list the field in extra_fields_ignore"
    ignored = {*ignored, QUANTIZATION}
    for key in sorted(base_config.keys() - config.keys() - ignored):
        expected = f"{shorten(base_config[key])} as in the base model{advice}"
        yield Finding("extra_base_config", CONFIG_FILE, None, f"no field {shorten(key)}", expected)
    for key in sorted(config.keys() - base_config.keys() - ignored):
        expected = f"only fields of the base model{advice}"
        yield Finding("extra_config", CONFIG_FILE, None, f"field {shorten(key)}", expected)
    for key in sorted((config.keys() & base_config.keys()) - ignored):
        found, base = config[key], base_config[key]
        if _canonical(found) != _canonical(base):
            rule = "config_value" if type(found) is type(base) else "config_type"
            expected = f"{shorten(base)} as in the base model{advice}"
            yield Finding(rule, CONFIG_FILE, None, f"{shorten(key)} = {shorten(found)}", expected)
    base_quantization = base_config.get(QUANTIZATION)
    if base_quantization is not None and config.get(QUANTIZATION) != base_quantization:
        # Allowed as an extra key; whether it may differ or be left out is in no public source.
        found = f"another {QUANTIZATION}" if QUANTIZATION in config else f"no {QUANTIZATION}"
        expected = "that of the base model, unless the service is known to convert"
        rule = "quantization_differs"
        yield Finding(rule, CONFIG_FILE, None, found, expected, severity="warning")


def check_quantization(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that quantized tensors have `quantization_config` and scales in the spec (wire-format
    §6).

    The spec names exactly the tensors of the shards (another check), so a scale in a shard is a
    scale in the spec.
    """
    names = {tensor.name for _, tensor in checkpoint.tensors}
    quantized = [(file, tensor) for file, tensor in checkpoint.tensors if _is_quantized(tensor)]
    settings = config.get(QUANTIZATION)
    if settings is not None and not (
        isinstance(settings, dict) and isinstance(settings.get("quant_method"), str)
    ):
        expected = "an object with a quant_method"
        yield Finding("quantization_config", CONFIG_FILE, None, shorten(settings), expected)
    if quantized and settings is None:
        file, tensor = quantized[0]
        found = f"{tensor.dtype}, and {len(quantized)} quantized tensors in all"
        expected = f"{QUANTIZATION} in {CONFIG_FILE}, or tensors that are not quantized"
        yield Finding("quantization_config", file, tensor.name, found, expected)
    if settings is not None and not quantized:
        found = f"{QUANTIZATION}, though no tensor is quantized"
        expected = "quantized tensors, or no such field"
        yield Finding("quantization_config", CONFIG_FILE, None, found, expected, severity="warning")
    for file, tensor in quantized:
        if names.isdisjoint(candidates := _companions(tensor.name)):
            expected = f"its scale in {file} and {SPEC_FILE}: one of {', '.join(candidates)}"
            yield Finding("missing_scale", file, tensor.name, f"{tensor.dtype} alone", expected)


def check_base(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    base_shapes: Mapping[str, tuple[int, ...] | None],
) -> Iterator[Finding]:
    """Check that the tensor set is the base model's, scales aside, and shapes where neither is
    packed.

    With `tie_word_embeddings` the head may be missing, and a copy of it is a warning.
    """
    base = {_plain(name): name for name in base_shapes if not _COMPANION.search(name)}
    found = {_plain(t.name): (f, t) for f, t in checkpoint.tensors if not _COMPANION.search(t.name)}
    tied = is_tied(config)
    for name in sorted(base.keys() - found.keys()):
        if not (tied and is_head(name)):
            expected = "every tensor of the base model"
            yield Finding("missing_tensor", INDEX_FILE, base[name], "no such tensor", expected)
    for name in sorted(found.keys() - base.keys()):
        file, tensor = found[name]
        if tied and is_head(name):
            expected = "no head, since the embeddings are tied and the base model has none"
            yield Finding("tied_head", file, tensor.name, "a head", expected, severity="warning")
        else:
            expected = "only tensors of the base model"
            yield Finding("extra_tensor", file, tensor.name, "a tensor", expected)
    for name in sorted(base.keys() & found.keys()):
        file, tensor = found[name]
        shape = base_shapes[base[name]]
        is_packed = bool(_PACKED.search(tensor.name) or _PACKED.search(base[name]))
        if shape is not None and not is_packed and tensor.shape != tuple(shape):
            expected = f"{shorten(tuple(shape))} as in the base model"
            yield Finding("base_shape", file, tensor.name, shorten(tensor.shape), expected)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Tell whether the model's head shares the bytes of its embeddings; None where unknown."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    declared = config.get("tie_word_embeddings", inner)
    return declared if isinstance(declared, bool) else None


def is_head(name: str) -> bool:
    """Tell whether this is the tensor that a tied head duplicates."""
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")


def _is_quantized(tensor: TensorInfo) -> bool:
    if _COMPANION.search(tensor.name):
        return False
    return tensor.dtype in _LOW_PRECISION or _PACKED.search(tensor.name) is not None


def _companions(name: str) -> tuple[str, ...]:
    if name.endswith(".qweight"):
        return (f"{name.removesuffix('qweight')}scales",)
    if name.endswith("_blocks"):
        return (f"{name.removesuffix('_blocks')}_scales",)
    stem = name.removesuffix("_packed")
    return tuple(f"{stem}{suffix}" for suffix in _COMPANION_SUFFIXES)


def _plain(name: str) -> str:
    """The name the tensor has where it is not packed."""
    if name.endswith(".qweight"):
        return f"{name.removesuffix('qweight')}weight"
    return name.removesuffix("_packed").removesuffix("_blocks")


def _canonical(value: object) -> str:
    """Text equal where JSON is: key order does not count, true is not 1, NaN is itself."""
    return json.dumps(value, sort_keys=True)
