"""Our `arc_v2` against the vendor's own package, both ways (wire-format §2, §4, §7, §10)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fireworks_delta_compression as vendor
import numpy as np
import pytest
import torch
import zstandard
import zstd
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

from hotload.delta import decode_tensor, encode_shard, encode_tensor
from hotload.delta.frame import FrameMethod
from hotload.directory.files import replacing_file, sha256_file
from hotload.directory.shards import apply_file, encode_file, open_shard, verify_file
from hotload.errors import ChecksumMismatchError, DeltaError
from tests.oracles.seeded import LARGE, SMALL, write_pair

ARC_V2 = "arc_v2"
Frames = dict[str, bytes]
Texts = dict[str, str]


def vendor_applies(base: Path, delta: Path) -> None:
    vendor.delta_decompress_inplace(
        base_path=str(base), diff_path=str(delta), compression_format=ARC_V2
    )


def vendor_encodes(base: Path, target: Path, delta: Path) -> None:
    vendor.delta_compress_files_to_file(
        src=str(base), dst=str(target), diff_file=str(delta), compression_format=ARC_V2
    )


def copy(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_suffix(".copy")))


@pytest.fixture(params=[1, 2, 3])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, target, and where the delta goes."""
    return *write_pair(tmp_path, request.param, LARGE), tmp_path / "delta.safetensors"


