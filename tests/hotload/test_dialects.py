"""What each receiver wants around the payloads, and which indices are refused."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.checkpoint.names import INDEX_FILE
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import (
    DeltaIndex,
    Dialect,
    Lineage,
    check_lineage,
    envelope_of,
    join_lineages,
    parse_index,
    render_index,
)
from hotload.delta.envelope import ARC_V2, Envelope
from hotload.errors import DeltaError, InvalidIdentityError

SLIME = Lineage("000003", "000002")
COREWEAVE = Lineage("run-000003-0123abcd", "run-000002-0123abcd")
WEIGHT_MAP = {"model.b": "model-00002-of-00002.safetensors", "model.a": "one.safetensors"}


def index(**changed: object) -> bytes:
    """The index of a slime delta with some of its metadata changed; None takes a key away."""
    metadata = {
        "version": "000003",
        "base_version": "000002",
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": "xxh3-128",
    } | changed
    kept = {key: value for key, value in metadata.items() if value is not None}
    return json.dumps({"metadata": kept, "weight_map": WEIGHT_MAP}).encode()


# Envelopes


def test_the_envelopes_of_the_three() -> None:
    assert envelope_of(Dialect.FIREWORKS) == ARC_V2
    assert envelope_of(Dialect.COREWEAVE) == Envelope(Checksum.ADLER32, False, False)
    for checksum in Checksum:
        assert envelope_of(Dialect.SLIME, checksum) == Envelope(checksum, False, False)


@pytest.mark.parametrize("dialect", [Dialect.FIREWORKS, Dialect.COREWEAVE])
@pytest.mark.parametrize("checksum", [Checksum.XXH3_128, Checksum.BLAKE3])
def test_a_checksum_its_receivers_do_not_compare_is_refused(
    dialect: Dialect, checksum: Checksum
) -> None:
    with pytest.raises(DeltaError, match=f"{dialect}.*adler32, not {checksum}"):
        envelope_of(dialect, checksum)


# Index


def test_the_index_of_a_slime_delta_to_the_letter() -> None:
    found = json.loads(render_index(SLIME, Checksum.XXH3_128, WEIGHT_MAP))
    assert found == json.loads(index())
    assert list(found["weight_map"]) == ["model.a", "model.b"]


@pytest.mark.parametrize("lineage", [SLIME, COREWEAVE])
@pytest.mark.parametrize("weight_map", [WEIGHT_MAP, {}])
def test_what_is_rendered_is_parsed(lineage: Lineage, weight_map: dict[str, str]) -> None:
    dialect = Dialect.SLIME if lineage is SLIME else Dialect.COREWEAVE
    data = render_index(lineage, Checksum.ADLER32, weight_map)
    expected = DeltaIndex(dialect, envelope_of(dialect), lineage, weight_map)
    assert parse_index(data) == expected


@pytest.mark.parametrize("metadata", ['{"total_size": 12}', "{}", '{"checksum_format": "adler32"}'])
def test_an_index_without_encoding_is_that_of_a_full(metadata: str) -> None:
    data = f'{{"metadata": {metadata}, "weight_map": {{"w": "a.safetensors"}}}}'
    expected = DeltaIndex(Dialect.FIREWORKS, ARC_V2, None, {"w": "a.safetensors"})
    assert parse_index(data.encode()) == expected
    assert parse_index(b'{"weight_map": {"w": "a.safetensors"}}') == expected


def test_metadata_of_others_is_let_be() -> None:
    assert parse_index(index(total_size=12, writer="x")) == parse_index(index())


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (index(delta_encoding="overwrite"), r"'overwrite'.*'xor'; no other is supported"),
        (index(delta_encoding=1), "delta_encoding"),
        (index(delta_encoding=["xor"]), "delta_encoding"),
        (index(compression_format="lz4"), "'lz4'.*'zstd'"),
        (index(compression_format=None), "compression_format: found None"),
        (index(checksum_format="crc32"), "checksum_format.*'crc32'"),
        (index(checksum_format=None), "checksum_format"),
        (index(checksum_format={}), "checksum_format"),
        (index(version=3), "two texts"),
        (index(base_version=None), "two texts"),
        (index(version="3", base_version="2"), "not a number"),
        (index(version="0000003", base_version="0000002"), "not a number"),
        (index(version="٠٠٠٠٠٣", base_version="٠٠٠٠٠٢"), "refused"),
        (index(version="9" * 30), "not a number"),
        (index(version="000002"), "cannot follow 000002"),
        (index(version="000001"), "cannot follow 000002"),
        (index(version="a", base_version="a", checksum_format="adler32"), "cannot follow a"),
        (index(version="a/b", base_version="a"), "refused"),
        (index(version="run-3", base_version="initial"), "reserved"),
        (index(version="run-3", base_version="run-2"), "coreweave.*adler32, not xxh3-128"),
        (b"", "json"),
        (b"[]", "JSON object"),
        (b"\xff", "json"),
        (b"[" * 100_000, "json"),
        (b'{"weight_map": {}, "weight_map": {}}', "every key once"),
        (b"{}", "weight_map: found None"),
        (b'{"weight_map": []}', "weight_map"),
        (b'{"weight_map": {"w": 1}}', "weight_map of 'w'"),
        (b'{"weight_map": {"w": "a.bin"}}', r"weight_map of 'w'.*\.safetensors"),
        (b'{"weight_map": {"w": "../a.safetensors"}}', "plain name"),
        (b'{"weight_map": {"w": "/a.safetensors"}}', "plain name"),
        (b'{"metadata": [], "weight_map": {}}', "metadata"),
    ],
)
def test_an_index_of_anything_else_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(DeltaError, match=told) as caught:
        parse_index(data)
    assert str(caught.value).startswith(INDEX_FILE)
    assert len(str(caught.value)) < 600


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    with suppress(DeltaError):
        parse_index(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["xor"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@given(st.sampled_from(sorted(json.loads(index())["metadata"])), json_values)
def test_no_value_breaks_the_parser(key: str, value: object) -> None:
    with suppress(DeltaError):
        parse_index(index(**{key: value}))


# Lineage


@pytest.mark.parametrize(
    ("dialect", "lineage"),
    [
        (Dialect.FIREWORKS, None),
        (Dialect.SLIME, SLIME),
        (Dialect.SLIME, Lineage("000001", "000000")),
        (Dialect.SLIME, Lineage("1000000", "999999")),
        (Dialect.SLIME, Lineage("1000001", "1000000")),
        (Dialect.COREWEAVE, COREWEAVE),
    ],
)
def test_lineages_each_dialect_takes(dialect: Dialect, lineage: Lineage | None) -> None:
    check_lineage(dialect, lineage)


@pytest.mark.parametrize(
    ("dialect", "lineage", "told"),
    [
        (Dialect.FIREWORKS, COREWEAVE, "in the signal"),
        (Dialect.SLIME, None, "slime deltas state a version"),
        (Dialect.SLIME, COREWEAVE, "six digits"),
        (Dialect.SLIME, Lineage("3", "2"), "six digits"),
        (Dialect.SLIME, Lineage("0000003", "0000002"), "six digits"),
        (Dialect.SLIME, Lineage("000004", "000002"), "expected 000003"),
        (Dialect.SLIME, Lineage("000000", "999999"), "cannot follow"),
        (Dialect.SLIME, Lineage("000002", "000002"), "cannot follow"),
        (Dialect.COREWEAVE, None, "coreweave deltas state a version"),
        (Dialect.COREWEAVE, SLIME, "not a number"),
        (Dialect.COREWEAVE, Lineage("a", "a"), "cannot follow"),
        (Dialect.COREWEAVE, Lineage("a/b", "a"), "expected 1-128"),
        (Dialect.COREWEAVE, Lineage("a", "latest"), "reserved"),
    ],
)
def test_lineages_a_dialect_refuses(dialect: Dialect, lineage: Lineage | None, told: str) -> None:
    with pytest.raises(InvalidIdentityError, match=told):
        check_lineage(dialect, lineage)


@given(st.integers(0, 10**17))
def test_every_next_version_is_taken_and_read_as_it_was_written(base: int) -> None:
    lineage = Lineage(f"{base + 1:06d}", f"{base:06d}")
    check_lineage(Dialect.SLIME, lineage)
    assert parse_index(render_index(lineage, Checksum.BLAKE3, {})).lineage == lineage


def test_lineages_join_end_to_end() -> None:
    chain = [Lineage(f"{n + 1:06d}", f"{n:06d}") for n in range(5)]
    joined = join_lineages([*chain])
    assert joined == Lineage("000005", "000000")
    data = render_index(joined, Checksum.ADLER32, {})
    assert parse_index(data).lineage == joined
    assert join_lineages([None, None]) is None
    for broken in ([chain[0], chain[2]], [chain[1], chain[0]], [chain[0], chain[0]]):
        with pytest.raises(DeltaError, match="follows"):
            join_lineages([*broken])
