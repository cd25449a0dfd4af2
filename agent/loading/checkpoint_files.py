"""The documents and shards of a checkpoint directory, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hotload.checkpoint.names import INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX

JSON_LIMIT_BYTES = 64 << 20


class UnsupportedModelError(ValueError):
    """A checkpoint that the engine here cannot serve."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        UnsupportedModelError: not a JSON object.
        OSError: not readable.
    """
    if path.stat().st_size > JSON_LIMIT_BYTES:
        raise UnsupportedModelError(f"{path.name} is larger than {JSON_LIMIT_BYTES} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UnsupportedModelError(f"{path.name} is not JSON") from None
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path.name} is not a JSON object")
    return value


def shard_names(directory: Path) -> list[str]:
    """Weight files of a checkpoint: as its index lists them, else all there are."""
    index = directory / INDEX_FILE
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise UnsupportedModelError(f"{INDEX_FILE} has no weight_map")
        return sorted({Path(str(name)).name for name in listed.values()})
    return sorted(path.name for path in directory.glob(f"*{SHARD_SUFFIX}"))
