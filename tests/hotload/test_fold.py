"""Consecutive deltas as one: the same bytes as one after the other, without the checkpoints."""

import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import hotload
from hotload.checkpoint.safetensors import (
    ShardHeader,
    TensorInfo,
    header_size,
    read_header,
    render_header,
)
from hotload.delta import Payload, apply_shard, encode_shard, payloads
from hotload.delta.byte_io import Bytes, InMemory, read_bytes
from hotload.delta.checksums import Checksum, start_checksum
from hotload.delta.convert import is_unchanged
from hotload.delta.envelope import ARC_V2, Envelope
from hotload.delta.fold import fold_shard
from hotload.delta.frame import zero_frame
from hotload.errors import DeltaError

CHANGED_ONLY = Envelope(Checksum.XXH3_128, is_decimal=False, has_every_tensor=False)
Link = dict[str, Payload]


class Buffer:
    """An output in memory."""

    def __init__(self) -> None:
        self.held = bytearray()

    @property
    def size_bytes(self) -> int:
        return len(self.held)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.held[offset : offset + len(view)]

    def write_at(self, offset: int, data: Bytes) -> None:
        self.held.extend(bytes(max(0, offset - len(self.held))))
        self.held[offset : offset + len(data)] = data

    def truncate(self, size_bytes: int) -> None:
        del self.held[size_bytes:]


def opened(data: bytes, file: str = "x.safetensors") -> tuple[InMemory, ShardHeader]:
    size = header_size(data[:8], file=file, size_bytes=len(data))
    return InMemory(data), read_header(data[:size], file=file, size_bytes=len(data))


def shard(**tensors: bytes) -> bytes:
    entries, end = [], 0
    for name, data in tensors.items():
        entries.append(TensorInfo(name, "U8", (len(data),), end, end + len(data)))
        end += len(data)
    return render_header(entries, {"format": "pt"}) + b"".join(tensors.values())


def written(out: Buffer) -> bytes:
    return read_bytes(out, 0, out.size_bytes)


def encode(base: bytes, target: bytes, envelope: Envelope = ARC_V2) -> Link:
    out = Buffer()
    encode_shard(*opened(base), *opened(target), out, envelope=envelope)
    return payloads(*opened(written(out)), envelope)


def apply(base: bytes, link: Link) -> bytes:
    out = Buffer()
    apply_shard(*opened(base), link, out)
    return written(out)


def fold(links: list[Link], envelope: Envelope = ARC_V2) -> Link:
    out = Buffer()
    names = fold_shard(links, out, envelope, on_bytes=lambda _: None)
    folded = payloads(*opened(written(out)), envelope)
    assert tuple(folded) == names
    return folded


def frame_of(payload: Payload) -> bytes:
    return read_bytes(payload.source, payload.start, payload.end - payload.start)


def made_of(frame: bytes, like: Payload) -> Payload:
    """The payload with another frame."""
    return Payload(InMemory(frame), like.file, 0, len(frame), like.checksum, like.envelope)


