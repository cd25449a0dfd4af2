"""What is told of a checkpoint or a delta: kind, order of layers, bytes, what changed."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hotload.checkpoint.anatomy import is_delta, natural_key, place_key
from hotload.checkpoint.safetensors import ShardHeader, TensorInfo
from hotload.delta import Payload, encode_tensor
from hotload.delta.byte_io import InMemory
from hotload.delta.checksums import Checksum
from hotload.delta.inspect_delta import (
    TensorFacts,
    delta_facts,
    facts_by_part,
    plain_facts,
    spec_forms,
    total_facts,
)
from hotload.directory.shards import open_shard
from hotload.errors import DeltaError


def payload(frame: bytes, before: bytes = b"", after: bytes = b"") -> Payload:
    """A payload somewhere in a file."""
    source = InMemory(before + frame + after)
    end = len(before) + len(frame)
    return Payload(source, "a.safetensors", len(before), end, "00000001", Checksum.ADLER32)


def facts(name: str, changed: int | None = 1, size_bytes: int = 8) -> TensorFacts:
    return TensorFacts(name, "a.safetensors", "BF16", size_bytes, 4, size_bytes // 2, changed)


def header(metadata: Mapping[str, str], *tensors: tuple[str, str, tuple[int, ...]]) -> ShardHeader:
    entries = tuple(TensorInfo(name, dtype, shape, 0, 0) for name, dtype, shape in tensors)
    return ShardHeader("a.safetensors", entries, metadata, 8, 8)


@pytest.mark.parametrize(
    ("shards", "index", "expected"),
    [
        ([header({"w": "1"}, ("w", "U8", (9,)))], None, True),
        ([header({}, ("w", "U8", (9,)))], {"weight_map": {}}, True),
        ([], {"metadata": {"delta_encoding": "xor"}, "weight_map": {}}, True),
        ([header({}, ("w", "BF16", (9,)))], {"metadata": {"total_size": 18}}, False),
        # Blocks of a packed format, beside what they are scaled by.
        ([header({}, ("w_blocks", "U8", (2, 4)), ("w_scales", "U8", (2,)))], None, False),
        ([header({"w": "0000abcd"}, ("w", "BF16", (9,)))], None, False),
        ([], None, False),
        ([header({}, ("w", "BF16", (9,)))], {"metadata": "delta_encoding"}, False),
    ],
)
def test_a_delta_is_known_by_its_index_or_its_payloads(
    shards: list[ShardHeader], index: dict[str, object] | None, expected: bool
) -> None:
    assert is_delta(shards, index) is expected


def test_parts_come_in_the_order_of_the_model() -> None:
    names = [
        "lm_head.weight",
        "model.layers.10.mlp.w",
        "model.norm.weight",
        "rotary.inv_freq",
        "model.layers.9.mlp.w",
        "model.embed_tokens.weight",
        "model.layers.10.attn.w",
    ]
    assert [(one.part, one.tensor_count) for one in facts_by_part(map(facts, names))] == [
        ("embeddings", 1),
        ("model.layers.9", 1),
        ("model.layers.10", 2),
        ("final norm", 1),
        ("head", 1),
        ("other", 1),
    ]


@given(st.lists(st.from_regex(r"(layers\.)?[0-9]{0,30}[a-z]?", fullmatch=True), unique=True))
def test_no_two_names_share_a_key_and_numbers_sort_as_numbers(names: list[str]) -> None:
    assert len({natural_key(name) for name in names}) == len(names)
    numbers = sorted({int(name) for name in names if name.isdigit()})
    assert sorted(map(str, numbers), key=natural_key) == [str(number) for number in numbers]


def test_a_number_of_thousands_of_digits_is_no_problem() -> None:
    assert place_key("model.layers." + "9" * 10_000) > place_key("model.layers.10")


@given(
    st.lists(st.integers(0, 65535), min_size=1, max_size=300),
    st.sets(st.integers(0, 299)),
    st.sampled_from(["BF16", "U8"]),
)
def test_changes_are_counted_in_elements_of_the_tensor(
    values: list[int], places: set[int], dtype: str
) -> None:
    base = np.array(values, "<u2")
    target = base.copy()
    changed = [place for place in places if place < len(values)]
    target[changed] ^= 0x0101  # both bytes of the element
    frame, _ = encode_tensor(base.tobytes(), target.tobytes())
    shape = (len(values),) if dtype == "BF16" else (2 * len(values),)
    found = delta_facts("w", payload(frame, b"before", b"after"), (dtype, shape))
    width = 1 if dtype == "BF16" else 2
    assert found.changed_element_count == width * len(changed)
    assert found.element_count == width * len(values)
    assert (found.size_bytes, found.stored_size_bytes) == (base.nbytes, len(frame))


def test_without_a_dtype_bytes_are_counted() -> None:
    frame, _ = encode_tensor(bytes(100), bytes(60) + b"\1" * 40)
    found = delta_facts("w", payload(frame), None)
    assert (found.dtype, found.element_count, found.changed_element_count) == (None, 100, 40)


def test_a_scalar_and_an_empty_tensor_have_facts_too() -> None:
    scalar, _ = encode_tensor(b"\0\0\0\0", b"\0\0\0\1")
    assert delta_facts("w", payload(scalar), ("F32", ())).changed_element_count == 1
    empty, _ = encode_tensor(b"", b"")
    found = delta_facts("w", payload(empty), ("F32", (0, 4)))
    assert (found.element_count, found.changed_element_count) == (0, 0)
    assert total_facts("all", [found]).density == 0


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (zstandard.compress(bytes(9)), "frame states 9 bytes, the tensor has 8"),
        (2 * zstandard.compress(bytes(8)), "bytes follow the frame"),
        (zstandard.compress(bytes(8))[:-1], "cut off"),
        (b"garbage", "does not begin"),
    ],
)
def test_what_is_not_one_frame_of_the_tensor_is_refused(frame: bytes, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason) as caught:
        delta_facts("w", payload(frame), ("BF16", (4,)))
    assert caught.value.subject == "a.safetensors: w"


def test_the_spec_tells_forms_in_every_spelling_and_nothing_else_does() -> None:
    entries = {
        "a": {"dtype": "bfloat16", "shape": [2, 3]},
        "b": {"dtype": "torch.float8_e4m3fn", "shape": []},
        "c": {"dtype": "F32", "shape": [0]},
        "d": {"dtype": "complex12", "shape": [1]},
        "e": {"dtype": "F32", "shape": [True]},
        "f": {"dtype": "F32", "shape": [-1]},
        "g": {"dtype": "F32", "shape": [1 << 70]},
        "h": {"dtype": ["F32"], "shape": [1]},
        "i": [],
    }
    assert spec_forms({"tensor_map": entries}) == {
        "a": ("BF16", (2, 3)),
        "b": ("F8_E4M3", ()),
        "c": ("F32", (0,)),
    }
    assert spec_forms({}) == spec_forms({"tensor_map": []}) == {}


def test_a_plain_checkpoint_tells_bytes_and_nothing_of_changes(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": np.ones(4, np.float16), "b": np.ones((2, 3), np.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_shard(tmp_path / "model.safetensors") as shard:
        found = {one.name: one for one in plain_facts([shard.header])}
    assert (found["b"].dtype, found["b"].size_bytes, found["b"].element_count) == ("I64", 48, 6)
    everything = total_facts("all", found.values())
    assert (everything.size_bytes, everything.density) == (56, None)


def test_density_is_that_of_all_elements_together() -> None:
    both = total_facts("all", [facts("a", 1, 8), facts("b", 0, 24)])
    assert both.density == 1 / 16
    assert total_facts("all", [facts("a", 1), facts("b", None)]).density is None
