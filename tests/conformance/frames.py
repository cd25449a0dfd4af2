"""Frames as other writers make them, and as nobody should (wire-format §4)."""

from __future__ import annotations

from collections.abc import Callable

import zstandard

from tests.conformance.cases import Build, Case, Spoil, W, long_vectors, spoiled
from tests.conformance.plain import (
    Delta,
    Dress,
    by_hand,
    frame_head,
    level_1,
    make_delta,
    raw_block,
    run_block,
)


def writer(frame: Callable[[bytes], bytes]) -> Build:
    def build(dress: Dress) -> Case:
        found = long_vectors()
        delta = make_delta(dress, found.base, found.target, found.sides, frame=frame)
        return Case("target", found.base, found.sides, [delta], found.target)

    return build


def with_checksum(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content)


def without_size(content: bytes) -> bytes:
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    return stream.compress(content) + stream.flush()


def in_two(content: bytes) -> bytes:
    half = len(content) // 2
    return level_1(content[:half]) + level_1(content[half:])


def of_a_dictionary(content: bytes) -> bytes:
    samples = [bytes([number, number ^ 1]) * 40 + b"hotload" for number in range(64)] * 20
    trained = zstandard.train_dictionary(512, samples)
    return zstandard.ZstdCompressor(level=1, dict_data=trained).compress(content)


def framed(change: Callable[[bytes, bytes], bytes]) -> Spoil:
    """Put `change(frame, content)` in the place of the frame of W."""

    def spoil(delta: Delta, dress: Dress) -> None:
        frames = delta.frames[delta.file_of(W)]
        content = zstandard.ZstdDecompressor().decompress(frames[W])
        frames[W] = change(frames[W], content)

    return spoil


def flipped(frame: bytes, content: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def bomb(size: int) -> bytes:
    """A frame of `size` zeros that is four bytes for every 128 KiB."""
    blocks = [run_block(0, 1 << 17, is_last=False)] * ((size >> 17) - 1)
    return frame_head(size) + b"".join(blocks) + run_block(0, 1 << 17, is_last=True)


WRITERS: dict[str, Callable[[bytes], bytes]] = {
    "level-3": zstandard.ZstdCompressor(level=3).compress,
    "level-19": zstandard.ZstdCompressor(level=19).compress,
    "frame-checksum": with_checksum,
    "two-threads": zstandard.ZstdCompressor(level=1, threads=2).compress,
    "raw-and-run-blocks": by_hand,
    "blocks-of-100-bytes": lambda content: by_hand(content, 100),
}

FRAMES: dict[str, Build] = {
    **{name: writer(frame) for name, frame in WRITERS.items()},
    # Peers differ (§4): what may not happen is another result.
    "no-content-size": spoiled("either", framed(lambda _, content: without_size(content))),
    "no-content-size-long": spoiled(
        "either", framed(lambda _, content: without_size(content)), long_vectors
    ),
    "two-frames": spoiled("either", framed(lambda _, content: in_two(content))),
    "empty-frame-after": spoiled("either", framed(lambda frame, _: frame + level_1(b""))),
    "frame-after": spoiled("either", framed(lambda frame, _: frame + level_1(b"more"))),
    "skippable-frame-before": spoiled(
        "either", framed(lambda frame, _: bytes.fromhex("502a4d1800000000") + frame)
    ),
    "trailing-byte": spoiled("either", framed(lambda frame, _: frame + b"\0")),
    "no-last-block": spoiled(
        "either", framed(lambda _, c: frame_head(len(c)) + raw_block(c, is_last=False))
    ),
    "truncated": spoiled("refused", framed(lambda frame, _: frame[:-1])),
    "truncated-half": spoiled("refused", framed(lambda frame, _: frame[: len(frame) // 2])),
    "truncated-long": spoiled("refused", framed(lambda frame, _: frame[:-5]), long_vectors),
    "flipped-bit": spoiled("refused", framed(flipped)),
    "garbage": spoiled("refused", framed(lambda frame, _: bytes(range(len(frame))))),
    "empty-payload": spoiled("refused", framed(lambda _, content: b"")),
    "plain-bytes": spoiled("refused", framed(lambda _, content: content)),
    "reserved-block": spoiled(
        "refused",
        framed(lambda _, c: frame_head(len(c)) + (7 | len(c) << 3).to_bytes(3, "little") + c),
    ),
    "bad-frame-checksum": spoiled(
        "refused", framed(lambda _, content: with_checksum(content)[:-4] + bytes(4))
    ),
    "states-less": spoiled(
        "refused", framed(lambda _, c: frame_head(len(c) - 1) + raw_block(c, is_last=True))
    ),
    "holds-less": spoiled(
        "refused", framed(lambda _, c: frame_head(len(c)) + raw_block(c[:-1], is_last=True))
    ),
    "holds-more": spoiled(
        "refused", framed(lambda _, c: frame_head(len(c)) + raw_block(c + b"\0", is_last=True))
    ),
    "shorter-tensor": spoiled("refused", framed(lambda _, content: level_1(content[:-1]))),
    "longer-tensor": spoiled("refused", framed(lambda _, content: level_1(content + b"\0"))),
    "states-a-terabyte": spoiled(
        "refused", framed(lambda _, c: frame_head(1 << 40) + raw_block(c, is_last=True))
    ),
    "a-gigabyte-of-runs": spoiled("refused", framed(lambda frame, _: bomb(1 << 30))),
    "needs-a-dictionary": spoiled("refused", framed(lambda _, c: of_a_dictionary(c)), long_vectors),
}
