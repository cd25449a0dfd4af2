"""The encoder's self-check: a frame that does not decode to what went into it goes nowhere."""

import ctypes
import random
import threading
from typing import Any

import numpy as np
import pytest
import zstandard

from hotload.delta import encode_shard, frame
from hotload.delta.frame import PIECE_BYTES, FrameMethod, FrameWriter
from hotload.delta.libzstd import ByteArray, SequenceCoder, frame_head, sequence_coder
from hotload.errors import DeltaError
from tests.hotload.test_codec import Buffer, opened, shard

FLIPS = 200


SOUND_COMPRESSOR = zstandard.ZstdCompressor


class FaultyLibrary:
    """The system's libzstd, one bit of whose frames is wrong: what a bug in it, or bad memory,
    would do."""

    def __init__(self, library: ctypes.CDLL, place: float) -> None:
        self._library, self._place = library, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def ZSTD_compressSequences(self, context: Any, out: int, *arguments: Any) -> int:  # noqa: N802
        size = int(self._library.ZSTD_compressSequences(context, out, *arguments))
        byte = ctypes.c_ubyte.from_address(out + int(self._place * size))
        byte.value ^= 1 << int(self._place * 1e6) % 8
        return size


class FaultyCompressor:
    """zstandard's compressor, one bit of whose output is wrong."""

    def __init__(self, level: int) -> None:
        self._compressor = SOUND_COMPRESSOR(level=level)

    def compressobj(self, size: int) -> Any:
        self._stream = self._compressor.compressobj(size=size)
        return self

    def compress(self, data: bytes) -> bytes:
        return bytes(self._stream.compress(data))

    def flush(self) -> bytes:
        data = bytearray(self._stream.flush())
        data[len(data) // 2] ^= 4
        return bytes(data)


def difference(size: int, share: float) -> ByteArray:
    chance = np.random.default_rng(size)
    return (chance.random(size) < share).astype(np.uint8) * chance.integers(
        1, 256, size, dtype=np.uint8
    )


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.9])
@pytest.mark.parametrize("size", [5000, PIECE_BYTES])
def test_a_faulty_libzstd_is_seen_at_the_piece(size: int, share: float) -> None:
    coder = sequence_coder()
    assert coder is not None
    content, places = difference(size, share), random.Random(size)
    seen = 0
    for _ in range(FLIPS):
        faulty: Any = FaultyLibrary(coder._library, places.random())
        try:
            blocks = SequenceCoder(faulty).blocks(content, is_last=True, self_check=True)
        except ValueError:
            seen += 1
            continue
        # A bit of the frame's own head, which does not travel.
        assert blocks is not None
        whole = frame_head(size) + blocks
        assert zstandard.ZstdDecompressor().decompress(whole) == content.tobytes()
    assert seen > FLIPS // 2


def test_a_faulty_compressor_is_seen_at_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame.zstandard, "ZstdCompressor", FaultyCompressor)
    monkeypatch.setattr(frame, "_SCRATCH", threading.local())  # which holds a sound one
    content = difference(100_000, 0.3)
    method = FrameMethod.LEVEL_ONE
    writer = FrameWriter(len(content), lambda _: None, writer=method, self_check=True)
    writer.add(content.tobytes(), len(content))
    with pytest.raises(DeltaError, match="frame"):
        writer.end()


@pytest.mark.parametrize("writer", FrameMethod)
@pytest.mark.parametrize("size", [3, 4096, 100_001, PIECE_BYTES, 2 * PIECE_BYTES + 7])
@pytest.mark.parametrize("share", [0, 0.01, 1])
def test_a_checked_delta_is_the_same_delta(writer: FrameMethod, size: int, share: float) -> None:
    old = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    new = old ^ difference(size, share)
    base, target = (shard({"w": ("U8", (size,), one.tobytes())}) for one in (old, new))
    plain, checked = Buffer(), Buffer()
    encode_shard(*opened(base), *opened(target), plain, writer=writer)
    encode_shard(*opened(base), *opened(target), checked, writer=writer, self_check=True)
    assert bytes(checked.data) == bytes(plain.data)
