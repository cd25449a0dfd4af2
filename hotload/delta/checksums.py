"""Checksums of tensors: the three that receivers of deltas compare (wire-format §3).

Adler-32 is zlib's, seed 1, unsigned. A well-kept wheel computes it several times faster than the
standard library; where none is installed the standard library does, to the same value. xxh3-128 and
BLAKE3 need their wheels, which the library depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

import blake3
import xxhash

from hotload.delta.byte_io import Bytes

try:
    from zlib_ng import zlib_ng as _zlib
except ImportError:  # no wheel for this machine: slower, same value
    import zlib as _zlib  # type: ignore[no-redef]


adler32: Callable[[Bytes, int], int] = _zlib.adler32
ADLER32_SOURCE: str = _zlib.__name__.rpartition(".")[2]

ADLER32_OF_NOTHING = 1

_MODULUS = 65521


class Checksum(StrEnum):
    """The algorithm by its name in a delta's index."""

    ADLER32 = "adler32"
    XXH3_128 = "xxh3-128"
    BLAKE3 = "blake3"

    @property
    def digits(self) -> int:
        """Hex digits of a value."""
        return {Checksum.ADLER32: 8, Checksum.XXH3_128: 32, Checksum.BLAKE3: 64}[self]


class Running(Protocol):
    """A checksum that takes bytes in their order."""

    def update(self, data: Bytes, /) -> object:
        """Take these bytes, too."""
        ...

    def hexdigest(self) -> str:
        """Return the value over all bytes so far, in lower-case hex of full width."""
        ...


class Adler32:
    """A running Adler-32."""

    def __init__(self) -> None:
        self.value = ADLER32_OF_NOTHING

    def update(self, data: Bytes) -> None:
        """Take these bytes, too."""
        self.value = adler32(data, self.value)

    def hexdigest(self) -> str:
        """Return eight lower-case digits."""
        return f"{self.value:08x}"


def start_checksum(checksum: Checksum) -> Running:
    """Begin a checksum, over no bytes yet."""
    return _STARTS[checksum]()


_STARTS: dict[Checksum, Callable[[], Running]] = {
    Checksum.ADLER32: Adler32,
    Checksum.XXH3_128: xxhash.xxh3_128,
    Checksum.BLAKE3: blake3.blake3,
}


def join_adler32(first: int, second: int, second_size_bytes: int) -> int:
    """Join the Adler-32 of two runs of bytes that follow one another."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + second_size_bytes * ((first & 0xFFFF) - 1)
    return high % _MODULUS << 16 | low % _MODULUS
