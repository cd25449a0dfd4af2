"""Whatever changed, in whichever pattern: every zstd reader sees the XOR (wire-format §1, §4)."""

import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hotload.delta import decode_tensor, encode_tensor
from hotload.delta.frame import PIECE_BYTES, FrameMethod
from hotload.delta.libzstd import PIECE_LIMIT_BYTES, sequence_coder

BLOCK_BYTES = 1 << 17
# Around zstd's blocks, the codec's pieces, and where a frame is too small for sequences.
BORDERS = (4096, BLOCK_BYTES, 3 * BLOCK_BYTES, PIECE_BYTES, PIECE_BYTES + BLOCK_BYTES)
SIZES = st.integers(0, 5000) | st.builds(
    lambda border, aside: border + aside, st.sampled_from(BORDERS), st.integers(-9, 9)
)
# bf16 words: NaNs with payloads, both zeros, infinities, a denormal, one.
SPECIAL = np.array([0x7FC0, 0xFFC1, 0x7F81, 0x8000, 0, 0x7F80, 0xFF80, 1, 0x3F80], "<u2")


@st.composite
def changes(draw: st.DrawFn) -> np.ndarray:
    """The XOR of two tensors: where something changed, and by how much."""
    size = draw(SIZES)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    difference = np.zeros(size, np.uint8)
    pattern = draw(st.sampled_from(["share", "stripes", "runs", "edges", "all", "none"]))
    if pattern == "share":
        share = draw(st.sampled_from([1e-5, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.6, 0.99]))
        width = draw(st.sampled_from([1, 2, 4, 8]))  # whole elements change, not lone bytes
        elements = difference[: size // width * width].reshape(-1, width)
        is_changed = generator.random(len(elements)) < share
        elements[is_changed] = generator.integers(0, 256, (int(is_changed.sum()), width), np.uint8)
    elif pattern == "stripes":
        difference[draw(st.integers(0, 9)) :: draw(st.integers(1, 70_000))] = draw(
            st.integers(1, 255)
        )
    elif pattern == "runs":
        for _ in range(draw(st.integers(1, 6))):
            start = draw(st.integers(0, size))
            end = start + draw(st.integers(1, 2 * BLOCK_BYTES))
            difference[start:end] = draw(st.integers(0, 255))
    elif pattern == "edges":
        for border in range(0, size + 1, BLOCK_BYTES):
            at = border + draw(st.integers(-5, 5))
            difference[max(at, 0) : max(at + draw(st.integers(1, 5)), 0)] = 1
        difference[size - 1 : size] = draw(st.integers(0, 1))
    elif pattern == "all":
        difference[:] = generator.integers(1, 256, size, np.uint8)
    return difference


@pytest.mark.slow
@given(changes(), st.sampled_from(FrameMethod))
@example(np.zeros(BLOCK_BYTES, np.uint8), FrameMethod.SEQUENCES)
@example(np.ones(PIECE_BYTES, np.uint8), FrameMethod.SEQUENCES)
@settings(max_examples=250)
def test_every_reader_sees_the_xor(difference: np.ndarray, writer: FrameMethod) -> None:
    size = len(difference)
    base = np.resize(SPECIAL.view(np.uint8), size)
    target = base ^ difference
    frame, adler32 = encode_tensor(base.tobytes(), target.tobytes(), writer=writer)
    assert adler32 == zlib.adler32(target)
    head = zstandard.get_frame_parameters(frame)
    assert head.content_size == size
    assert head.window_size <= 8 << 20  # what every decoder has to offer
    assert (
        zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        == difference.tobytes()
    )
    with zstandard.ZstdDecompressor().stream_reader(frame, closefd=False) as reader:
        parts = [reader.read(70_001) for _ in range(0, size, 70_001)]
        assert b"".join(parts) == difference.tobytes()
        assert not reader.read(1)
    assert decode_tensor(base.tobytes(), frame, adler32=adler32, subject="w") == target.tobytes()


@pytest.mark.parametrize("writer", FrameMethod)
@given(st.integers(1, 1 << 17), st.integers(1, 1 << 17), st.integers(0, 255))
@settings(max_examples=60)
def test_one_island_anywhere(writer: FrameMethod, start: int, length: int, value: int) -> None:
    """Literals and matches of every length, from one byte to a whole block."""
    difference = np.zeros(2 * BLOCK_BYTES + 77, np.uint8)
    difference[start : start + length] = value
    frame, adler32 = encode_tensor(bytes(len(difference)), difference.tobytes(), writer=writer)
    assert zstandard.ZstdDecompressor().decompress(frame) == difference.tobytes()
    assert adler32 == zlib.adler32(difference)


def test_what_libzstd_refuses_is_named() -> None:
    coder = sequence_coder()
    assert coder is not None
    too_much = np.random.default_rng(0).integers(1, 256, 2 * PIECE_LIMIT_BYTES, np.uint8)
    with pytest.raises(OSError, match=r"libzstd refuses: [A-Z][a-z]+"):
        coder.blocks(too_much, is_last=True)
