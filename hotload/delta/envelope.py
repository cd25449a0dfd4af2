"""What a receiver wants around the payloads: which dialects spell differently.

The payload of a tensor, one zstd frame over `target XOR base`, is the same for every receiver. An
envelope says which checksum stands beside it, how that is written, and whether a delta shard has
to hold the unchanged tensors, too (wire-format §3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hotload.checkpoint.safetensors import ShardHeader, TensorInfo, first_names, render_header
from hotload.delta.checksums import Checksum
from hotload.errors import Finding, shorten

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
        """Spell a checksum, given in hex of full width, for `__metadata__`."""
        return str(int(value, 16)) if self.is_decimal else value

    def parse(self, text: str | None) -> str | None:
        """Read a checksum into hex of full width; None unless it is written exactly so.

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
    """Write the head of a delta shard: each tensor's frame size in bytes and checksum in hex."""
    end = 0
    entries = []
    for name, size in frames.items():
        entries.append(TensorInfo(name, "U8", (size,), end, end + size))
        end += size
    return render_header(entries, {name: envelope.spell(checksums[name]) for name in frames})


def check_delta_shard(
    delta: ShardHeader, base: ShardHeader, envelope: Envelope = ARC_V2
) -> Iterator[Finding]:
    """Yield the broken rules of a delta shard's header on the shard it applies to (wire-format §1,
    §2).
    """
    missing = base.by_name.keys() - delta.by_name.keys() if envelope.has_every_tensor else ()
    for name in sorted(missing):
        yield publisher_finding(
            "missing_tensor", delta.file, name, "no payload", "every tensor of the base shard"
        )
    for name in sorted(delta.by_name.keys() - base.by_name.keys()):
        yield publisher_finding(
            "extra_tensor", delta.file, name, "a payload", "only tensors of the base shard"
        )
    for tensor in delta.tensors:
        yield from check_payload(delta, tensor, envelope)


def check_payload(delta: ShardHeader, tensor: TensorInfo, envelope: Envelope) -> Iterator[Finding]:
    """Yield the broken rules of one tensor in a delta shard's header (wire-format §1, §3)."""
    if tensor.dtype != "U8" or len(tensor.shape) != 1:
        found = f"{tensor.dtype} {shorten(list(tensor.shape))}"
        yield publisher_finding(
            "payload", delta.file, tensor.name, found, "U8 [bytes of the frame]"
        )
    text = delta.metadata.get(tensor.name)
    if envelope.parse(text) is None:
        found = "no checksum" if text is None else shorten(text)
        expected = f"{envelope.described} in __metadata__"
        yield publisher_finding("checksum", delta.file, tensor.name, found, expected)


def shard_obstacle(base: ShardHeader, target: ShardHeader) -> str | None:
    """Say why one shard cannot be a delta on another; None when it can."""
    if base.tensors == target.tensors:
        return None
    if base.by_name.keys() != target.by_name.keys():
        changed = base.by_name.keys() ^ target.by_name.keys()
        return f"tensors of {target.file} changed: {first_names(changed)}"
    for name, old in base.by_name.items():
        new = target.by_name[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            was, now = f"{old.dtype} {list(old.shape)}", f"{new.dtype} {list(new.shape)}"
            return f"{name} in {target.file} changed from {was} to {now}"
    return f"order of tensors in {target.file} changed"


def publisher_finding(
    rule: str, file: str, tensor: str | None, found: str, expected: str
) -> Finding:
    """Report a broken rule of a delta, which the publisher made and must make again."""
    return Finding(rule, file, tensor, found, expected, who="publisher")
