"""A checkpoint directory as values: its shard headers, documents and side files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hotload.checkpoint.names import ADAPTER_CONFIG_FILE
from hotload.checkpoint.safetensors import ShardHeader, TensorInfo
from hotload.records import FileDigest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory as values, ordered by file name.

    `documents` holds the bytes of config.json, index, spec and adapter_config.json as far as they
    exist; `side_files` names every file that is no shard, the documents included.
    """

    shards: tuple[ShardHeader, ...]
    documents: Mapping[str, bytes]
    side_files: tuple[FileDigest, ...]

    @property
    def tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """(shard file, tensor) for every tensor."""
        return ((shard.file, tensor) for shard in self.shards for tensor in shard.tensors)

    @property
    def is_lora(self) -> bool:
        """The presence of adapter_config.json alone selects LoRA (wire-format §6)."""
        return ADAPTER_CONFIG_FILE in self.documents
