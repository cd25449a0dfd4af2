"""The layout a checkpoint is brought into: which tensor goes where, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import TensorSpec, deserialize, safe_open, serialize_file
from safetensors.numpy import load_file, save_file

from hotload.checkpoint.relayout_plan import plan_relayout, select_files
from hotload.checkpoint.rules import check_full
from hotload.checkpoint.safetensors import SHARD_WARNING_BYTES, ShardHeader, TensorInfo
from hotload.delta.rules import delta_obstacle
from hotload.directory.files import sha256_file
from hotload.directory.relayout import relayout_directory, view_checkpoint
from hotload.directory.shards import read_checkpoint
from hotload.errors import InvalidCheckpointError
from tests.factories import shard_header

CONFIG = {"model_type": "llama", "hidden_size": 8, "tie_word_embeddings": False}
GiB = 1 << 30


def config(**more: object) -> bytes:
    return json.dumps(CONFIG | more).encode()


def index(weight_map: Mapping[str, str], **metadata: str) -> bytes:
    return json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()


def rules(caught: pytest.ExceptionInfo[InvalidCheckpointError]) -> list[str]:
    return [finding.rule for finding in caught.value.findings]


# The plan


def test_every_part_gets_a_file_of_its_own_in_the_order_of_the_model() -> None:
    names = [
        "lm_head.weight",
        "model.layers.10.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
        "visual.patch_embed.proj.weight",
        "model.layers.10.mlp.gate.weight",
        "model.embed_tokens.weight",
    ]
    forms = {name: ("BF16", (4, 4) if "visual" not in name else (4, 2, 2)) for name in names}
    shards = [shard_header(forms)]
    planned = plan_relayout(shards, config(), None).shards
    assert [(one.header.file, [t.name for t in one.header.tensors]) for one in planned] == [
        ("model-00001-of-00006.safetensors", ["model.embed_tokens.weight"]),
        ("model-00002-of-00006.safetensors", ["model.layers.2.mlp.up_proj.weight"]),
        (
            "model-00003-of-00006.safetensors",
            [
                "model.layers.10.mlp.experts.3.up_proj.weight",
                "model.layers.10.mlp.gate.weight",
            ],
        ),
        ("model-00004-of-00006.safetensors", ["model.norm.weight"]),
        ("model-00005-of-00006.safetensors", ["lm_head.weight"]),
        ("model-00006-of-00006.safetensors", ["visual.patch_embed.proj.weight"]),
    ]


def test_a_layer_of_a_mixture_of_experts_too_large_for_a_file_gets_several() -> None:
    experts = {f"model.layers.0.mlp.experts.{i}.w": ("BF16", (GiB // 2,)) for i in range(12)}
    layout = {"model.embed_tokens.weight": ("BF16", (4,)), **experts}
    planned = plan_relayout([shard_header(layout)], config(tie_word_embeddings=True), None).shards
    assert [len(one.header.tensors) for one in planned] == [1, 4, 4, 4]
    assert all(one.header.size_bytes < SHARD_WARNING_BYTES for one in planned)
    assert [tensor.name[-3:] for tensor in planned[2].header.tensors] == [
        "4.w",
        "5.w",
        "6.w",
        "7.w",
    ]


def test_a_tensor_above_the_limit_is_refused_since_no_file_can_hold_it() -> None:
    layout = {"model.embed_tokens.weight": ("BF16", (5 * GiB // 2,))}
    with pytest.raises(InvalidCheckpointError) as caught:
        plan_relayout([shard_header(layout)], config(tie_word_embeddings=True), None)
    assert rules(caught) == ["shard_size"]


def test_wide_elements_come_first_so_that_every_tensor_is_aligned() -> None:
    layout = {
        "model.layers.0.a": ("F8_E4M3", (3,)),
        "model.layers.0.a_scale_inv": ("F32", (1,)),
        "model.layers.0.b": ("BF16", (3,)),
    }
    quantized = config(quantization_config={"quant_method": "fp8"})
    (planned,) = plan_relayout([shard_header(layout)], quantized, None).shards
    assert [(one.dtype, one.start) for one in planned.header.tensors] == [
        ("F32", 0),
        ("BF16", 4),
        ("F8_E4M3", 10),
    ]
    assert planned.header.data_start % 8 == 0


def test_metadata_goes_along_where_it_stays_true() -> None:
    """What is said of one tensor goes with it, of all shards into all; contradictions go."""
    a = shard_header({"model.norm.weight": ("F32", (1,))}, "a.safetensors", format="pt", part="1")
    b = ShardHeader(
        "b.safetensors",
        (TensorInfo("lm_head.weight", "F32", (1,), 0, 4),),
        {"format": "pt", "part": "2", "lm_head.weight": "0000abcd"},
        512,
        516,
    )
    planned = plan_relayout([a, b], config(), None)
    assert [dict(one.header.metadata) for one in planned.shards] == [
        {"format": "pt"},
        {"format": "pt", "lm_head.weight": "0000abcd"},
    ]
    assert planned.dropped_metadata == ("part",)


@pytest.mark.parametrize(
    ("tied", "expected"),
    [
        ({"tie_word_embeddings": True}, ["model.embed_tokens.weight"]),
        (
            {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}},
            ["model.embed_tokens.weight", "lm_head.weight"],
        ),
        ({}, ["model.embed_tokens.weight", "lm_head.weight"]),
    ],
)
def test_a_head_is_left_out_only_where_the_config_ties_it(
    tied: dict[str, object], expected: list[str]
) -> None:
    layout = {
        "lm_head.weight": ("BF16", (8, 2)),
        "model.embed_tokens.weight": ("BF16", (8, 2)),
    }
    planned = plan_relayout([shard_header(layout)], config(**tied), None)
    assert [t.name for one in planned.shards for t in one.header.tensors] == expected
    assert [one.head[1].name for one in planned.heads if one.is_told] == (
        ["lm_head.weight"] if len(expected) == 1 else []
    )


def test_a_tied_head_of_another_form_is_refused() -> None:
    layout = {
        "lm_head.weight": ("F32", (8, 2)),
        "model.embed_tokens.weight": ("BF16", (8, 2)),
    }
    with pytest.raises(InvalidCheckpointError) as caught:
        plan_relayout([shard_header(layout)], config(tie_word_embeddings=True), None)
    assert rules(caught) == ["tied_head"]
    assert "F32" in str(caught.value)


def test_what_moving_tensors_cannot_mend_is_refused_before_anything_is_written() -> None:
    """fp8 weights need scales and a quantization_config."""
    with pytest.raises(InvalidCheckpointError) as caught:
        plan_relayout([shard_header({"model.layers.0.a": ("F8_E4M3", (4,))})], config(), None)
    assert rules(caught) == ["quantization_config", "missing_scale"]


def test_a_tensor_in_two_shards_is_refused_with_and_without_an_index() -> None:
    one = shard_header({"lm_head.weight": ("F32", (1,))}, "a.safetensors")
    two = shard_header({"lm_head.weight": ("F32", (1,))}, "b.safetensors")
    with pytest.raises(InvalidCheckpointError) as caught:
        plan_relayout([one, two], config(), None)
    assert rules(caught) == ["duplicate_tensor"]
    two = shard_header({"lm_head.weight": ("F32", (1,)), "b": ("F32", (1,))}, "b.safetensors")
    listed = index({"lm_head.weight": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(InvalidCheckpointError) as caught:
        plan_relayout([one, two], config(), listed)
    assert rules(caught) == ["duplicate_tensor"]


def test_a_delta_is_refused() -> None:
    payloads = shard_header({"lm_head.weight": ("U8", (30,))})
    with pytest.raises(InvalidCheckpointError) as caught:
        plan_relayout([payloads], config(), None)
    assert rules(caught) == ["delta"]
    with pytest.raises(InvalidCheckpointError) as caught:
        select_files(["model.safetensors"], index({}, delta_encoding="xor"))
    assert rules(caught) == ["delta"]


names = st.from_regex(
    r"(model\.layers\.(0|1|2|9|10|007)\.(mlp|attn)\.w|model\.norm\.weight|lm_head\.weight"
    r"|model\.embed_tokens\.weight|vision\.blocks\.[0-3]\.w|extra\.[a-c])",
    fullmatch=True,
)
forms = st.tuples(
    st.sampled_from(["BF16", "F32", "I64", "U8", "BOOL"]),
    st.lists(st.integers(0, 40), max_size=3).map(tuple),
)


@given(
    st.dictionaries(names, forms, min_size=1).filter(
        lambda found: any(dtype != "U8" or len(shape) != 1 for dtype, shape in found.values())
    ),
    st.integers(1, 4000),
    st.randoms(),
)
def test_every_plan_is_a_legal_layout_and_depends_on_names_alone(
    layout: dict[str, tuple[str, tuple[int, ...]]], limit: int, random: object
) -> None:
    untold = config(tie_word_embeddings=None)
    first = plan_relayout([shard_header(layout)], untold, None, limit_bytes=limit)
    shuffled = list(layout.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    half = len(shuffled) // 2
    others = [shard_header(dict(shuffled[:half]), "a"), shard_header(dict(shuffled[half:]), "b")]
    again = plan_relayout(others, untold, None, limit_bytes=limit)
    assert [one.header for one in again.shards] == [one.header for one in first.shards]
    placed = [(t.name, (t.dtype, t.shape)) for one in first.shards for t in one.header.tensors]
    assert sorted(placed) == sorted(layout.items())


# Which files take part


def test_the_index_decides_which_shards_are_the_model() -> None:
    """Leftovers of a save with another number of shards, and Mistral's second copy."""
    files = [
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00001.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "model.weight.spec.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tokenizer.json",
    ]
    chosen = select_files(files, index({"a": "model-00001-of-00001.safetensors"}))
    assert chosen.shards == ("model-00001-of-00001.safetensors",)
    assert chosen.side_files == ("config.json", "tokenizer.json")
    assert [one.file for one in chosen.left_out] == [
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]


