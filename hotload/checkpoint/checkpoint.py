"""A checkpoint directory as values: its shard headers, documents and side files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hotload.checkpoint.names import ADAPTER_CONFIG_FILE
from hotload.checkpoint.safetensors import ShardHeader, TensorInfo
from hotload.records import FileDigest


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or directory of a checkpoint that is not published, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory as values, ordered by file name.

    `documents` holds the bytes of config.json, index, spec, adapter_config.json and what else is
    compared by its meaning, as far as they exist; `side_files` names every file that is no shard
    and is published, the documents included; `left_out` what is not.
    """

    shards: tuple[ShardHeader, ...]
    documents: Mapping[str, bytes]
    side_files: tuple[FileDigest, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """(shard file, tensor) for every tensor."""
        return ((shard.file, tensor) for shard in self.shards for tensor in shard.tensors)

    @property
    def is_lora(self) -> bool:
        """The presence of adapter_config.json alone selects LoRA (wire-format §6)."""
        return ADAPTER_CONFIG_FILE in self.documents
