"""What a receiver wants around the payloads: the only part in which dialects differ.

The payload of a tensor, one zstd frame over `target XOR base`, is the same for every receiver. An
envelope says which checksum stands beside it, how that is written, and whether a delta shard has
to hold the unchanged tensors, too (wire-format §3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.delta.checksums import Checksum

_ADLER32_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class Envelope:
    """Checksum of the target bytes, its spelling, and which tensors are there."""

    checksum: Checksum
    is_decimal: bool
    has_every_tensor: bool

    @property
    def described(self) -> str:
        """The checksum as an error names it."""
        name = {Checksum.ADLER32: "Adler-32", Checksum.XXH3_128: "xxh3-128"}
        spelling = "decimal" if self.is_decimal else f"{self.checksum.digits} hex digits of"
        return f"{spelling} {name.get(self.checksum, 'BLAKE3')}"

    def spell(self, value: str) -> str:
        """The text for `__metadata__` of a checksum given in hex of full width."""
        return str(int(value, 16)) if self.is_decimal else value

    def parse(self, text: str | None) -> str | None:
        """The checksum in hex of full width; None unless the text is written exactly so.

        Receivers compare text, so a leading zero, a sign or an upper-case digit is another value.
        """
        if text is None:
            return None
        if not self.is_decimal:
            digits = self.checksum.digits
            return text if re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) else None
        if not re.fullmatch(r"0|[1-9][0-9]{0,9}", text) or int(text) >= _ADLER32_LIMIT:
            return None
        return f"{int(text):08x}"


ARC_V2 = Envelope(Checksum.ADLER32, is_decimal=True, has_every_tensor=True)


def delta_head(
    frames: Mapping[str, int], checksums: Mapping[str, str], envelope: Envelope
) -> bytes:
    """The head of a delta shard by frame size in bytes and checksum in hex of each tensor."""
    end = 0
    entries = []
    for name, size in frames.items():
        entries.append(TensorInfo(name, "U8", (size,), end, end + size))
        end += size
    return render_header(entries, {name: envelope.spell(checksums[name]) for name in frames})
