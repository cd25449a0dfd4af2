"""The digests that a trainer leaves beside its checkpoint, as `sha256sum` writes them."""

from __future__ import annotations

import re

from hotload.directory.files import refuse_file
from hotload.directory.places import Directory
from hotload.directory.shards import read_document

DIGESTS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\]+)")


def read_supplied_digests(directory: Directory) -> dict[str, str]:
    """Read SHA256SUMS: the SHA-256 in hex of files in the directory, by name.

    Raises:
        InvalidCheckpointError: there is none, or a line is not of that form.
    """
    found: dict[str, str] = {}
    lines = read_document(directory / DIGESTS_FILE).decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            expected = "`<64 hex digits>  <file name>`, every name once"
            refuse_file("digests", DIGESTS_FILE, f"line {number}: {line[:80]!r}", expected)
        found[match[2]] = match[1]
    return found