def history(sizes: list[int], steps: int, seed: int) -> list[bytes]:
    """Shards of a run: at each step some tensors move in a few places, and some do not."""
    generator = np.random.default_rng(seed)
    values = {f"t{i}": generator.integers(0, 256, size, np.uint8) for i, size in enumerate(sizes)}
    found = [shard(**{name: value.tobytes() for name, value in values.items()})]
    for _ in range(steps):
        for value in values.values():
            if len(value) and generator.random() < 0.6:
                places = generator.integers(0, len(value), 1 + len(value) // 64)
                value[places] ^= generator.integers(1, 256, len(places), np.uint8)
        found.append(shard(**{name: value.tobytes() for name, value in values.items()}))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("envelope", [ARC_V2, CHANGED_ONLY])
@given(
    st.lists(st.sampled_from([0, 1, 7, 4096, 4097, 70_000, 131_073]), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_a_fold_does_what_the_deltas_do_in_turn(
    envelope: Envelope, sizes: list[int], steps: int, seed: int
) -> None:
    shards = history(sizes, steps, seed)
    links = [encode(old, new, envelope) for old, new in pairwise(shards)]
    folded = fold(links, envelope)
    assert apply(shards[0], folded) == shards[-1]
    direct = encode(shards[0], shards[-1], envelope)
    assert {name: one.checksum for name, one in folded.items()} == {
        name: last.checksum for link in links for name, last in link.items() if name in folded
    }
    for name in direct:
        assert folded[name].checksum == direct[name].checksum


def test_pieces_of_large_tensors_fold() -> None:
    shards = history([3 << 20, (1 << 20) + 5], 4, seed=1)
    links = [encode(old, new) for old, new in pairwise(shards)]
    assert apply(shards[0], fold(links)) == shards[-1]


def test_what_one_delta_changed_is_copied_and_not_decoded() -> None:
    size = 300_000
    old, new = bytes(size), bytes(range(250)) * (size // 250)
    base, target = shard(a=old, b=old), shard(a=new, b=old)
    first, second = encode(base, target), encode(target, target)
    # A raw block in which one byte fell over: whole by structure, wrong by content.
    damaged = bytearray(zstandard.ZstdCompressor(level=1).compress(new))
    damaged[len(damaged) // 2] ^= 1
    first["a"] = made_of(bytes(damaged), first["a"])
    folded = fold([first, second])
    assert frame_of(folded["a"]) == damaged
    assert frame_of(folded["b"]) == zero_frame(size)


@pytest.mark.parametrize("envelope", [ARC_V2, CHANGED_ONLY])
def test_changes_that_cancel_out_leave_no_change(envelope: Envelope) -> None:
    one, two = (shard(a=bytes([value]) * 200_000, b=b"same") for value in (1, 2))
    folded = fold([encode(one, two, envelope), encode(two, one, envelope)], envelope)
    assert all(is_unchanged(payload) for payload in folded.values())
    assert list(folded) == (["a", "b"] if envelope.has_every_tensor else [])
    assert apply(one, folded) == one


def test_one_delta_folds_to_itself_and_none_to_nothing() -> None:
    shards = history([5000, 0, 70_000], 1, seed=3)
    link = encode(*shards)
    folded = fold([link])
    assert {name: frame_of(one) for name, one in folded.items()} == {
        name: frame_of(one) for name, one in link.items()
    }
    assert fold([{}, {}], CHANGED_ONLY) == {}


def test_frames_of_other_encoders_fold() -> None:
    shards = history([70_000, 200_000], 2, seed=4)
    links = []
    for old, new in pairwise(shards):
        link = encode(old, new)
        (before, header), (after, _) = opened(old), opened(new)
        for tensor in header.tensors:
            at = header.data_start + tensor.start
            a, b = (
                np.frombuffer(read_bytes(one, at, tensor.size_bytes), np.uint8)
                for one in (before, after)
            )
            frame = zstandard.ZstdCompressor(level=3, write_checksum=True).compress((a ^ b).data)
            link[tensor.name] = made_of(frame, link[tensor.name])
        links.append(link)
    assert apply(shards[0], fold(links)) == shards[-1]


def test_tensors_may_be_missing_where_only_changed_ones_are_there() -> None:
    shards = history([4000] * 6, 5, seed=5)
    links = [encode(old, new, CHANGED_ONLY) for old, new in pairwise(shards)]
    assert len({tuple(link) for link in links}) > 1  # or this would test nothing
    assert apply(shards[0], fold(links, CHANGED_ONLY)) == shards[-1]


def test_progress_adds_up_to_all_payload_bytes() -> None:
    shards = history([3 << 20, 70_000, 0], 3, seed=6)
    links = [encode(old, new) for old, new in pairwise(shards)]
    told: list[int] = []
    fold_shard(links, Buffer(), ARC_V2, on_bytes=told.append)
    assert sum(told) == sum(one.end - one.start for link in links for one in link.values())
    assert min(told) >= 0


# Refusals


def refused(links: list[Link], told: str, envelope: Envelope = ARC_V2) -> None:
    with pytest.raises(DeltaError, match=told):
        fold_shard(links, Buffer(), envelope, on_bytes=lambda _: None)


def test_every_delta_has_to_hold_every_tensor_where_the_receiver_wants_them() -> None:
    shards = history([4000, 4000], 2, seed=7)
    first, second = (encode(old, new) for old, new in pairwise(shards))
    del second["t1"]
    refused([first, second], "t1: in 1 of 2 deltas")


@pytest.mark.parametrize("envelope", [ARC_V2, CHANGED_ONLY])
def test_frames_of_other_sizes_do_not_fold(envelope: Envelope) -> None:
    links = [encode(shard(a=bytes(n)), shard(a=b"\1" * n), envelope) for n in (500, 501)]
    refused(links, "a: the deltas state other sizes: 500, 501", envelope)


def test_an_order_that_cannot_be_is_refused() -> None:
    shards = [shard(a=bytes([value]) * 100) for value in (1, 2, 2)]
    changing, still = (encode(old, new) for old, new in pairwise(shards))
    refused([still, still, changing, encode(shards[0], shards[0])], "not consecutive")
    fold([changing, still])


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (b"", "does not begin with a zstd frame"),
        (b"garbage, not a frame", "does not begin with a zstd frame"),
        (zstandard.ZstdCompressor().compress(bytes(100))[:-1], "cut off"),
        (zstandard.ZstdCompressor().compress(bytes(100)) + b"x", "1 bytes follow the frame"),
        (zstandard.ZstdCompressor().compress(bytes(100)) * 2, "follow the frame"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)), "content size"),
        # 100 bytes stated, a raw block of 3
        (bytes.fromhex("28b52ffd2064190000010203"), "does not decode"),
        # 100 bytes stated, a repeated byte 200 times
        (bytes.fromhex("28b52ffd206443060001"), "does not decode"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_frames_that_are_none_are_refused(frame: bytes, told: str, place: int) -> None:
    good = encode(shard(a=bytes(100)), shard(a=b"\1" * 100))
    links = [good, good]
    links[place] = {"a": made_of(frame, good["a"])}
    refused(links, told)


def test_a_small_frame_that_claims_a_terabyte_takes_no_memory() -> None:
    # Magic, single segment with eight bytes of size, one last block without content.
    frame = bytes.fromhex("28b52ffde0") + (1 << 40).to_bytes(8, "little") + bytes.fromhex("010000")
    good = encode(shard(a=bytes(100)), shard(a=b"\1" * 100))
    claim = {"a": made_of(frame, good["a"])}
    assert not is_unchanged(claim["a"])
    refused([claim, claim], "window")


MEASURED = """
import numpy as np
from pathlib import Path
from hotload.delta import encode_shard, payloads
from hotload.delta.envelope import ARC_V2
from hotload.delta.fold import fold_shard
from hotload.checkpoint.safetensors import TensorInfo, read_header, render_header

SIZE = 128 << 20

class Generated:
    # A tensor that is never in memory as a whole.
    def __init__(self, step):
        self.head = render_header([TensorInfo("w", "U8", (SIZE,), 0, SIZE)], {})
        self.size_bytes, self.step = len(self.head) + SIZE, step
        self.header = read_header(self.head, file="w.safetensors", size_bytes=self.size_bytes)

    def read_into(self, offset, view):
        if offset < len(self.head):
            view[:] = self.head[offset : offset + len(view)]
            return
        values = np.zeros(len(view), np.uint8)
        values[:: 1000 + self.step] = self.step
        view[:] = values.data

class Buffer:
    def __init__(self):
        self.held = bytearray()

    size_bytes = property(lambda self: len(self.held))

    def read_into(self, offset, view):
        view[:] = self.held[offset : offset + len(view)]

    def write_at(self, offset, data):
        self.held.extend(bytes(max(0, offset - len(self.held))))
        self.held[offset : offset + len(data)] = data

    def truncate(self, size_bytes):
        del self.held[size_bytes:]

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

links = []
for step in range(4):
    old, new, out = Generated(step), Generated(step + 1), Buffer()
    encode_shard(old, old.header, new, new.header, out, with_sha256=False)
    head = bytearray(64)
    out.read_into(0, memoryview(head))
    size = 8 + int.from_bytes(head[:8], "little")
    head = bytearray(size)
    out.read_into(0, memoryview(head))
    links.append(payloads(out, read_header(bytes(head), file="d", size_bytes=out.size_bytes)))
start = memory("VmHWM")
fold_shard(links, Buffer(), ARC_V2, on_bytes=lambda _: None)
print(memory("VmHWM") - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_tensor() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(hotload.__file__).parents[1],
    )
    assert int(finished.stdout) < 24 << 10  # KiB; the tensor has 128 MiB


@pytest.mark.parametrize("size", [0, 1, 4096, 131_072, 131_073, 10_000_000])
def test_unchanged_is_told_by_the_frame_we_write(size: int) -> None:
    def payload(frame: bytes) -> Payload:
        return Payload(InMemory(frame), "x", 0, len(frame), f"{zlib.adler32(b''):08x}", ARC_V2)

    assert is_unchanged(payload(zero_frame(size)))
    other = zstandard.ZstdCompressor(level=3).compress(bytes(size)) + b"x"
    assert not is_unchanged(payload(other))
    assert not is_unchanged(payload(zero_frame(size)[:-1]))
    assert not is_unchanged(payload(b""))


def test_checksums_of_the_last_delta_stay() -> None:
    shards = history([5000], 3, seed=9)
    links = [encode(old, new, CHANGED_ONLY) for old, new in pairwise(shards)]
    source, header = opened(shards[-1])
    running = start_checksum(Checksum.XXH3_128)
    running.update(read_bytes(source, header.data_start, 5000))
    assert fold(links, CHANGED_ONLY)["t0"].checksum == running.hexdigest()
