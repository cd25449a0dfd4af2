"""Whatever a store holds: one clear error, nothing written, little memory (wire-format §11).

`test_shards.py` and `test_codec.py` say why each hostile shard and delta is refused; here all of
them pass through the doors that the command line uses.
"""

import json
import shutil
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

import hotload
from hotload.delta.dialects import Dialect, Lineage, parse_index
from hotload.directory.inputs import open_delta
from hotload.directory.operations import (
    apply_directory,
    convert_directory,
    fold_directory,
    verify_directory,
)
from hotload.directory.shards import apply_file, open_shard
from hotload.errors import DeltaError, HotLoadError, InvalidCheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTILE = GOLDEN / "hostile"
DELTAS, SHARDS = sorted(HOSTILE.glob("delta-*")), sorted(HOSTILE.glob("shard-*"))
DIALECTS = ("fireworks", "slime", "slime-xxh3-128", "slime-blake3", "coreweave")
INDEX = "model.safetensors.index.json"
BOUND_BYTES = 8 << 20  # a few pieces of the codec; no file here has 50 KiB

# What an index is refused for; the golden one beside them is followed.
INDEXES = {
    "empty": "valid JSON",
    "not-json": "valid JSON",
    "not-utf8": "valid JSON",
    "cut": "valid JSON",
    "list": "a JSON object",
    "deep": "nested too deeply",
    "long-number": "valid JSON",
    "metadata-list": "metadata",
    "metadata-null": "metadata",
    "no-weight-map": "weight_map",
    "weight-map-list": "weight_map",
    "weight-map-null": "weight_map",
    "lone-surrogate": None,  # no shard holds such a name, so the index is followed to the shard
    "duplicate-weight-map": "twice",
    "duplicate-tensor": "twice",
    "duplicate-version": "twice",
    "file-number": "a plain name",
    "file-null": "a plain name",
    "file-list": "a plain name",
    "file-parent": "a plain name",
    "file-sub-directory": "a plain name",
    "file-absolute": "a plain name",
    "file-backslash": "a plain name",
    "file-dots": "a plain name",
    "file-empty": "a plain name",
    "file-nul": "a plain name",
    "file-newline": "a plain name",
    "file-query": "a plain name",
    "file-long": "a plain name",
    "file-no-shard": r"\.safetensors",
    "encoding-overwrite": "delta_encoding",
    "encoding-null": "delta_encoding",
    "encoding-list": "delta_encoding",
    "compression-lz4": "compression_format",
    "compression-missing": "compression_format",
    "checksum-crc32": "checksum_format",
    "checksum-list": "checksum_format",
    "checksum-missing": "checksum_format",
    "version-missing": "version",
    "base-version-missing": "version",
    "version-number": "version",
    "version-is-its-base": "cannot follow",
    "version-before-its-base": "cannot follow",
    "version-and-identity": "'000000' refused",
    "identity-of-a-path": "'../up' refused",
    "identity-reserved": "latest",
    "identity-signed": r"'\+00001' refused",
    "identity-digits": "'1' refused",
    "identities-with-blake3": "adler32",
}


def of_w(directory: Path, index: bytes, delta: bytes, base: bytes) -> tuple[Path, Path]:
    """A checkpoint of the one shard `base`, and a delta directory of `delta` and this index."""
    for name, data in (("base", base), ("delta", delta)):
        (directory / name).mkdir()
        (directory / name / "model.safetensors").write_bytes(data)
    (directory / "delta" / INDEX).write_bytes(index)
    return directory / "base", directory / "delta"


