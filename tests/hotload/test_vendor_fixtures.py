"""What the vendor's encoder once wrote restores with ours (wire-format §2, §12).

The recording guards in every run what `make oracles` shows against the package itself.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from hotload.directory.shards import apply_file, encode_file, open_shard, verify_file
from hotload.errors import ChecksumMismatchError

VENDOR = Path(__file__).parents[1] / "golden" / "vendor"
BASE, DELTA, TARGET = (VENDOR / f"{name}.safetensors" for name in ("base", "delta", "target"))


@pytest.mark.parametrize("path", [BASE, DELTA, TARGET], ids=lambda path: path.name)
def test_the_recording_is_the_one_its_readme_describes(path: Path) -> None:
    data = path.read_bytes()
    row = f"| `{path.name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |"
    assert row in (VENDOR / "README.md").read_text(encoding="utf-8")


def test_the_recording_holds_every_kind_of_tensor() -> None:
    with open_shard(BASE) as shard:
        dtypes = {tensor.dtype for tensor in shard.header.tensors}
        sizes = {tensor.size_bytes for tensor in shard.header.tensors}
        shapes = {tensor.shape for tensor in shard.header.tensors}
    assert dtypes >= {"BF16", "F16", "F32", "I8", "I64", "BOOL", "F8_E4M3", "F8_E5M2"}
    assert 0 in sizes
    assert () in shapes


def test_the_vendor_orders_its_tensors_otherwise_than_the_base() -> None:
    with open_shard(BASE) as base, open_shard(DELTA) as delta:
        before = [tensor.name for tensor in base.header.tensors]
        after = [tensor.name for tensor in delta.header.tensors]
    assert sorted(before) == sorted(after)
    assert before != after


def test_ours_restores_the_target_bit_for_bit(tmp_path: Path) -> None:
    verify_file(BASE, DELTA, TARGET)
    apply_file(BASE, DELTA, tmp_path / "restored.safetensors")
    assert (tmp_path / "restored.safetensors").read_bytes() == TARGET.read_bytes()


def test_ours_writes_the_same_keys_and_checksums(tmp_path: Path) -> None:
    ours = tmp_path / "delta.safetensors"
    encode_file(BASE, TARGET, ours)
    verify_file(BASE, ours, TARGET)
    with open_shard(ours) as mine, open_shard(DELTA) as theirs:
        assert dict(mine.header.metadata) == dict(theirs.header.metadata)
        assert mine.header.by_name.keys() == theirs.header.by_name.keys()
        assert {tensor.dtype for tensor in mine.header.tensors} == {"U8"}


def test_applied_to_the_target_it_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ChecksumMismatchError):
        apply_file(TARGET, DELTA, tmp_path / "restored.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_one_flipped_checksum_digit_is_refused(tmp_path: Path) -> None:
    data = DELTA.read_bytes()
    size = int.from_bytes(data[:8], "little")
    texts = json.loads(data[8 : 8 + size])["__metadata__"]
    name, text = sorted(texts.items())[0]
    other = text[:-1] + str((int(text[-1]) + 1) % 10)
    head, count = re.subn(
        rb'("%s":")%s"' % (name.encode(), text.encode()),
        rb'\g<1>%s"' % other.encode(),
        data[: 8 + size],
    )
    assert count == 1
    damaged = tmp_path / "delta.safetensors"
    damaged.write_bytes(head + data[8 + size :])
    shutil.copy(BASE, tmp_path)
    with pytest.raises(ChecksumMismatchError) as caught:
        apply_file(tmp_path / BASE.name, damaged, tmp_path / "restored.safetensors")
    assert caught.value.expected == other
    assert (tmp_path / BASE.name).read_bytes() == BASE.read_bytes()