def test_the_pairs_hold_what_they_should(pair: tuple[Path, Path, Path]) -> None:
    base, target = load_file(pair[0]), load_file(pair[1])
    assert {tensor.dtype for tensor in base.values()} >= {
        *(torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    }
    assert any(tensor.numel() == 0 for tensor in base.values())
    assert any(tensor.dim() == 0 for tensor in base.values())
    assert any(tensor.nbytes > 1 << 20 for tensor in base.values())
    assert base["model.embed_tokens.weight"].isnan().any()
    assert target["model.embed_tokens.weight"].isnan().any()


@pytest.mark.parametrize("writer", FrameMethod)
def test_the_vendor_restores_what_ours_encoded(
    pair: tuple[Path, Path, Path], writer: FrameMethod
) -> None:
    base, target, delta = pair
    with open_shard(base) as old, open_shard(target) as new, replacing_file(delta) as out:
        encode_shard(old, old.header, new, new.header, out, writer=writer)
    restored = copy(base)
    vendor_applies(restored, delta)
    assert restored.read_bytes() == target.read_bytes()


def test_the_vendor_reader_of_whole_files_takes_ours_too(pair: tuple[Path, Path, Path]) -> None:
    base, target, delta = pair
    encode_file(base, target, delta)
    restored = vendor.delta_decompress_dict_from_file(
        src=load_file(base), diff_file=str(delta), compression_format=ARC_V2
    )
    expected = load_file(target)
    assert restored.keys() == expected.keys()
    for name, tensor in restored.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert raw(tensor) == raw(expected[name]), name


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_ours_restores_what_the_vendor_encoded(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, target, delta = pair
    vendor_encodes(base, target, delta)
    verify_file(base, delta, target)
    apply_file(base, delta, tmp_path / "restored.safetensors")
    assert (tmp_path / "restored.safetensors").read_bytes() == target.read_bytes()


def test_both_write_the_same_checksums(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, target, delta = pair
    encode_file(base, target, delta)
    vendor_encodes(base, target, tmp_path / "vendor.safetensors")
    assert open_delta(delta)[1] == open_delta(tmp_path / "vendor.safetensors")[1]


def open_delta(path: Path) -> tuple[Frames, Texts]:
    """Frames and checksum texts of a delta shard, as the safetensors library reads them."""
    with safe_open(path, framework="np") as shard:
        frames = {name: shard.get_tensor(name).tobytes() for name in shard.keys()}  # noqa: SIM118
        return frames, shard.metadata()


def write_delta(path: Path, frames: Frames, texts: Texts) -> None:
    """A delta shard by the safetensors library."""
    arrays = {name: np.frombuffer(frame, np.uint8) for name, frame in frames.items()}
    save_file(arrays, path, texts)


def test_a_tensor_above_2_gib_travels_both_ways(tmp_path: Path) -> None:
    size = (2 << 30) + 4096
    base, target = tmp_path / "base.safetensors", tmp_path / "target.safetensors"
    head = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    text = head.encode().ljust(-(-len(head) // 8) * 8)
    for path, step in ((base, size), (target, 7_654_321)):
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
            for offset in [*range(0, size, step), size - 1]:
                file.seek(8 + len(text) + offset)
                file.write(bytes([offset % 251 + 1]) if step != size else b"\x40")
    encode_file(base, target, tmp_path / "ours.safetensors")
    restored = copy(base)
    vendor_applies(restored, tmp_path / "ours.safetensors")
    assert sha256_file(restored) == sha256_file(target)
    restored.unlink()
    vendor_encodes(base, target, tmp_path / "theirs.safetensors")
    verify_file(base, tmp_path / "theirs.safetensors", target)


# wire-format §10


def shard(value: str) -> bytes:
    head = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    )
    head = head.ljust(-(-len(head) // 8) * 8)
    return len(head).to_bytes(8, "little") + head + bytes.fromhex(value)


VECTORS = {
    "v0": "803f80bf233c00007f7fcc3d",
    "v1": "803f81bf233c00007e7fcd3d",
    "v2": "803f82bf233c00007e7fcd3d",
}
FRAMES = {
    ("v0", "v1"): ("28b52ffd200c610000000001000000000001000100", 478807142),
    ("v1", "v2"): ("28b52ffd200c610000000003000000000000000000", 479462503),
}
FILE_SHA256 = {
    "v0": "421f5523bdba8d8b60ae00519617036accb8f9a7d8b20f73f7159085281397ff",
    "v1": "eec0e1cd260e17de1da628c6600cd61009963fb902365f791ceafa56655004f0",
    "delta": "99cf16d7f32174a04f858d380111e7d798095bf1d8611117bb6bf9a918336f3b",
}


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    for name, value in VECTORS.items():
        (tmp_path / f"{name}.safetensors").write_bytes(shard(value))
    return tmp_path


@pytest.mark.parametrize(("old", "new"), FRAMES)
def test_both_write_the_frame_of_the_vector(old: str, new: str) -> None:
    frame, adler32 = FRAMES[old, new]
    before, after = bytes.fromhex(VECTORS[old]), bytes.fromhex(VECTORS[new])
    assert encode_tensor(before, after) == (bytes.fromhex(frame), adler32)
    payload, text = vendor.delta_compress(
        src=torch.frombuffer(bytearray(before), dtype=torch.bfloat16),
        dst=torch.frombuffer(bytearray(after), dtype=torch.bfloat16),
        compression_format=ARC_V2,
    )
    assert payload.numpy().tobytes().hex() == frame
    assert text == str(adler32)


def test_both_write_the_frame_of_a_tensor_without_elements() -> None:
    assert encode_tensor(b"", b"") == (bytes.fromhex("28b52ffd2000010000"), 1)
    empty = torch.empty((0, 3), dtype=torch.bfloat16)
    payload, text = vendor.delta_compress(src=empty, dst=empty, compression_format=ARC_V2)
    assert (payload.numpy().tobytes().hex(), text) == ("28b52ffd2000010000", "1")


def test_our_file_of_the_vector_is_the_documented_one(vectors: Path) -> None:
    delta = vectors / "delta.safetensors"
    encode_file(vectors / "v0.safetensors", vectors / "v1.safetensors", delta)
    for name, digest in FILE_SHA256.items():
        found = hashlib.sha256((vectors / f"{name}.safetensors").read_bytes()).hexdigest()
        assert found == digest, name
    vendor_applies(vectors / "v0.safetensors", delta)
    assert (vectors / "v0.safetensors").read_bytes() == shard(VECTORS["v1"])


def test_a_chain_of_two_gives_the_second_target(vectors: Path) -> None:
    v0, v1, v2 = (vectors / f"{name}.safetensors" for name in VECTORS)
    encode_file(v0, v1, vectors / "first.safetensors")
    vendor_encodes(v1, v2, vectors / "second.safetensors")
    restored = copy(v0)
    vendor_applies(restored, vectors / "first.safetensors")
    apply_file(restored, vectors / "second.safetensors", vectors / "ours.safetensors")
    assert (vectors / "ours.safetensors").read_bytes() == v2.read_bytes()


def test_applied_twice_the_vendor_reverts_and_ours_refuses(vectors: Path) -> None:
    v0, v1 = vectors / "v0.safetensors", vectors / "v1.safetensors"
    encode_file(v0, v1, vectors / "delta.safetensors")
    served = copy(v1)
    with pytest.raises(vendor.DeltaChecksumError, match="478282853"):
        vendor_applies(served, vectors / "delta.safetensors")
    assert served.read_bytes() == v0.read_bytes()
    with pytest.raises(ChecksumMismatchError) as caught:
        apply_file(v1, vectors / "delta.safetensors", vectors / "out.safetensors")
    assert (caught.value.expected, caught.value.found) == ("478807142", "478282853")
    assert v1.read_bytes() == shard(VECTORS["v1"])
    assert not (vectors / "out.safetensors").exists()


# wire-format §7: what breaks one delta, and who says what

NAME = "model.layers.0.mlp.down_proj.weight"
FIRST = "model.embed_tokens.weight"


def without_a_key(frames: Frames, texts: Texts) -> None:
    del frames[NAME]


def with_another_key(frames: Frames, texts: Texts) -> None:
    frames["model.layers.7.stray"] = frames[NAME]
    texts["model.layers.7.stray"] = texts[NAME]


def garbage(frames: Frames, texts: Texts) -> None:
    frames[NAME] = b"\x00" * len(frames[NAME])


def truncated(frames: Frames, texts: Texts) -> None:
    frames[NAME] = frames[NAME][:-3]


def trailing(frames: Frames, texts: Texts) -> None:
    frames[NAME] += b"\x00\x01\x02\x03"


def of_another_size(frames: Frames, texts: Texts) -> None:
    frames[NAME] = zstandard.compress(b"\x00" * 17, 1)


def wrong_checksum(frames: Frames, texts: Texts) -> None:
    texts[NAME] = str(int(texts[NAME]) ^ 1)


def hex_checksum(frames: Frames, texts: Texts) -> None:
    texts[NAME] = f"{int(texts[NAME]):08x}"


def padded_checksum(frames: Frames, texts: Texts) -> None:
    texts[NAME] = f"0{texts[NAME]}"


def missing_checksum(frames: Frames, texts: Texts) -> None:
    del texts[NAME]


DAMAGE = [
    (without_a_key, vendor.DeltaKeyMismatchError),
    (with_another_key, vendor.DeltaKeyMismatchError),
    (garbage, vendor.DeltaDecompressionError),
    (truncated, vendor.DeltaDecompressionError),
    (trailing, vendor.DeltaDecompressionError),
    (of_another_size, vendor.DeltaSizeMismatchError),
    (wrong_checksum, vendor.DeltaChecksumError),
    (hex_checksum, vendor.DeltaChecksumError),
    (padded_checksum, vendor.DeltaChecksumError),
    (missing_checksum, BufferError),
]


@pytest.mark.parametrize(("damage", "theirs"), DAMAGE, ids=[one[0].__name__ for one in DAMAGE])
def test_both_refuse_a_damaged_delta(
    damage: Callable[[Frames, Texts], None], theirs: type[Exception], tmp_path: Path
) -> None:
    base, target = write_pair(tmp_path, 4, SMALL)
    delta, before = tmp_path / "delta.safetensors", base.read_bytes()
    encode_file(base, target, delta)
    frames, texts = open_delta(delta)
    damage(frames, texts)
    write_delta(delta, frames, texts)
    with pytest.raises(DeltaError) as caught:
        apply_file(base, delta, tmp_path / "out.safetensors")
    assert isinstance(caught.value, ChecksumMismatchError) == (damage is wrong_checksum)
    assert base.read_bytes() == before
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(theirs):
        vendor_applies(base, delta)


def test_both_refuse_another_base(tmp_path: Path) -> None:
    base, target = write_pair(tmp_path, 5, SMALL)
    (tmp_path / "other").mkdir()
    other, _ = write_pair(tmp_path / "other", 6, SMALL)
    encode_file(base, target, tmp_path / "delta.safetensors")
    with pytest.raises(ChecksumMismatchError):
        apply_file(other, tmp_path / "delta.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(vendor.DeltaChecksumError):
        vendor_applies(other, tmp_path / "delta.safetensors")


def test_the_vendor_takes_extra_metadata_and_so_does_ours(tmp_path: Path) -> None:
    base, target = write_pair(tmp_path, 7, SMALL)
    delta = tmp_path / "delta.safetensors"
    encode_file(base, target, delta)
    frames, texts = open_delta(delta)
    write_delta(delta, frames, texts | {"written_by": "a test"})
    verify_file(base, delta, target)
    vendor_applies(base, delta)
    assert base.read_bytes() == target.read_bytes()


# wire-format §4: where ours is stricter than the vendor, and why

SIZE = 200_000
ZERO = bytes(SIZE)


def test_the_vendor_takes_two_frames_ours_refuses() -> None:
    both = zstandard.compress(ZERO[:1000], 1) + zstandard.compress(ZERO[1000:], 1)
    assert zstd.decompress(both) == ZERO
    with pytest.raises(DeltaError):
        decode_tensor(ZERO, both, adler32=1, subject="w")


def test_nobody_reads_a_large_frame_without_its_size() -> None:
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    unsized = stream.compress(ZERO) + stream.flush()
    with pytest.raises(zstd.Error):
        zstd.decompress(unsized)
    with pytest.raises(DeltaError):
        decode_tensor(ZERO, unsized, adler32=1, subject="w")