def everything(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.safetensors").read_bytes()


def valid_index() -> bytes:
    index = json.loads((GOLDEN / "slime" / INDEX).read_bytes())
    return json.dumps({**index, "weight_map": {"w": "model.safetensors"}}).encode()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_golden_delta_of_every_dialect_restores_the_target(
    tmp_path: Path, dialect: str
) -> None:
    verify_directory(GOLDEN / "base", GOLDEN / dialect, GOLDEN / "target")
    apply_directory(GOLDEN / "base", GOLDEN / dialect, tmp_path / "out")
    for path in (GOLDEN / "target").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("other", DIALECTS)
def test_a_delta_of_one_dialect_in_a_directory_of_another_is_refused(
    tmp_path: Path, dialect: str, other: str
) -> None:
    """An index that promises one dialect over shards written for another."""
    checksums = {
        name: json.loads((GOLDEN / name / INDEX).read_bytes())["metadata"] for name in DIALECTS
    }
    if checksums[dialect].get("checksum_format") == checksums[other].get("checksum_format"):
        return
    shutil.copytree(GOLDEN / dialect, tmp_path / "delta")
    shutil.copy(GOLDEN / other / INDEX, tmp_path / "delta" / INDEX)
    with pytest.raises(DeltaError):
        apply_directory(GOLDEN / "base", tmp_path / "delta", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize("name", INDEXES)
def test_a_hostile_index_is_refused(tmp_path: Path, name: str) -> None:
    data = (HOSTILE / f"index-{name}.json").read_bytes()
    if (reason := INDEXES[name]) is not None:
        with pytest.raises(DeltaError, match=reason) as caught:
            parse_index(data)
        assert len(str(caught.value)) < 1000
    base, delta = of_w(tmp_path, data, golden("delta-hex"), golden("v0"))
    before = everything(tmp_path)
    out = tmp_path / "out"
    lineage = Lineage("000002", "000001")
    for refused in (
        lambda: open_delta(delta).__enter__(),
        lambda: apply_directory(base, delta, out),
        lambda: verify_directory(base, delta, base),
        lambda: convert_directory(delta, out, dialect=Dialect.SLIME, lineage=lineage, base=base),
        lambda: fold_directory([delta, delta], out),
    ):
        with pytest.raises(DeltaError):
            refused()
    assert everything(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def test_every_hostile_index_has_its_reason_and_the_valid_one_is_followed(tmp_path: Path) -> None:
    names = {path.stem.removeprefix("index-") for path in HOSTILE.glob("index-*")}
    assert names == set(INDEXES)
    base, delta = of_w(tmp_path, valid_index(), golden("delta-hex"), golden("v0"))
    apply_directory(base, delta, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == golden("v1")


@pytest.mark.parametrize("path", [*DELTAS, *SHARDS], ids=lambda path: path.stem)
@pytest.mark.parametrize("dialect", ["fireworks", "slime"])
def test_a_hostile_file_in_a_delta_directory_is_refused(
    tmp_path: Path, path: Path, dialect: str
) -> None:
    if path.stem == "delta-hex-adler" and dialect == "slime":
        return  # there it is right
    base, delta = of_w(tmp_path, valid_index(), path.read_bytes(), golden("v0"))
    if dialect == "fireworks":
        (delta / INDEX).write_bytes(b'{"weight_map": {"w": "model.safetensors"}}')
        (base / INDEX).write_bytes((delta / INDEX).read_bytes())
    before = everything(tmp_path)
    for door in (
        lambda: apply_directory(base, delta, tmp_path / "out"),
        lambda: verify_directory(base, delta, base),
    ):
        with pytest.raises(DeltaError) as caught:
            door()
        assert len(str(caught.value)) < 1000
    assert everything(tmp_path) == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "delta"]


@pytest.mark.parametrize("path", SHARDS, ids=lambda path: path.stem)
def test_a_hostile_shard_in_the_base_is_the_trainers(tmp_path: Path, path: Path) -> None:
    base, delta = of_w(tmp_path, valid_index(), golden("delta-hex"), path.read_bytes())
    with pytest.raises(InvalidCheckpointError) as caught:
        apply_directory(base, delta, tmp_path / "out")
    assert {finding.who for finding in caught.value.findings} == {"trainer"}
    assert not (tmp_path / "out").exists()


def test_a_delta_applied_twice_or_to_another_base_is_refused_and_the_base_stays(
    tmp_path: Path,
) -> None:
    before = everything(GOLDEN / "target")
    for dialect in DIALECTS:
        with pytest.raises(DeltaError, match="checksum"):
            apply_directory(GOLDEN / "target", GOLDEN / dialect, tmp_path / "out")
    assert everything(GOLDEN / "target") == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", [*DELTAS, *SHARDS, *sorted(HOSTILE.glob("index-*"))], ids=lambda path: path.stem
)
def test_a_hostile_file_costs_little_memory(tmp_path: Path, path: Path) -> None:
    tracemalloc.start()
    try:
        with suppress(HotLoadError):
            if path.suffix == ".json":
                parse_index(path.read_bytes())
            elif path in SHARDS:
                with open_shard(path):
                    pass
            else:
                apply_file(GOLDEN / "v0.safetensors", path, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BOUND_BYTES
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from pathlib import Path
from hotload.errors import HotLoadError
from hotload.directory.shards import (apply_file, open_shard)

base, out, *paths = map(Path, sys.argv[1:])
def refuse(path):
    try:
        if path.name.startswith("delta-"):
            apply_file(base, path, out)
        else:
            with open_shard(path):
                pass
    except HotLoadError:
        return 1
    return 0

refuse(paths[0])  # what is loaded and allocated once
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(sum(map(refuse, paths)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_nor_does_the_decoder_behind_python_take_much(tmp_path: Path) -> None:
    """What libzstd allocates Python does not trace: a limit on the address space does."""
    paths = [*DELTAS, *SHARDS]
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, GOLDEN / "v0.safetensors", tmp_path / "out", *paths],
        cwd=Path(hotload.__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert int(run.stdout) == len(paths)
    assert list(tmp_path.iterdir()) == []
