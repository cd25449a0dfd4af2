"""What config.json says, wherever it says it: composite models keep their parts in sub-configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

QUANTIZATION = "quantization_config"

# How families call the number of layers of their language model.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of the config that describes the language model.

    The config itself where it has a vocabulary, or else the sub-config with the largest one:
    those of vision, sound and speech have a small one or none.
    """
    if _natural(config, "vocab_size"):
        return config
    found = [part for part in every_config(config) if _natural(part, "vocab_size")]
    return max(found, key=lambda part: part["vocab_size"], default=config)


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Read the rows of the embeddings; None where the config does not tell."""
    return _natural(language_config(config), "vocab_size")


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Read how many layers the language model has; None where the config does not tell."""
    # Some keep the vocabulary at the top and the layers in `text_config`.
    parts = (language_config(config), config, *_inner(config, "text_config"))
    return next((n for part in parts for key in _LAYER_COUNTS if (n := _natural(part, key))), None)


def expert_counts(config: Mapping[str, Any]) -> set[int]:
    """Read how many experts a layer of the model, or of one of its parts, may have."""
    keys = [(part, key) for part in every_config(config) for key in _EXPERT_COUNTS]
    return {count for part, key in keys if (count := _natural(part, key))}


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Tell whether the model's head shares the bytes of its embeddings; None where unknown."""
    for part in (config, language_config(config), *_inner(config, "text_config")):
        if "tie_word_embeddings" in part:
            declared = part["tie_word_embeddings"]
            return declared if isinstance(declared, bool) else None
    return None


def quantization_settings(config: Mapping[str, Any]) -> list[Any]:
    """Collect every `quantization_config` that is set, of the model and of its parts."""
    found = (part.get(QUANTIZATION) for part in every_config(config))
    return [settings for settings in found if settings is not None]


def every_config(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Walk the config and all objects in it, but not into quantization settings."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and key != QUANTIZATION:
            yield from every_config(value)


def _inner(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = config.get(key)
    return [value] if isinstance(value, dict) else []


def _natural(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None
