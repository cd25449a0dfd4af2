"""Headers: what we write others read, what they write we read, and nothing hostile gets through."""

import json
import pickle
import subprocess
import sys
import tracemalloc
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from hotload.checkpoint.safetensors import (
    DTYPE_BITS,
    TensorInfo,
    header_size,
    name_obstacle,
    read_header,
    read_json_object,
    render_header,
    storage_bytes,
)
from hotload.errors import Finding, InvalidCheckpointError, shorten

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTILE = {
    "empty": "truncated",
    "seven-bytes": "truncated",
    "huge-header": "truncated",
    "absurd-header": "header_too_large",
    "not-an-object": "header_not_json",
    "leading-space": "header_not_json",
    "not-json": "json",
    "not-utf8": "json",
    "lone-surrogate": "tensor_name",
    "deep": "json",
    "deep-enough": "json",
    "long-number": "json",
    "nan-shape": "shape",
    "duplicate-tensor": "json",
    "duplicate-field": "json",
    "duplicate-metadata": "json",
    "metadata-null-value": "metadata",
    "metadata-nested": "metadata",
    "metadata-number": "metadata",
    "metadata-list": "metadata",
    "entry-is-a-list": "tensor_entry",
    "entry-without-shape": "tensor_entry",
    "unknown-dtype": "dtype",
    "dtype-is-a-list": "dtype",
    "negative-shape": "shape",
    "boolean-shape": "shape",
    "float-shape": "shape",
    "product-overflow": "shape",
    "half-a-byte": "tensor_size",
    "size-mismatch": "tensor_size",
    "reversed-offsets": "tensor_size",
    "three-offsets": "offsets",
    "beyond-the-file": "truncated",
    "trailing-byte": "trailing_bytes",
    "overlap": "overlap",
    "gap": "gap",
    "late-start": "gap",
}


def parse(data: bytes, file: str = "x.safetensors"):
    size = header_size(data[:8], file=file, size_bytes=len(data))
    return read_header(data[:size], file=file, size_bytes=len(data))


def finding_count(data: bytes) -> int:
    try:
        parse(data)
    except InvalidCheckpointError as error:
        return len(error.findings)
    return 0


@st.composite
def layouts(draw: st.DrawFn) -> list[TensorInfo]:
    names = draw(st.lists(st.text(max_size=20), unique=True, max_size=6))
    tensors, end = [], 0
    for name in names:
        if name == "__metadata__" or not name.isprintable():
            continue
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        bits = DTYPE_BITS[dtype] * prod(shape)
        if bits % 8:
            shape, bits = [*shape, 4], bits * 4
        start, end = end, end + bits // 8
        tensors.append(TensorInfo(name, dtype, tuple(shape), start, end))
    return tensors


