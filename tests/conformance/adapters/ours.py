"""This project."""

from __future__ import annotations

from pathlib import Path

from hotload.checkpoint.rules import check_full
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Dialect, Lineage
from hotload.directory.operations import apply_directory, encode_directory
from hotload.directory.shards import read_checkpoint
from hotload.errors import HotLoadError, InvalidCheckpointError
from tests.conformance.adapters import DRESSES
from tests.conformance.plain import Dress

READS = WRITES = tuple(map(str, DRESSES))
REFUSALS = (HotLoadError,)


def encode(base: Path, target: Path, out: Path, dress: Dress) -> None:
    dialect = Dialect(dress.dialect)
    encode_directory(
        base,
        target,
        out,
        dialect=dialect,
        checksum=Checksum(dress.checksum),
        lineage=Lineage(dress.version, dress.base_version) if dialect.tells_lineage else None,
        workers=2,
    )


def apply(base: Path, delta: Path, out: Path) -> None:
    apply_directory(base, delta, out, workers=2)


def check(directory: Path) -> None:
    findings = check_full(read_checkpoint(directory))
    if errors := tuple(found for found in findings if found.severity == "error"):
        raise InvalidCheckpointError(errors)
