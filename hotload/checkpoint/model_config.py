"""config.json against the base model, and what the base says the tensor set must be.

wire-format §6, protocol §10. Findings only; nothing is read here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hotload.checkpoint.anatomy import Parts, is_name_of_head
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.meaning import canonical_text, key_means_same
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE
from hotload.checkpoint.quantization import is_companion, is_packed, plain_name, plain_shape
from hotload.checkpoint.safetensors import read_json_object
from hotload.checkpoint.sub_configs import QUANTIZATION, is_tied, quantization_settings
from hotload.errors import Finding, shorten


def check_config(
    config: Mapping[str, Any], base_config: Mapping[str, Any], ignored: Collection[str]
) -> Iterator[Finding]:
    """Find the differences from the base model's config.json that the service refuses (protocol
    §10).

    `ignored` are the top-level keys of `validation.extra_fields_ignore`. Only `quantization_config`
    may be extra, in a sub-config too. What means the same in other words is a warning.
    """
    plain, base = _without_quantization(config), _without_quantization(base_config)
    for key in sorted((plain.keys() | base.keys()) - {*ignored}):
        if key in plain and key in base and canonical_text(plain[key]) == canonical_text(base[key]):
            continue
        if key not in plain:
            rule, found = "extra_base_config", f"no field {shorten(key)}"
            expected = f"{shorten(base[key])} as in the base model"
        elif key not in base:
            rule, found = "extra_config", f"field {shorten(key)}"
            expected = "only fields of the base model"
        else:
            is_alike = type(plain[key]) is type(base[key])
            rule = "config_value" if is_alike else "config_type"
            found = f"{shorten(key)} = {shorten(plain[key])}"
            expected = f"{shorten(base[key])} as in the base model"
        if key_means_same(key, plain, base):
            expected += "; it means the same in the words of another library version"
            yield Finding(rule, CONFIG_FILE, None, found, expected, severity="warning")
            continue
        expected += (
            "; take the base value (hotload doctor --config-from BASE) or list the field in "
            "extra_fields_ignore"
        )
        yield Finding(rule, CONFIG_FILE, None, found, expected)
    settings, base_settings = quantization_settings(config), quantization_settings(base_config)
    if base_settings and settings != base_settings:
        # Allowed as an extra key; whether it may differ or be left out is in no public source.
        found = f"another {QUANTIZATION}" if settings else f"no {QUANTIZATION}"
        expected = "that of the base model, unless the service is known to convert"
        rule = "quantization_differs"
        yield Finding(rule, CONFIG_FILE, None, found, expected, severity="warning")


def take_config(config: bytes, base_config: bytes) -> tuple[bytes, tuple[Finding, ...]]:
    """Make the config.json of the base model the checkpoint's; warns of all that it changes.

    `quantization_config` stays the checkpoint's own, as its tensors are.

    Raises:
        InvalidCheckpointError: one of the two is no JSON object.
    """
    own = read_json_object(config, file=CONFIG_FILE)
    base = read_json_object(base_config, file=f"base {CONFIG_FILE}")
    changed = [
        Finding(
            "config_taken", CONFIG_FILE, None, one.found, one.expected.partition(";")[0],
            severity="warning",
        )
        for one in check_config(own, base, ())
        if one.severity == "error"
    ]  # fmt: skip
    if quantization_settings(own) == quantization_settings(base):
        return base_config, tuple(changed)
    mixed = _with_quantization(_without_quantization(base), own)
    return json.dumps(mixed, indent=2).encode() + b"\n", tuple(changed)


def check_base(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    base_shapes: Mapping[str, tuple[int, ...] | None],
    parts: Parts,
) -> Iterator[Finding]:
    """Check that the tensor set is the base model's, scales aside, and shapes where neither is
    packed.

    With `tie_word_embeddings` the head may be missing, and a copy of it is a warning.
    """
    names = {tensor.name for _, tensor in checkpoint.tensors}
    base = {plain_name(name): name for name in base_shapes if not is_companion(name, base_shapes)}
    found = {
        plain_name(tensor.name): (file, tensor)
        for file, tensor in checkpoint.tensors
        if not is_companion(tensor.name, names)
    }
    tied, heads = is_tied(config), {one.name for one in parts.heads}
    for name in sorted(base.keys() - found.keys()):
        if not (tied and is_name_of_head(name)):
            expected = "every tensor of the base model"
            yield Finding("missing_tensor", INDEX_FILE, base[name], "no such tensor", expected)
    for name in sorted(found.keys() - base.keys()):
        file, tensor = found[name]
        if tied and name in heads:
            expected = "no head, since the embeddings are tied and the base model has none"
            yield Finding("tied_head", file, tensor.name, "a head", expected, severity="warning")
        else:
            expected = "only tensors of the base model"
            yield Finding("extra_tensor", file, tensor.name, "a tensor", expected)
    for name in sorted(base.keys() & found.keys()):
        file, tensor = found[name]
        shape = base_shapes[base[name]]
        if shape is None or is_packed(tensor.name) or is_packed(base[name]):
            continue
        if tuple(shape) not in (tensor.shape, plain_shape(tensor)):
            expected = f"{shorten(tuple(shape))} as in the base model"
            yield Finding("base_shape", file, tensor.name, shorten(tensor.shape), expected)


def _with_quantization(config: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Put the quantization settings of `source` where it has them."""
    for key, value in source.items():
        if key == QUANTIZATION:
            config[key] = value
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            _with_quantization(config[key], value)
    return config


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != QUANTIZATION
    }
