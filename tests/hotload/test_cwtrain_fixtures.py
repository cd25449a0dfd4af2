"""What CoreWeave's library once wrote and restored, ours restores and writes (wire-format §3, §12).

The recording guards in every run what `make conformance` shows against the library itself.
"""

import hashlib
import json
import zlib
from pathlib import Path

import pytest

from hotload.delta import Payload
from hotload.delta.byte_io import read_bytes
from hotload.delta.dialects import Dialect, Lineage
from hotload.directory.inputs import open_delta
from hotload.directory.operations import (
    apply_directory,
    convert_directory,
    encode_directory,
    verify_directory,
)
from hotload.directory.shards import open_shard
from hotload.errors import ChecksumMismatchError

RECORDED = Path(__file__).parents[1] / "golden" / "cwtrain"
BASE, DELTA, TARGET = (RECORDED / name for name in ("base", "delta", "target"))
INDEX = "model.safetensors.index.json"
LINEAGE = Lineage("run-000001-0badcafe", "run-000000-0badcafe")


def adler32(directory: Path) -> dict[str, str]:
    """Every tensor's, in the spelling of the mirror's manifest."""
    sums = {}
    for path in directory.glob("*.safetensors"):
        with open_shard(path) as shard:
            for tensor in shard.header.tensors:
                start = shard.header.data_start + tensor.start
                sums[tensor.name] = (
                    f"{zlib.adler32(read_bytes(shard, start, tensor.size_bytes)):08x}"
                )
    return sums


def described(payloads: dict[str, Payload]) -> dict[str, str]:
    return {name: payload.checksum for name, payload in payloads.items()}


def test_the_recording_is_the_one_its_readme_describes() -> None:
    told = (RECORDED / "README.md").read_text(encoding="utf-8")
    files = [path for path in RECORDED.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) > 10
    for path in files:
        data, name = path.read_bytes(), path.relative_to(RECORDED).as_posix()
        assert f"| `{name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |" in told


def test_their_delta_restores_what_their_mirror_held(tmp_path: Path) -> None:
    verify_directory(BASE, DELTA, TARGET)
    apply_directory(BASE, DELTA, tmp_path / "out")
    for path in TARGET.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    manifest = json.loads((RECORDED / "restored.json").read_text())
    assert adler32(tmp_path / "out") == manifest["tensors"]


def test_our_delta_says_what_theirs_says(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    encode_directory(BASE, TARGET, ours, dialect=Dialect.COREWEAVE, lineage=LINEAGE)
    told, theirs = (json.loads((each / INDEX).read_text()) for each in (ours, DELTA))
    assert told["metadata"] == theirs["metadata"]
    assert told["weight_map"].keys() == theirs["weight_map"].keys()
    with open_delta(ours) as mine, open_delta(DELTA) as recorded:
        assert described(mine.payloads) == described(recorded.payloads)
        assert "lm_head.weight" not in recorded.payloads


def test_their_delta_in_another_dress_restores_the_same(tmp_path: Path) -> None:
    convert_directory(DELTA, tmp_path / "fireworks", dialect=Dialect.FIREWORKS, base=BASE)
    verify_directory(BASE, tmp_path / "fireworks", TARGET)
    lineage = Lineage("000001", "000000")
    convert_directory(DELTA, tmp_path / "slime", dialect=Dialect.SLIME, lineage=lineage)
    verify_directory(BASE, tmp_path / "slime", TARGET)


def test_applied_again_it_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ChecksumMismatchError):
        apply_directory(TARGET, DELTA, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