@pytest.mark.slow
@given(layouts(), st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3))
def test_what_is_rendered_is_read_back(tensors: list[TensorInfo], metadata: dict) -> None:
    metadata = {key: value for key, value in metadata.items() if (key + value).isprintable()}
    head = render_header(tensors, metadata)
    size_bytes = len(head) + (tensors[-1].end if tensors else 0)
    header = read_header(head, file="x.safetensors", size_bytes=size_bytes)
    assert sorted(header.tensors, key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    assert dict(header.metadata) == metadata
    assert header.data_start == len(head)
    assert len(head) % 8 == 0
    assert [tensor.start for tensor in header.tensors] == sorted(t.start for t in tensors)
    assert dict(header.by_name) == {tensor.name: tensor for tensor in tensors}


@given(layouts())
def test_the_safetensors_library_reads_what_is_rendered(tensors: list[TensorInfo]) -> None:
    # The library does not hand out the packed dtypes in numpy, but parses them all.
    data = bytes(tensors[-1].end) if tensors else b""
    found = dict(deserialize(render_header(tensors, {}) + data))
    assert found.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        assert tuple(found[tensor.name]["shape"]) == tensor.shape
        assert len(found[tensor.name]["data"]) == tensor.size_bytes


def test_what_the_safetensors_library_writes_is_read() -> None:
    arrays = {
        "scalar": np.array(3, np.float32),
        "empty": np.empty((0, 4), np.int64),
        "half": np.ones((2, 3), np.float16),
        "flags": np.array([True, False]),
    }
    data = save(arrays, {"format": "np"})
    header = parse(data)
    assert header.metadata == {"format": "np"}
    for name, array in arrays.items():
        tensor = header.by_name[name]
        assert tensor.shape == array.shape
        start = header.data_start + tensor.start
        assert data[start : start + tensor.size_bytes] == array.tobytes()


def test_the_vectors_of_the_contract_are_read() -> None:
    data = (GOLDEN / "v0.safetensors").read_bytes()
    header = parse(data)
    assert header.data_start == 8 + 96
    assert header.tensors == (TensorInfo("w", "BF16", (2, 3), 0, 12),)
    assert render_header(header.tensors, header.metadata) == data[: header.data_start]


@pytest.mark.parametrize(("name", "rule"), HOSTILE.items(), ids=HOSTILE)
def test_a_hostile_shard_is_refused(name: str, rule: str) -> None:
    data = (GOLDEN / "hostile" / f"shard-{name}.safetensors").read_bytes()
    with pytest.raises(InvalidCheckpointError) as caught:
        parse(data, "bad.safetensors")
    (finding,) = caught.value.findings
    assert finding.rule == rule
    assert finding.file == "bad.safetensors"
    assert finding.who == "trainer"
    assert finding.found
    assert finding.expected
    assert len(str(finding)) < 700
    assert pickle.loads(pickle.dumps(caught.value)).findings == caught.value.findings


def test_every_hostile_shard_has_its_rule() -> None:
    names = {path.stem.removeprefix("shard-") for path in (GOLDEN / "hostile").glob("shard-*")}
    assert names == set(HOSTILE)


def test_the_golden_files_are_what_their_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GOLDEN / "rebuild.py", tmp_path], check=True)
    rebuilt = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(rebuilt) > 60
    for path in rebuilt:
        assert path.read_bytes() == (GOLDEN / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.mark.parametrize("length", [90_000_000, 100_000_000, 1 << 40, (1 << 64) - 1])
def test_a_small_file_with_a_large_header_costs_no_memory(length: int) -> None:
    data = length.to_bytes(8, "little") + b"{" + bytes(91)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidCheckpointError):
            parse(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@given(st.binary(max_size=200))
def test_any_bytes_are_a_shard_or_a_finding(data: bytes) -> None:
    assert finding_count(data) <= 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3),
    st.integers(0, 9),
)
def test_any_json_is_a_shard_or_a_finding(entries: dict, size: int) -> None:
    text = json.dumps(entries).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(size)
    assert finding_count(data) <= 1


@given(st.integers(0, 116), st.integers(0, 255))
def test_one_changed_byte_is_a_shard_or_a_finding(at: int, byte: int) -> None:
    data = bytearray((GOLDEN / "v0.safetensors").read_bytes())
    data[at : at + 1] = bytes([byte])
    assert finding_count(bytes(data)) <= 1


def test_a_head_shorter_than_its_header_is_refused() -> None:
    data = (GOLDEN / "v0.safetensors").read_bytes()
    with pytest.raises(InvalidCheckpointError, match="truncated"):
        read_header(data[:50], file="x.safetensors", size_bytes=len(data))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "ä.safetensors", "a b"])
def test_plain_names_pass(name: str) -> None:
    assert name_obstacle(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../a",
        "a\\b",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 256,
        3,
        None,
    ],
    ids=ascii,
)
def test_names_that_could_leave_the_directory_are_refused(name: object) -> None:
    assert name_obstacle(name)


def test_json_documents_are_held_to_the_same_rules() -> None:
    assert read_json_object(b'{"a": [1, {"b": null}]}', file="x.json") == {"a": [1, {"b": None}]}
    for data in (b'{"a": {"b": 1, "b": 2}}', b"[]", b"\xff", b'{"a": 1', b"[" * 5000):
        with pytest.raises(InvalidCheckpointError, match=r"x\.json"):
            read_json_object(data, file="x.json")


def test_a_finding_says_where_what_and_who() -> None:
    finding = Finding("gap", "a.safetensors", "w", "a start at 3", "a start at 0")
    assert str(finding) == (
        "a.safetensors, tensor 'w': gap: found a start at 3, expected a start at 0 "
        "[error, trainer acts]"
    )


def test_shown_values_are_bounded_and_printable() -> None:
    assert len(shorten("x" * 10_000)) == 158
    assert shorten("\x1b[2J\n") == r"'\x1b[2J\n'"


def test_a_shape_of_many_dimensions_costs_nothing() -> None:
    assert storage_bytes("BF16", [1 << 40] * 100_000) is None
    assert storage_bytes("BF16", [3, 5]) == 30
    assert storage_bytes("F4", [3]) is None