def test_without_an_index_the_single_file_is_the_model_or_else_every_shard() -> None:
    assert select_files(["a.safetensors", "model.safetensors"], None).shards == (
        "model.safetensors",
    )
    assert select_files(["b.safetensors", "a.safetensors"], None).shards == (
        "a.safetensors",
        "b.safetensors",
    )


@pytest.mark.parametrize(
    ("files", "listed", "rule"),
    [
        (["config.json"], None, "missing_shard"),
        (["pytorch_model.bin"], None, "missing_shard"),
        (["adapter_config.json", "adapter_model.safetensors"], None, "adapter"),
        (["model.safetensors", "a.safetensors"], index({"w": "a.safetensors"}), "two_models"),
        (["model.safetensors"], b"{}", "weight_map"),
        (["model.safetensors"], b"[", "json"),
    ],
)
def test_what_is_no_single_model_is_refused(
    files: list[str], listed: bytes | None, rule: str
) -> None:
    with pytest.raises(InvalidCheckpointError) as caught:
        select_files(files, listed)
    assert rules(caught) == [rule]


# Files


def values(shape: tuple[int, ...], seed: int, dtype: str = "<f2") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def model(layers: int = 3) -> dict[str, np.ndarray]:
    """Embeddings, layers with experts, norm and head, as a trainer names them."""
    tensors = {
        "model.embed_tokens.weight": values((64, 16), 1),
        "lm_head.weight": values((64, 16), 2),
    }
    for layer in range(layers):
        for expert in range(2):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            tensors[name] = values((32, 16), 10 * layer + expert)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = values((16,), layer, "<f4")
    return tensors | {"model.norm.weight": values((16,), 3)}


