"""Names of the files beside the shards of a checkpoint."""

from __future__ import annotations

INDEX_FILE = "model.safetensors.index.json"
SPEC_FILE = "model.weight.spec.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
