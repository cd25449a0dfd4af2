"""Delta directories as each receiver wants them: envelope, lineage and index (wire-format §3, §5).

The payloads are the same for all. What differs: how a checksum is written, whether unchanged
tensors stand in the shards, and whether the directory itself says what it follows. Fireworks is
said in the signal, so its index is the previous snapshot's, byte for byte; the others read it from
the index.

Shards keep the names they have in the checkpoint in every dialect: Fireworks wants exactly these,
and the other receivers take any name that ends in `.safetensors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NoReturn

from hotload.checkpoint.names import INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX, name_obstacle, read_json_object
from hotload.delta.checksums import Checksum
from hotload.delta.envelope import ARC_V2, Envelope
from hotload.errors import DeltaError, InvalidCheckpointError, InvalidIdentityError, shorten
from hotload.identity import check_identity

ENCODING = "xor"
COMPRESSION = "zstd"

_VERSION = re.compile(r"[0-9]{6}|[1-9][0-9]{6,17}")


class Dialect(StrEnum):
    """The family of receivers a delta directory is for."""

    FIREWORKS = "fireworks"
    SLIME = "slime"  # miles, SGLang's /pull_weights and look-alikes, too
    COREWEAVE = "coreweave"  # ModelExpress, too

    @property
    def tells_lineage(self) -> bool:
        """Whether the directory says which version it is and what it follows."""
        return self is not Dialect.FIREWORKS

    @property
    def carries_side_files(self) -> bool:
        """Whether config, tokenizer, spec and the full's index travel with a delta."""
        return self is Dialect.FIREWORKS


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a delta makes, and of what: texts as in the index.

    slime counts, in six digits or more ("000003" follows "000002"); CoreWeave has identities.
    """

    version: str
    base_version: str


@dataclass(frozen=True, slots=True)
class DeltaIndex:
    """What the index of a delta directory says; `weight_map` is the shard file by tensor name."""

    dialect: Dialect
    envelope: Envelope
    lineage: Lineage | None
    weight_map: Mapping[str, str]


def envelope_of(dialect: Dialect, checksum: Checksum = Checksum.ADLER32) -> Envelope:
    """Return what stands around the payloads in this dialect.

    Raises:
        DeltaError: its receivers do not compare this checksum.
    """
    if dialect is not Dialect.SLIME and checksum is not Checksum.ADLER32:
        reason = f"its receivers compare {Checksum.ADLER32}, not {checksum}"
        raise DeltaError(f"dialect {dialect}", reason)
    match dialect:
        case Dialect.FIREWORKS:
            return ARC_V2
        case Dialect.SLIME | Dialect.COREWEAVE:
            return Envelope(checksum, is_decimal=False, has_every_tensor=False)


def check_lineage(dialect: Dialect, lineage: Lineage | None) -> None:
    """Return if a new delta of this dialect may carry this lineage (wire-format §5, §8).

    Raises:
        InvalidIdentityError: missing, given where none is written, not of the dialect's form, or
        not the version right after its base.
    """
    if lineage is None:
        if dialect.tells_lineage:
            raise InvalidIdentityError("", f"{dialect} deltas state a version and its base")
        return
    if not dialect.tells_lineage:
        reason = f"{dialect} gets identity and previous in the signal, not in the delta"
        raise InvalidIdentityError(lineage.version, reason)
    _check_form(dialect, lineage)
    if dialect is Dialect.SLIME and int(lineage.version) != int(lineage.base_version) + 1:
        reason = f"expected {int(lineage.base_version) + 1:06d}, right after its base"
        raise InvalidIdentityError(lineage.version, reason)


def join_lineages(lineages: list[Lineage | None]) -> Lineage | None:
    """Join the lineages of consecutive deltas folded into one: the first's base, the last's
    version.

    None where the dialect tells none. A slime receiver counts by one: it takes a folded delta only
    after `convert` gave it the number it waits for.

    Raises:
        DeltaError: one does not follow the one before it.
    """
    known = [lineage for lineage in lineages if lineage is not None]
    for before, after in pairwise(known):
        if before.version != after.base_version:
            reason = f"follows {after.base_version}, not {before.version}"
            raise DeltaError(f"delta {after.version}", reason)
    return Lineage(known[-1].version, known[0].base_version) if known else None


def render_index(lineage: Lineage, checksum: Checksum, weight_map: Mapping[str, str]) -> bytes:
    """Write the `model.safetensors.index.json` of a delta that states its lineage: the shard file
    of every tensor that changed (wire-format §5). For no change the map is empty.
    """
    metadata = {
        "version": lineage.version,
        "base_version": lineage.base_version,
        "delta_encoding": ENCODING,
        "compression_format": COMPRESSION,
        "checksum_format": checksum.value,
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=1, ensure_ascii=False).encode() + b"\n"


def parse_index(data: bytes) -> DeltaIndex:
    """Parse the index of a delta directory, which may come from anybody.

    An index without `delta_encoding` is that of a full checkpoint, which Fireworks deltas carry.

    Raises:
        DeltaError: not an index, or one of a delta that nothing here reads.
    """
    try:
        index = read_json_object(data, file=INDEX_FILE)
    except InvalidCheckpointError as error:
        raise DeltaError(INDEX_FILE, error.findings[0].summary) from None
    metadata = index.get("metadata", {})
    if not isinstance(metadata, dict):
        _refuse("metadata", metadata, "an object")
    weight_map = _weight_map(index.get("weight_map"))
    if "delta_encoding" not in metadata:
        return DeltaIndex(Dialect.FIREWORKS, ARC_V2, None, weight_map)
    if metadata["delta_encoding"] != ENCODING:
        _refuse(
            "delta_encoding", metadata["delta_encoding"], f"{ENCODING!r}; no other is supported"
        )
    compression = metadata.get("compression_format")
    if compression != COMPRESSION:
        _refuse("compression_format", compression, f"{COMPRESSION!r}; no other is supported")
    found = metadata.get("checksum_format")
    if not isinstance(found, str) or found not in list(Checksum):
        _refuse("checksum_format", found, ", ".join(Checksum))
    dialect, lineage = _read_lineage(metadata.get("version"), metadata.get("base_version"))
    try:
        envelope = envelope_of(dialect, Checksum(found))
    except DeltaError as error:
        raise DeltaError(INDEX_FILE, str(error)) from None
    return DeltaIndex(dialect, envelope, lineage, weight_map)


def _read_lineage(version: object, base_version: object) -> tuple[Dialect, Lineage]:
    if not isinstance(version, str) or not isinstance(base_version, str):
        _refuse("version and base_version", [version, base_version], "two texts")
    lineage = Lineage(version, base_version)
    are_numbers = _VERSION.fullmatch(version) and _VERSION.fullmatch(base_version)
    dialect = Dialect.SLIME if are_numbers else Dialect.COREWEAVE
    try:
        _check_form(dialect, lineage)
    except InvalidIdentityError as error:
        raise DeltaError(INDEX_FILE, str(error)) from None
    return dialect, lineage


def _check_form(dialect: Dialect, lineage: Lineage) -> None:
    version, base_version = lineage.version, lineage.base_version
    for text in (version, base_version):
        if dialect is Dialect.SLIME:
            if not _VERSION.fullmatch(text):
                raise InvalidIdentityError(text, f"{dialect} versions have six digits: 000003")
        elif check_identity(text).isdigit():
            # The index has the same keys in both dialects, so the texts tell them apart.
            raise InvalidIdentityError(text, f"a {dialect} identity is not a number")
    if version == base_version or (dialect is Dialect.SLIME and int(version) < int(base_version)):
        raise InvalidIdentityError(version, f"it cannot follow {base_version}")


def _weight_map(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        _refuse("weight_map", value, "an object")
    for name, file in value.items():
        if name_obstacle(file) or not file.endswith(SHARD_SUFFIX):
            _refuse(f"weight_map of {shorten(name)}", file, f"a plain name ending {SHARD_SUFFIX}")
    return value


def _refuse(what: str, found: object, expected: str) -> NoReturn:
    raise DeltaError(INDEX_FILE, f"{what}: found {shorten(found)}, expected {expected}")