def save(
    directory: Path, tensors: Mapping[str, np.ndarray], files: int, **settings: object
) -> Path:
    """A checkpoint as `save_pretrained` leaves it: one file, or as many as told and their index."""
    directory.mkdir()
    (directory / "config.json").write_bytes(config(**settings))
    (directory / "tokenizer.json").write_text("{}")
    names = list(tensors)
    if files == 1:
        save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        mine = names[number::files]
        save_file({name: tensors[name] for name in mine}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_bytes(index(weight_map))
    return directory


def loaded(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory, found as a loader finds it: by the index."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in set(weight_map.values()):
        for name, array in load_file(directory / file).items():
            assert weight_map[name] == file
            found[name] = array
    assert found.keys() == weight_map.keys()
    return found


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("files", [1, 2, 5])
def test_a_saved_model_becomes_a_legal_checkpoint_with_the_same_tensors(
    tmp_path: Path, files: int
) -> None:
    tensors = model()
    source = save(tmp_path / "saved", tensors, files)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    done = relayout_directory(source, tmp_path / "out")
    assert check_full(read_checkpoint(tmp_path / "out")) == ()
    assert_same(loaded(tmp_path / "out"), tensors)
    assert (done.shard_count, done.tensor_count) == (6, len(tensors))
    assert (tmp_path / "out" / "config.json").read_bytes() == config()
    with safe_open(tmp_path / "out" / "model-00001-of-00006.safetensors", "np") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]


def test_two_saves_of_a_run_get_one_layout_and_a_second_pass_changes_nothing(
    tmp_path: Path,
) -> None:
    save(tmp_path / "one", model(), 1)
    save(tmp_path / "two", {name: -array for name, array in model().items()}, 4)
    for name in ("one", "two"):
        relayout_directory(tmp_path / name, tmp_path / f"{name}-out")
    relayout_directory(tmp_path / "one-out", tmp_path / "again")
    first = read_checkpoint(tmp_path / "one-out")
    assert delta_obstacle(first, read_checkpoint(tmp_path / "two-out")) is None
    for path in (tmp_path / "one-out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_copied_head_is_dropped_and_one_that_differs_is_refused(tmp_path: Path) -> None:
    tensors = model() | {"lm_head.weight": model()["model.embed_tokens.weight"]}
    save(tmp_path / "tied", tensors, 2, tie_word_embeddings=True)
    done = relayout_directory(tmp_path / "tied", tmp_path / "out")
    assert done.dropped_heads == ("lm_head.weight",)
    del tensors["lm_head.weight"]
    assert_same(loaded(tmp_path / "out"), tensors)

    save(tmp_path / "torn", model(), 2, tie_word_embeddings=True)
    with pytest.raises(InvalidCheckpointError, match="tied_head") as caught:
        relayout_directory(tmp_path / "torn", tmp_path / "never")
    assert "model.embed_tokens.weight" in caught.value.findings[0].expected
    assert not [path for path in tmp_path.iterdir() if "never" in path.name]


def test_a_copied_head_that_no_config_ties_is_kept_and_named(tmp_path: Path) -> None:
    """Older save_pretrained leaves the field out where it is the architecture's default."""
    tensors = model() | {"lm_head.weight": model()["model.embed_tokens.weight"]}
    save(tmp_path / "saved", tensors, 2, tie_word_embeddings=None)
    done = relayout_directory(tmp_path / "saved", tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), tensors)
    assert [(one.rule, one.tensor, one.severity) for one in done.warnings] == [
        ("tied_head", "lm_head.weight", "warning")
    ]
    save(tmp_path / "own", model(), 2, tie_word_embeddings=None)
    assert relayout_directory(tmp_path / "own", tmp_path / "out-2").warnings == ()


def test_fp8_with_scales_keeps_every_bit(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = np.random.default_rng(4).integers(0, 256, (8, 8), np.uint8)
    scale = values((1, 1), 5, "<f4")
    source = tmp_path / "saved"
    source.mkdir()
    (source / "config.json").write_bytes(config(quantization_config={"quant_method": "fp8"}))
    tensors = {
        name: TensorSpec(
            dtype="float8_e4m3fn", shape=[8, 8], data_ptr=weight.ctypes.data, data_len=64
        ),
        f"{name}_scale_inv": TensorSpec(
            dtype="float32", shape=[1, 1], data_ptr=scale.ctypes.data, data_len=4
        ),
    }
    serialize_file(tensors, source / "model.safetensors", {"format": "pt"})

    relayout_directory(source, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    found = dict(deserialize(path.read_bytes()))
    assert found[name]["dtype"] == "F8_E4M3"
    assert bytes(found[name]["data"]) == weight.tobytes()
    assert bytes(found[f"{name}_scale_inv"]["data"]) == scale.tobytes()


def test_what_a_trainer_keeps_for_itself_stays_behind_and_links_are_followed(
    tmp_path: Path,
) -> None:
    source = save(tmp_path / "saved", model(), 1)
    (source / "optimizer.pt").write_bytes(b"state")
    (source / "trainer_state.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / ".gitattributes").write_text("")
    (source / "global_step12").mkdir()
    blob = tmp_path / "blob"
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)
    done = relayout_directory(source, tmp_path / "out")
    assert {one.file for one in done.left_out} == {
        "optimizer.pt",
        "trainer_state.json",
        "pytorch_model.bin",
        ".gitattributes",
        "global_step12",
    }
    assert done.side_files == ("config.json", "tokenizer.json")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_same(loaded(tmp_path / "out"), model())


def break_config(source: Path) -> None:
    (source / "config.json").unlink()


def break_index(source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()


def break_shard(source: Path) -> None:
    path = source / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def break_link(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (break_config, "missing_file"),
        (break_index, "missing_shard"),
        (break_shard, "truncated"),
        (break_link, "not_a_file"),
    ],
)
def test_a_damaged_source_is_refused_and_nothing_is_left(
    tmp_path: Path, damage: Callable[[Path], None], rule: str
) -> None:
    source = save(tmp_path / "saved", model(), 2)
    damage(source)
    with pytest.raises(InvalidCheckpointError) as caught:
        relayout_directory(source, tmp_path / "out")
    assert rules(caught) == [rule]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    source = save(tmp_path / "saved", model(), 1)
    (tmp_path / "out").mkdir()
    relayout_directory(source, tmp_path / "out")  # empty: nothing to lose
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(FileExistsError, match="something"):
        relayout_directory(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    with pytest.raises(OSError, match="may not lie in"):
        relayout_directory(source, source / "out")


def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    source = save(tmp_path / "saved", model(), 1)

    def stop(done: int, total: int) -> None:
        if done > total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relayout_directory(source, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_progress_counts_every_byte_written_and_read_back(tmp_path: Path) -> None:
    source = save(tmp_path / "saved", model(), 2)
    heard: list[tuple[int, int]] = []
    relayout_directory(source, tmp_path / "out", progress=lambda *told: heard.append(told))
    size_bytes = sum(array.nbytes for array in model().values())
    assert heard[-1] == (2 * size_bytes, 2 * size_bytes)
    assert heard == sorted(heard)


def test_metadata_that_utf8_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "saved", model(), 1)
    text = b'{"__metadata__":{"a":"\\ud800"}}'
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InvalidCheckpointError) as caught:
        view_checkpoint(source)
    assert rules(caught) == ["metadata"]


def test_the_view_and_what_doctor_writes_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    source = save(tmp_path / "saved", model(), 3)
    view = view_checkpoint(source)
    relayout_directory(source, tmp_path / "out")
    again = view_checkpoint(tmp_path / "out")
    assert again.plan is None
    assert again.checkpoint == view.checkpoint
    for path in (tmp_path / "out").iterdir():
        assert again.file(path.name) == path
        assert sha256_file(view.file(path.name)) == sha256_file(path)
