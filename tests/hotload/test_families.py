"""Layouts of model families by name and form: which part a tensor is, and what a checkpoint lacks.

The families themselves, built by transformers, go through `make families`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from hotload.checkpoint.anatomy import find_parts
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.completeness import check_complete
from hotload.checkpoint.meaning import means_same
from hotload.checkpoint.model_config import check_config, take_config
from hotload.checkpoint.names import INDEX_FILE, SPEC_FILE
from hotload.checkpoint.relayout_plan import plan_relayout
from hotload.checkpoint.rules import check_full
from hotload.checkpoint.safetensors import render_header
from hotload.checkpoint.side_files import code_loaded, reason_to_leave_out
from hotload.checkpoint.sub_configs import is_tied, layer_count, quantization_settings, vocab_size
from hotload.directory.relayout import check_heads, relayout_directory
from hotload.directory.shards import open_shard, read_checkpoint
from hotload.errors import Finding, InvalidCheckpointError
from tests.factories import shard_header

V, H = 96, 32
WIDE, SQUARE, ROW = ("BF16", (V, H)), ("BF16", (H, H)), ("BF16", (H,))
Forms = Mapping[str, tuple[str, tuple[int, ...]]]
TELLS = {"vocab_size": V}

# Tensors of a family, what its config says, and the part of those that have a name of their own.
FAMILIES: dict[str, tuple[Forms, dict[str, object], dict[str, str]]] = {
    "mamba": (
        {
            "backbone.embeddings.weight": WIDE,
            "backbone.layers.0.mixer.A_log": ROW,
            "backbone.norm_f.weight": ROW,
            "lm_head.weight": WIDE,
        },
        {},
        {"backbone.embeddings.weight": "embeddings", "backbone.norm_f.weight": "final norm"},
    ),
    "deepseek-v4": (
        {
            "embed.weight": WIDE,
            "layers.0.attn.wo.weight": SQUARE,
            "mtp.0.attn.wo.weight": SQUARE,
            "norm.weight": ROW,
            "head.weight": WIDE,
            "hc_head_base": ("F32", (4,)),
        },
        TELLS,
        {
            "embed.weight": "embeddings",
            "mtp.0.attn.wo.weight": "mtp.0",
            "norm.weight": "final norm",
            "head.weight": "head",
            "hc_head_base": "other",
        },
    ),
    "internlm2": (
        {
            "model.tok_embeddings.weight": WIDE,
            "model.layers.0.attention.wqkv.weight": SQUARE,
            "output.weight": WIDE,
            "output.bias": ("BF16", (V,)),
        },
        {},
        {"output.weight": "head", "output.bias": "head"},
    ),
    "t5": (
        {
            "shared.weight": WIDE,
            "encoder.block.0.layer.0.SelfAttention.q.weight": SQUARE,
            "decoder.block.0.layer.0.SelfAttention.q.weight": SQUARE,
            "decoder.final_layer_norm.weight": ROW,
        },
        TELLS,
        {
            "shared.weight": "embeddings",
            "encoder.block.0.layer.0.SelfAttention.q.weight": "encoder.block.0",
        },
    ),
    "bert": (
        {
            "bert.embeddings.word_embeddings.weight": WIDE,
            "bert.embeddings.LayerNorm.weight": ROW,
            "bert.encoder.layer.1.output.dense.weight": SQUARE,
        },
        TELLS,
        {
            "bert.encoder.layer.1.output.dense.weight": "bert.encoder.layer.1",
            "bert.embeddings.LayerNorm.weight": "other",
        },
    ),
    "a predictor's layers": (
        {"model.embed_tokens.weight": WIDE, "mtp_layers.3.w": SQUARE, "a.mlp.2.weight": SQUARE},
        {},
        {"mtp_layers.3.w": "mtp_layers.3", "a.mlp.2.weight": "other"},
    ),
    "names that nobody knows": (
        {"wte_x.weight": WIDE, "tower.7.attn.q.weight": SQUARE, "tower.ln_out.weight": ROW},
        {"text_config": TELLS},
        {
            "wte_x.weight": "embeddings",
            "tower.7.attn.q.weight": "tower.7",
            "tower.ln_out.weight": "other",
        },
    ),
    "two matrices that nothing tells apart": (
        {"one.weight": WIDE, "two.weight": WIDE},
        TELLS,
        {"one.weight": "other", "two.weight": "other"},
    ),
    "embeddings of positions are of no vocabulary": (
        {"transformer.wpe.weight": SQUARE, "transformer.wte.weight": WIDE, "proj.weight": SQUARE},
        {},
        {"transformer.wpe.weight": "embeddings", "proj.weight": "other"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_told_by_config_shape_and_neighbours(family: str) -> None:
    forms, config, expected = FAMILIES[family]
    parts = find_parts(shard_header(forms).tensors, config)
    assert {name: parts.by_name.get(name, "other") for name in expected} == expected


def test_a_tied_head_is_left_out_beside_embeddings_of_any_name() -> None:
    forms, _, _ = FAMILIES["mamba"]
    config = json.dumps({"tie_word_embeddings": True}).encode()
    plan = plan_relayout([shard_header(forms)], config, None)
    assert [tied.head[1].name for tied in plan.heads] == ["lm_head.weight"]
    written = [one.name for shard in plan.shards for one in shard.header.tensors]
    assert sorted(written) == sorted(forms.keys() - {"lm_head.weight"})


def test_another_matrix_of_the_vocabulary_is_no_tied_head() -> None:
    forms = {"model.embed_tokens.weight": WIDE, "model.bias_table.weight": WIDE}
    plan = plan_relayout([shard_header(forms)], b'{"tie_word_embeddings": true}', None)
    assert plan.heads == ()
    assert sum(len(shard.header.tensors) for shard in plan.shards) == 2


def test_an_index_may_list_a_tied_head_that_nobody_wrote() -> None:
    forms = {"model.embed_tokens.weight": WIDE, "model.layers.0.a.weight": SQUARE}
    places = dict.fromkeys([*forms, "lm_head.weight"], "model.safetensors")
    index = json.dumps({"weight_map": places}).encode()
    header = shard_header(forms)
    plan = plan_relayout([header], b'{"tie_word_embeddings": true}', index)
    assert "lm_head.weight" not in json.loads(plan.index)["weight_map"]
    for config in (b'{"tie_word_embeddings": false}', b"{}"):
        with pytest.raises(InvalidCheckpointError, match="missing_tensor"):
            plan_relayout([header], config, index)


# Sub-configs


def test_a_field_is_found_in_the_part_of_the_config_that_keeps_it() -> None:
    quantization = {"quant_method": "compressed-tensors"}
    text = {"vocab_size": 9, "num_hidden_layers": 3, "quantization_config": quantization}
    vision = {"num_hidden_layers": 27}
    for name in ("text_config", "llm_config", "language_config"):
        config = {name: text, "vision_config": vision, "tie_word_embeddings": False}
        assert (vocab_size(config), layer_count(config)) == (9, 3)
        assert quantization_settings(config) == [quantization]
        assert is_tied(config) is False
    talker = {"vocab_size": 5, "num_hidden_layers": 1}
    nested = {"thinker_config": {"text_config": text}, "talker_config": talker}
    assert (vocab_size(nested), layer_count(nested)) == (9, 3)
    assert (vocab_size({}), layer_count({"n_layer": True})) == (None, None)


def test_quantized_tensors_of_a_composite_model_pass() -> None:
    stem = "language_model.model.layers.1.mlp.experts.0.up_proj.weight"
    forms = {f"{stem}_packed": ("I32", (4, 1)), f"{stem}_scale": ("BF16", (4, 1))}
    settings = {"quantization_config": {"quant_method": "compressed-tensors"}}
    plan_relayout([shard_header(forms)], json.dumps({"text_config": settings}).encode(), None)
    with pytest.raises(InvalidCheckpointError, match="quantization_config"):
        plan_relayout([shard_header(forms)], b'{"text_config": {}}', None)
    base: dict[str, object] = {"text_config": {"a": 1}}
    mine: dict[str, object] = {"text_config": {"a": 1, **settings}}
    assert list(check_config(mine, base, ())) == []
    assert [one.rule for one in check_config(base, mine, ())] == ["quantization_differs"]


def test_a_scale_by_that_name_alone_does_not_count_against_the_base() -> None:
    base = {"layers.0.attn.wo.weight": (4, 4), "layers.0.attn.wo.scale": (1, 1)}
    forms = {"layers.0.attn.wo.weight": ("BF16", (4, 4))}
    plan = plan_relayout([shard_header(forms)], b"{}", None)
    documents = {"config.json": b"{}", INDEX_FILE: plan.index, SPEC_FILE: plan.spec}
    checkpoint = Checkpoint(tuple(one.header for one in plan.shards), documents, ())
    assert check_full(checkpoint, base_shapes=base) == ()
    lost = {"layers.0.norm.scale": (4,)}
    assert [one.rule for one in check_full(checkpoint, base_shapes=base | lost)] == [
        "missing_tensor"
    ]


# Completeness


def model(layers: range, *, prefix: str = "model", head: bool = True) -> Forms:
    forms = {f"{prefix}.embed_tokens.weight": WIDE, f"{prefix}.norm.weight": ROW}
    forms |= {f"{prefix}.layers.{layer}.a.q.weight": SQUARE for layer in layers}
    return forms | ({"lm_head.weight": WIDE} if head else {})


def lacks(forms: Forms, **config: object) -> list[tuple[str, str]]:
    found = check_complete(find_parts(shard_header(forms).tensors, config), config)
    return [(one.rule, one.severity) for one in found]


def test_layers_are_counted_against_the_config_of_their_model() -> None:
    count = {"num_hidden_layers": 3}
    assert lacks(model(range(3)), **count) == []
    assert lacks(model(range(4)), **count) == []  # a predictor's, beyond the count
    for layers in (range(2), range(1, 4), range(0, 5, 2)):
        assert lacks(model(layers), **count) == [("missing_layers", "error")]
    tower = {f"visual.blocks.{block}.a.q.weight": SQUARE for block in range(9)}
    composite = {"text_config": count | TELLS, "vision_config": {"num_hidden_layers": 9}}
    whole = model(range(3), prefix="model.language_model") | tower
    assert lacks(whole, **composite) == []
    cut = model(range(2), prefix="model.language_model") | tower
    assert lacks(cut, **composite) == [("missing_layers", "error")]


def test_every_layer_has_every_expert() -> None:
    """A rank that did not write its share leaves a hole, or a short end in every layer."""

    def experts(*numbers: int) -> Forms:
        names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in numbers]
        return dict.fromkeys([*names, "model.layers.0.mlp.shared_experts.up_proj.weight"], SQUARE)

    whole, short, hole = experts(0, 1, 2, 3), experts(0, 1), experts(0, 1, 3)
    for config in ({"num_experts": 4}, {"text_config": {"n_routed_experts": 4}}):
        assert lacks(whole, **config) == []
        assert lacks(short, **config) == lacks(hole, **config) == [("missing_experts", "error")]
    assert lacks(hole) == lacks(whole, num_experts=2) == []


def test_an_encoder_and_a_decoder_may_count_differently() -> None:
    forms = {"shared.weight": WIDE}
    forms |= {f"encoder.block.{n}.layer.0.q.weight": SQUARE for n in range(2)}
    forms |= {f"decoder.block.{n}.layer.0.q.weight": SQUARE for n in range(4)}
    assert lacks(forms, num_layers=4) == lacks(forms, num_layers=2) == []
    assert lacks(forms, num_layers=5) == [("missing_layers", "error")]


def test_a_count_of_layers_that_nobody_could_hold_takes_no_time() -> None:
    # It would be counted up for days: the test's own time limit ends that.
    assert lacks(model(range(3)), num_hidden_layers=10**15) == [("missing_layers", "error")]


def test_an_untied_model_has_a_head_and_any_model_embeddings() -> None:
    headless = model(range(1), head=False)
    assert lacks(headless, tie_word_embeddings=True) == lacks(headless) == []
    assert lacks(headless, tie_word_embeddings=False) == [("missing_head", "error")]
    classifier = {"tie_word_embeddings": False, "architectures": ["LlamaForSequenceClassification"]}
    assert lacks(headless, **classifier) == [("missing_head", "warning")]
    packed = {"model.layers.0.a.q.weight": SQUARE, "x.qweight": ("I32", (3, 4))}
    assert lacks(packed, **TELLS) == [("no_embeddings", "warning")]
    assert lacks({"a.weight": ROW}, num_hidden_layers=2) == [("no_layers", "warning")]


# A tied head in the served layout


def save(directory: Path, tensors: Mapping[str, bytes], config: Mapping[str, object]) -> Path:
    """A checkpoint in one file: every tensor a matrix of V rows of U8."""
    directory.mkdir(parents=True)
    forms = {name: ("I8", (V, len(data) // V)) for name, data in tensors.items()}
    head = render_header(shard_header(forms).tensors, {"format": "pt"})
    (directory / "model.safetensors").write_bytes(head + b"".join(tensors.values()))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_tied_head_of_other_bytes_is_found_in_any_layout(tmp_path: Path) -> None:
    one, other = bytes(V * 4), bytes([1]) + bytes(V * 4 - 1)
    for name, head, rules in (("same", one, []), ("torn", other, ["tied_head"])):
        tensors = {"model.embed_tokens.weight": one, "lm_head.weight": head}
        directory = save(tmp_path / name, tensors, {"tie_word_embeddings": True})
        found = check_heads(directory, read_checkpoint(directory))
        assert [finding.rule for finding in found] == rules
        assert all(finding.severity == "error" for finding in found)


# First bytes


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML or XML page"),
        (b"<?xml version='1.0'?><Error>", "HTML or XML page"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "zip archive"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "pickle"),
        (b"GGUF\x03\x00\x00\x00\x00", "GGUF"),
        (b'{"message": "Not Found"}', "JSON document"),
        (bytes(64), "zeros"),
    ],
)
def test_what_is_no_shard_is_called_what_it_is(tmp_path: Path, data: bytes, word: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with (
        pytest.raises(InvalidCheckpointError) as caught,
        open_shard(tmp_path / "model.safetensors"),
    ):
        pass
    (finding,) = caught.value.findings
    assert (finding.rule, word in finding.found) == ("not_safetensors", True)


@pytest.mark.parametrize("more", [{"__metadata__": None}, {"w": {"comment": "x"}}], ids=str)
def test_a_header_that_the_safetensors_library_reads_is_read(
    tmp_path: Path, more: dict[str, object]
) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    inner = more.get("w")
    entries = more | {"w": entry | (inner if isinstance(inner, dict) else {})}
    text = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with open_shard(tmp_path / "x.safetensors") as shard:
        assert [one.name for one in shard.header.tensors] == ["w"]
        assert shard.header.metadata == {}


# config.json in other words

OLD = {
    "rope_theta": 1000000,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "hidden_size": 8,
}
NEW = {
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "dtype": "bfloat16",
    "layer_types": ["full_attention", "full_attention"],
    "pad_token_id": None,
    "transformers_version": "5.24.0",
    "hidden_size": 8,
}


def test_a_config_saved_again_by_a_newer_library_is_eight_warnings() -> None:
    found = list(check_config(NEW, OLD, ()))
    assert {one.severity for one in found} == {"warning"}
    assert len(found) == 8
    changed = {**NEW, "rope_parameters": {"rope_theta": 5000000, "rope_type": "default"}}
    errors = [one for one in check_config(changed, OLD, ()) if one.severity == "error"]
    assert {one.found.split()[-1] for one in errors} >= {"'rope_parameters'", "'rope_theta'"}
    assert all("--config-from" in one.expected for one in errors)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (OLD, NEW),
        ({"text_config": OLD}, {"text_config": NEW}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0},
         {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}}),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4},
         {"rope_parameters": {
             "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
             "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}}),
        ({"rotary_pct": 0.25, "rotary_emb_base": 10000},
         {"rope_parameters": {
             "partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_type": "default"}}),
        ({"is_local": False, "additional_special_tokens": ["<x>"], "pad_token": None},
         {"is_local": True, "extra_special_tokens": ["<x>"]}),
    ],
)  # fmt: skip
def test_documents_in_other_words_mean_the_same(one: object, other: object) -> None:
    assert means_same(one, other)
    assert means_same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": [1, None]}, {"a": [1]}),
        ({"rope_theta": 1.0}, {"rope_theta": 2.0}),
        ({"rope_theta": 1.0}, {}),
        ({"layer_types": ["sliding_attention"]}, {}),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"bos_token": "<s>"}, {"bos_token": "<b>"}),
    ],
)
def test_documents_that_differ_do_not(one: object, other: object) -> None:
    assert not means_same(one, other)
    assert not means_same(other, one)


def test_doctor_takes_the_config_of_the_base_model(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": bytes(V * 4), "model.layers.0.a.q.weight": bytes(V)}
    source = save(tmp_path / "saved", tensors, NEW | {"hidden_size": 9})
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(OLD))
    done = relayout_directory(source, tmp_path / "out", config_from=base)
    written = (tmp_path / "out" / "config.json").read_bytes()
    assert written == (base / "config.json").read_bytes()
    assert [(one.rule, "hidden_size" in one.found) for one in done.warnings] == [
        ("config_taken", True)
    ]
    assert check_full(read_checkpoint(tmp_path / "out"), base_config=OLD) == ()


def test_quantization_stays_that_of_the_tensors() -> None:
    settings = {"quantization_config": {"quant_method": "fp8"}}
    own = json.dumps({"a": 1, "text_config": {"b": 2, **settings}}).encode()
    taken, changed = take_config(own, b'{"a": 1, "text_config": {"b": 3}}')
    assert json.loads(taken) == {"a": 1, "text_config": {"b": 3, **settings}}
    assert [one.rule for one in changed] == ["config_taken"]


# What a server reads


@pytest.mark.parametrize(
    "file",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
        "tokenizer.model", "tokenizer.model.v3", "spiece.model", "qwen.tiktoken", "encoder.json",
        "vocab.bpe", "tekken.json", "params.json", "chat_template.jinja", "chat_template.json",
        "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json",
        "model.weight.spec.json", "adapter_config.json", "adapter_model.bin", "x.safetensors",
        "modeling_x.py",
    ],
)  # fmt: skip
def test_what_a_server_reads_is_published(file: str) -> None:
    assert reason_to_leave_out(file, frozenset({"modeling_x.py"})) is None


@pytest.mark.parametrize(
    "file",
    [
        "latest", "zero_to_fp32.py", "random_states_0.pkl", "custom_checkpoint_0.pkl",
        "trainer_log.jsonl", "events.out.tfevents.1.host", "trainer_state.json", "optimizer.pt",
        "training_args.bin", "scheduler.pt", "rng_state_3.pth", "all_results.json", "probe.json",
        "latest_checkpointed_iteration.txt", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "model.gguf", "README.md", "log.txt", "train.log", "optimizer.distcp", "a\nb",
    ],
)  # fmt: skip
def test_what_a_trainer_keeps_for_itself_is_not(file: str) -> None:
    assert reason_to_leave_out(file, frozenset())


def test_code_is_what_an_auto_map_leads_to() -> None:
    documents = [
        b'{"auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "r--configuration_x.C"}}',
        b'{"auto_map": {"AutoTokenizer": ["tokenization_x.T", null]}}',
        b"{", b"[]", b'{"auto_map": 3}',
    ]  # fmt: skip
    sources = {
        "modeling_x.py": b"from .layers_x import L\nfrom . import rope_x\nimport torch",
        "layers_x.py": b"from .modeling_x import X",
        "rope_x.py": b"\xff",
        "configuration_x.py": b"",
        "zero_to_fp32.py": b"import torch",
    }
    assert code_loaded(documents, sources) == sources.keys() - {"zero_to_fp32.py"}


def test_directories_stay_behind_and_lost_templates_are_told(tmp_path: Path) -> None:
    directory = save(tmp_path / "saved", {"model.embed_tokens.weight": bytes(V)}, {})
    (directory / "global_step7").mkdir()
    templates = directory / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (directory / "latest").write_text("global_step7")
    checkpoint = read_checkpoint(directory)
    assert [one.file for one in checkpoint.side_files] == ["config.json"]
    warnings: list[Finding] = [one for one in check_full(checkpoint) if one.rule == "left_out"]
    assert {one.file for one in warnings} == {"additional_chat_templates", "global_step7", "latest"}
    assert "loses" in str(warnings[0])
    left_out = relayout_directory(directory, tmp_path / "out").left_out
    assert any("loses" in one.reason for one in left_out)
