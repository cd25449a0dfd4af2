"""Checksums: values of the contract, one source or another, joined or in one go."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.delta.checksums import ADLER32_SOURCE, Checksum, adler32, join_adler32, start_checksum

V1 = bytes.fromhex("803f81bf233c00007e7fcd3d")
VALUES = {
    Checksum.ADLER32: "1c8a0466",
    Checksum.XXH3_128: "125348b0c69f34e6a80c8a462794553a",
}


@pytest.mark.parametrize(("checksum", "value"), VALUES.items())
def test_the_values_are_those_of_the_contract(checksum: Checksum, value: str) -> None:
    running = start_checksum(checksum)
    running.update(V1[:5])
    running.update(V1[5:])
    assert running.hexdigest() == value
    assert len(value) == checksum.digits


def test_blake3_is_that_of_its_authors() -> None:
    # The test vectors of BLAKE3: empty input, and the bytes 0, 1, 2 … of one chunk and a byte.
    assert start_checksum(Checksum.BLAKE3).hexdigest() == (
        "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )
    running = start_checksum(Checksum.BLAKE3)
    running.update(bytes(i % 251 for i in range(1025)))
    assert running.hexdigest() == (
        "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"
    )


def test_adler32_comes_from_the_fast_wheel() -> None:
    assert ADLER32_SOURCE == "zlib_ng"


@given(st.binary(max_size=6000), st.binary(max_size=6000))
def test_adler32_joins(first: bytes, second: bytes) -> None:
    whole = zlib.adler32(first + second)
    assert adler32(second, adler32(first, 1)) == whole
    assert join_adler32(zlib.adler32(first), zlib.adler32(second), len(second)) == whole
