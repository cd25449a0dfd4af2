"""The directories that go in: full checkpoints, and deltas in any dialect.

A delta may come from anybody. Index and shard headers are held against each other here, frames when
they are decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hotload.checkpoint.anatomy import is_delta
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.index_and_spec import check_index, check_places
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX, read_json_object
from hotload.delta.apply import Payload, payloads
from hotload.delta.dialects import DeltaIndex, Dialect, Lineage, parse_index
from hotload.delta.envelope import ARC_V2, Envelope, check_payload
from hotload.directory.shards import open_delta_shard, read_checkpoint
from hotload.errors import DeltaError, Finding, InvalidCheckpointError, shorten


@dataclass(frozen=True, slots=True)
class DeltaDirectory:
    """What index and headers say; `files` is the shard file by tensor name, in file order."""

    path: Path
    dialect: Dialect
    envelope: Envelope
    lineage: Lineage | None
    checkpoint: Checkpoint
    files: Mapping[str, str]

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Payload]]:
        """Open the payloads of those of the names that are here, in their order, until the block
        ends.

        Raises:
            DeltaError: a file changed since, or cannot be read any more.
        """
        wanted = [name for name in names if name in self.files]
        found: dict[str, Payload] = {}
        with ExitStack() as stack:
            for file in {self.files[name]: None for name in wanted}:
                shard = stack.enter_context(open_delta_shard(self.path / file))
                found |= payloads(shard, shard.header, self.envelope)
            for name in wanted:
                if name not in found:
                    raise DeltaError(f"{self.files[name]}: {name}", "gone since it was first read")
            yield {name: found[name] for name in wanted}

    def check_base(self, base: Checkpoint) -> None:
        """Return if this may be a delta on `base`, by its headers and other files.

        Raises:
            DeltaError: it is for another one.
        """
        places = {tensor.name: file for file, tensor in base.tensors}
        for name, file in self.files.items():
            if name not in places:
                raise DeltaError(f"{file}: {name}", "not a tensor of the base")
        if self.envelope.has_every_tensor:
            for name, file in places.items():
                if self.files.get(name) != file:
                    found = self.files.get(name, "no payload")
                    raise DeltaError(f"{file}: {name}", f"found {found}, expected one in {file}")
        if self.dialect.carries_side_files:
            digests = {side.file: side.sha256 for side in base.side_files}
            for side in self.checkpoint.side_files:
                if digests.get(side.file) != side.sha256:
                    raise DeltaError(side.file, "not the bytes of the base: made on another one")

    def check_kind(self, first: DeltaDirectory) -> None:
        """Return if the two may be links of one chain, lineage aside.

        Raises:
            DeltaError: they differ in dialect, checksum, tensors or other files.
        """
        reason = None
        if (self.dialect, self.envelope) != (first.dialect, first.envelope):
            reason = "another dialect or checksum"
        elif self.envelope.has_every_tensor and self.files != first.files:
            reason = "other tensors or shards"
        elif self.dialect.carries_side_files and (
            self.checkpoint.side_files != first.checkpoint.side_files
        ):
            reason = "other files beside the shards"
        if reason:
            raise DeltaError(self.path.name, f"{reason} than in {first.path.name}")


@dataclass(frozen=True, slots=True)
class OpenDelta:
    """A delta directory with all its shards open: payloads by tensor name."""

    dialect: Dialect
    envelope: Envelope
    lineage: Lineage | None
    payloads: Mapping[str, Payload]


def read_full(directory: Path) -> Checkpoint:
    """Read the checkpoint a delta leads from or to: every tensor is there, in one place.

    Raises:
        InvalidCheckpointError: it cannot be read, has no shards, is an adapter, or its index and
        its shards contradict each other.
    """
    checkpoint = read_checkpoint(directory)
    if findings := tuple(_whole(checkpoint)):
        raise InvalidCheckpointError(findings)
    return checkpoint


def read_delta(directory: Path) -> DeltaDirectory:
    """Read what the delta directory says, without looking at a frame.

    Raises:
        DeltaError: no such directory; index or headers are not those of a delta that is read here,
        or contradict each other.
    """
    try:
        checkpoint = read_checkpoint(directory)
    except InvalidCheckpointError as error:
        raise DeltaError(error.findings[0].where, error.findings[0].summary) from None
    index = checkpoint.documents.get(INDEX_FILE)
    said = DeltaIndex(Dialect.FIREWORKS, ARC_V2, None, {}) if index is None else parse_index(index)
    if not checkpoint.shards and not said.dialect.tells_lineage:
        raise DeltaError(directory.name, "neither shards nor the index of a delta")
    if checkpoint.shards or said.weight_map:  # a delta that changes nothing has neither
        for finding in check_index(checkpoint, said.weight_map) if index is not None else ():
            raise DeltaError(finding.where, finding.summary)
    files: dict[str, str] = {}
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            for finding in check_payload(shard, tensor, said.envelope):
                raise DeltaError(finding.where, finding.summary)
            if tensor.name in files:
                raise DeltaError(f"{shard.file}: {tensor.name}", f"also in {files[tensor.name]}")
            files[tensor.name] = shard.file
    return DeltaDirectory(directory, said.dialect, said.envelope, said.lineage, checkpoint, files)


@contextmanager
def open_delta(directory: Path) -> Iterator[OpenDelta]:
    """Open the delta directory with every payload readable until the block ends.

    Raises:
        DeltaError: as `read_delta`.
    """
    delta = read_delta(directory)
    with delta.opened(delta.files) as found:
        yield OpenDelta(delta.dialect, delta.envelope, delta.lineage, found)


def _whole(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What keeps a directory from being a full checkpoint whose tensors all have one place."""
    if checkpoint.is_lora:
        expected = "full weights: an adapter has no deltas"
        yield Finding("adapter", ADAPTER_CONFIG_FILE, None, "a LoRA adapter", expected)
    has_checksums = all(
        tensor.name in shard.metadata for shard in checkpoint.shards for tensor in shard.tensors
    )
    if has_checksums and is_delta(checkpoint.shards, None):
        yield Finding("delta", f"*{SHARD_SUFFIX}", None, "a delta", "a full checkpoint", "caller")
    if not checkpoint.shards:
        yield Finding("no_shard", f"*{SHARD_SUFFIX}", None, "no such file", "a checkpoint's shards")
    index = checkpoint.documents.get(INDEX_FILE)
    if index is None:
        yield from check_places(checkpoint.shards, None)
        return
    weight_map = read_json_object(index, file=INDEX_FILE).get("weight_map")
    if isinstance(weight_map, dict):
        yield from check_places(checkpoint.shards, weight_map)
    else:
        yield Finding("weight_map", INDEX_FILE, None, shorten(weight_map), "an object")
