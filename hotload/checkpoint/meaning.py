"""Whether two JSON documents mean the same, however a library has spelled them.

transformers saves config.json and tokenizer_config.json again with each checkpoint, and versions
differ in their words: `torch_dtype` became `dtype`, rope_* moved into `rope_parameters`, null comes
and goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ROPE = "rope_parameters"
_RENAMED = {
    "torch_dtype": "dtype",
    "additional_special_tokens": "extra_special_tokens",
    "rotary_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
}
_ROPE_OBJECTS = ("rope_scaling", _ROPE)
_OF_ROPE = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", *_ROPE_OBJECTS}
# Where a file was loaded from, and what wrote it: nothing of the model.
_OF_THE_WRITER = {
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "is_local",
    "local_files_only",
    "backend",
}


def means_same(one: object, other: object) -> bool:
    """Tell whether two JSON values mean the same."""
    return canonical_text(_meaning(one)) == canonical_text(_meaning(other))


def key_means_same(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether what two objects say by `key`, or by its other spellings, means the same."""
    place = _RENAMED.get(key, key)
    place = _ROPE if place in _OF_ROPE else place
    texts = {canonical_text(_in_one_wording(each).get(place)) for each in (one, other)}
    return len(texts) == 1


def _meaning(value: object) -> object:
    if isinstance(value, dict):
        return _in_one_wording(value)
    return [_meaning(one) for one in value] if isinstance(value, list) else value


def _in_one_wording(document: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in document.items():
        if key in _OF_THE_WRITER or value is None:
            continue
        name = _RENAMED.get(key, key)
        meaning = value if key in _ROPE_OBJECTS else _meaning(value)
        found[key if name in document else name] = meaning
    if isinstance(dtype := found.get("dtype"), str):
        found["dtype"] = dtype.removeprefix("torch.")
    kinds = found.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        del found["layer_types"]  # the same as saying nothing
    if rope := _rope(found):
        found[_ROPE] = rope
    return found


def _rope(found: dict[str, object]) -> object:
    """Take what `found` says of rope out of it, and put it as `rope_parameters` puts it."""
    own = {key: found.pop(key) for key in sorted(_OF_ROPE) if key in found}
    local = own.pop("rope_local_base_freq", None)
    rope: dict[str, object] = {}
    for nested in [own.pop(key) for key in _ROPE_OBJECTS if key in own]:
        if not isinstance(nested, dict):
            return [nested, own]  # compared as they are
        rope |= {key: value for key, value in nested.items() if value is not None}
    rope |= own
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    if rope and not any(isinstance(one, dict) for one in rope.values()):
        rope.setdefault("rope_type", "default")
    if local is None:
        return rope
    sliding = {"rope_theta": local, "rope_type": "default"}
    return {"full_attention": rope, "sliding_attention": sliding}


def canonical_text(value: object) -> str:
    """Write text that is equal where JSON is: key order does not count, true is not 1, NaN is
    itself."""
    return json.dumps(value, sort_keys=True)
