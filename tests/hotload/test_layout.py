"""Client checks of wire-format §6: a good snapshot passes, each broken rule has its own finding."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256

import pytest

from hotload.checkpoint.checkpoint import Checkpoint, LeftOut
from hotload.checkpoint.index_and_spec import TORCH_DTYPES, build_index, build_spec
from hotload.checkpoint.quantization import describe_quantization
from hotload.checkpoint.rules import check_full, check_lora, refuse_errors
from hotload.checkpoint.safetensors import DTYPE_BITS
from hotload.delta.rules import check_delta, delta_obstacle
from hotload.errors import Finding, InvalidCheckpointError
from hotload.records import FileDigest
from tests.factories import shard_header

CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_theta": 10000.0, "use_cache": True}
TENSORS = {
    "model-00001.safetensors": {"model.embed_tokens.weight": ("BF16", (16, 8))},
    "model-00002.safetensors": {
        "model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)),
        "model.layers.0.input_layernorm.weight": ("BF16", (8,)),
    },
    "model-00003.safetensors": {"model.layers.1.mlp.gate.scalar": ("F32", ())},
    "model-00004.safetensors": {"model.norm.weight": ("BF16", (8,))},
    "model-00005.safetensors": {"lm_head.weight": ("BF16", (16, 8))},
}
Layout = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]


def side(file: str, data: bytes = b"{}") -> FileDigest:
    return FileDigest(file=file, size_bytes=len(data), sha256=sha256(data).hexdigest())


def checkpoint(layout: Layout = TENSORS, **documents: object) -> Checkpoint:
    """A checkpoint of these tensors; `config`, `index`, `spec` and `adapter` replace a document."""
    shards = tuple(shard_header(tensors, file) for file, tensors in layout.items())
    names = {
        "config": "config.json",
        "index": "model.safetensors.index.json",
        "spec": "model.weight.spec.json",
        "adapter": "adapter_config.json",
    }
    values = {
        "config": CONFIG,
        "index": json.loads(build_index(shards)),
        "spec": json.loads(build_spec(shards)),
        **documents,
    }
    data = {
        names[key]: value if isinstance(value, bytes) else json.dumps(value).encode()
        for key, value in values.items()
        if value is not None
    }
    sides = [side(file, text) for file, text in data.items()] + [side("tokenizer.json", b"{}")]
    return Checkpoint(shards, data, tuple(sides))


def rules(findings: tuple[Finding, ...], severity: str = "error") -> set[str]:
    assert all(finding.file and finding.found and finding.expected for finding in findings)
    return {finding.rule for finding in findings if finding.severity == severity}


def edited(layout: Layout, change: Callable[[dict], object]) -> dict:
    copy = {file: dict(tensors) for file, tensors in layout.items()}
    change(copy)
    return copy


def index_with(**changes: object) -> dict:
    index = json.loads(build_index(checkpoint().shards))
    index["weight_map"] |= changes
    return index


def spec_with(name: str, entry: object) -> dict:
    spec = json.loads(build_spec(checkpoint().shards))
    spec["tensor_map"][name] = entry
    return spec


# Full snapshots


def test_a_good_checkpoint_has_no_finding() -> None:
    good = checkpoint()
    shapes = {tensor.name: tensor.shape for _, tensor in good.tensors}
    assert check_full(good) == ()
    assert check_full(good, base_config=CONFIG, base_shapes=shapes) == ()


@pytest.mark.parametrize("document", ["config", "index", "spec"])
def test_a_missing_document_is_refused(document: str) -> None:
    assert rules(check_full(checkpoint(**{document: None}))) == {"missing_file"}


@pytest.mark.parametrize("document", ["config", "index", "spec"])
@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"a":1,"a":2}', b"[" * 9000], ids=repr)
def test_a_document_that_is_no_json_object_is_refused(document: str, data: bytes) -> None:
    assert rules(check_full(checkpoint(**{document: data}))) == {"json"}


@pytest.mark.parametrize(
    ("document", "value", "rule"),
    [
        ("index", {}, "weight_map"),
        ("index", {"weight_map": []}, "weight_map"),
        ("spec", {}, "tensor_map"),
        ("spec", {"tensor_map": None}, "tensor_map"),
    ],
)
def test_a_manifest_without_its_map_is_refused(document: str, value: object, rule: str) -> None:
    assert rules(check_full(checkpoint(**{document: value}))) == {rule}


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "a/b.safetensors", "a\\b.safetensors", "", "..", 3, None, ["x"]],
)
def test_a_shard_name_that_is_a_path_is_refused(file: object) -> None:
    findings = check_full(checkpoint(index=index_with(**{"lm_head.weight": file})))
    assert "file_name" in rules(findings)


def test_a_shard_that_is_no_safetensors_file_is_refused() -> None:
    findings = check_full(checkpoint(index=index_with(**{"lm_head.weight": "pytorch_model.bin"})))
    assert "file_name" in rules(findings)


def test_a_listed_file_that_is_missing_is_named_with_a_tensor() -> None:
    good = checkpoint()
    findings = check_full(replace(good, shards=good.shards[:-1]))
    (finding,) = [finding for finding in findings if finding.rule == "missing_shard"]
    assert (finding.file, finding.tensor) == ("model-00005.safetensors", "lm_head.weight")


def test_a_stray_shard_is_refused() -> None:
    good = checkpoint()
    stray = shard_header({"model.layers.7.weight": ("BF16", (2,))}, "model-99999.safetensors")
    findings = check_full(replace(good, shards=(*good.shards, stray)))
    assert rules(findings) == {"stray_shard"}


def test_a_mapped_tensor_that_its_shard_lacks_is_refused() -> None:
    findings = check_full(
        checkpoint(index=index_with(**{"model.layers.0.b": "model-00002.safetensors"}))
    )
    assert rules(findings) == {"missing_tensor", "spec_missing"}


def test_a_tensor_the_index_does_not_name_is_refused() -> None:
    index = index_with()
    del index["weight_map"]["model.layers.0.input_layernorm.weight"]
    assert rules(check_full(checkpoint(index=index))) == {"unindexed_tensor", "spec_extra"}


def test_a_tensor_in_two_shards_is_refused() -> None:
    layout = edited(
        TENSORS,
        lambda files: files["model-00004.safetensors"].update(files["model-00005.safetensors"]),
    )
    findings = check_full(checkpoint(layout, index=index_with()))
    assert "duplicate_tensor" in rules(findings)


def test_an_index_without_tensors_is_refused() -> None:
    assert rules(check_full(checkpoint({}))) == {"empty_index"}


@pytest.mark.parametrize(
    "shape", [[8], [16, 9], [8, 16], [16.0, 8], [True, 8], "16,8", None, [[16], 8]], ids=str
)
def test_a_spec_shape_that_differs_from_the_header_is_refused(shape: object) -> None:
    spec = spec_with("lm_head.weight", {"shape": shape, "dtype": "bfloat16"})
    (finding,) = check_full(checkpoint(spec=spec))
    assert finding.rule == "spec_shape"
    assert finding.tensor == "lm_head.weight"


@pytest.mark.parametrize(
    "dtype",
    ["float16", "BFLOAT16", "F16", "torch.float32", "torch.BF16", "", None, ["bfloat16"]],
    ids=str,
)
def test_a_spec_dtype_that_differs_from_the_header_is_refused(dtype: object) -> None:
    spec = spec_with("lm_head.weight", {"shape": [16, 8], "dtype": dtype})
    assert rules(check_full(checkpoint(spec=spec))) == {"spec_dtype"}


@pytest.mark.parametrize("entry", [{}, {"shape": [16, 8]}, [], None, "x"], ids=str)
def test_a_spec_entry_without_shape_and_dtype_is_refused(entry: object) -> None:
    spec = spec_with("lm_head.weight", entry)
    expected = {"spec_missing"} if entry is None else {"spec_entry"}
    assert rules(check_full(checkpoint(spec=spec))) <= {"spec_entry"} | expected


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", "BF16"])
@pytest.mark.parametrize("style", ["torch", "safetensors"])
def test_three_dtype_spellings_pass_and_another_than_configured_warns(
    spelling: str, style: str
) -> None:
    spec = json.loads(build_spec(checkpoint().shards, style))  # type: ignore[arg-type]
    spec["tensor_map"]["lm_head.weight"]["dtype"] = spelling
    findings = check_full(checkpoint(spec=spec), spec_dtype_style=style)  # type: ignore[arg-type]
    is_configured = spelling == {"torch": "bfloat16", "safetensors": "BF16"}[style]
    assert rules(findings) == set()
    assert rules(findings, "warning") == (set() if is_configured else {"spec_spelling"})


def test_every_dtype_has_a_spelling_that_passes() -> None:
    for dtype in DTYPE_BITS:
        layout = {"m.safetensors": {"model.layers.0.weight": (dtype, (4, 2))}}
        findings = check_full(checkpoint(layout))
        assert not rules(findings) & {"spec_dtype", "spec_shape", "spec_spelling"}, dtype
    assert len(set(TORCH_DTYPES.values())) == len(TORCH_DTYPES) == len(DTYPE_BITS) - 2


@pytest.mark.parametrize(
    ("tensors", "errors", "warnings"),
    [
        (["model.layers.0.a", "model.layers.0.b"], set(), set()),
        (["model.layers.0.experts.3.w", "model.layers.0.experts.4.w"], set(), set()),
        (["model.layers.0.a", "model.layers.1.a"], {"one_layer"}, set()),
        (["model.layers.1.a", "model.layers.10.a"], {"one_layer"}, set()),
        (["transformer.h.0.a", "transformer.h.1.a"], {"one_layer"}, set()),
        (["model.layers.0.a", "visual.blocks.0.a"], {"one_layer"}, set()),
        (["model.layers.0.a", "model.embed_tokens.weight"], {"one_layer"}, set()),
        (["model.embed_tokens.weight", "model.norm.weight"], {"one_layer"}, set()),
        (["model.norm.weight", "lm_head.weight"], {"one_layer"}, set()),
        (["lm_head.weight", "lm_head.bias"], set(), set()),
        (["model.norm.weight", "model.norm.bias"], set(), set()),
        (["model.layers.0.a", "model.rotary.inv_freq"], set(), {"one_layer"}),
        (["visual.patch_embed.proj.weight", "visual.merger.weight"], set(), set()),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_one_layer_per_file(tensors: list[str], errors: set[str], warnings: set[str]) -> None:
    layout = {"m.safetensors": dict.fromkeys(tensors, ("BF16", (2,)))}
    findings = check_full(checkpoint(layout))
    assert rules(findings) == errors
    assert rules(findings, "warning") == warnings


@pytest.mark.parametrize(
    ("size_bytes", "severity"),
    [
        (4_499_999_999, None),
        (4_500_000_000, "warning"),
        (5_000_000_000, "warning"),
        (5_000_000_001, "error"),
    ],
)
def test_shards_stay_under_five_gigabytes(size_bytes: int, severity: str | None) -> None:
    good = checkpoint()
    large = replace(good.shards[0], size_bytes=size_bytes)
    findings = check_full(replace(good, shards=(large, *good.shards[1:])))
    assert [(f.rule, f.severity) for f in findings] == (
        [("shard_size", severity)] if severity else []
    )


@pytest.mark.parametrize(
    "file",
    [
        "model_mp_rank_00.safetensors",
        "mp_rank_00.safetensors",
        "model-tp1.safetensors",
        "tp_rank_03.safetensors",
        "model.TP-0.safetensors",
        "tp.safetensors",
    ],
)
def test_names_of_tensor_parallel_shards_are_refused(file: str) -> None:
    assert rules(check_full(checkpoint({file: TENSORS["model-00001.safetensors"]}))) == {
        "tensor_parallel"
    }


@pytest.mark.parametrize(
    "file", ["http.safetensors", "output-0.safetensors", "model-tpl.safetensors"]
)
def test_names_that_merely_contain_the_letters_pass(file: str) -> None:
    assert check_full(checkpoint({file: TENSORS["model-00001.safetensors"]})) == ()


def test_an_adapter_config_in_a_full_is_refused() -> None:
    assert rules(check_full(checkpoint(adapter={}))) == {"adapter_in_full"}


def test_what_is_left_out_is_told_once_a_reason() -> None:
    left_out = [LeftOut(name, "no server reads it") for name in ("latest", "b.pkl", "a\n.log")]
    findings = check_full(replace(checkpoint(), left_out=(*left_out, LeftOut("runs", "other"))))
    assert rules(findings) == set()
    assert [finding.where for finding in findings] == ["'a\\n.log', b.pkl, latest", "runs"]


# config.json against the base model


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({**CONFIG, "hidden_size": 16}, "config_value"),
        ({**CONFIG, "hidden_size": 8.0}, "config_type"),
        ({**CONFIG, "use_cache": 1}, "config_type"),
        ({**CONFIG, "rope_theta": None}, "config_type"),
        (
            {key: CONFIG[key] for key in ("model_type", "hidden_size", "use_cache")},
            "extra_base_config",
        ),
        ({**CONFIG, "step": 7}, "extra_config"),
    ],
    ids=["value", "float", "bool", "null", "lacking", "extra"],
)
def test_a_config_that_differs_from_the_base_is_refused(config: dict, rule: str) -> None:
    findings = check_full(checkpoint(config=config), base_config=CONFIG)
    assert rules(findings) == {rule}
    assert "extra_fields_ignore" in findings[0].expected
    ignored = ["hidden_size", "use_cache", "rope_theta", "step"]
    assert (
        check_full(checkpoint(config=config), base_config=CONFIG, extra_fields_ignore=ignored) == ()
    )


def test_key_order_and_non_finite_numbers_make_no_difference() -> None:
    config = {"limits": [0.0, float("inf"), float("nan")], "nested": {"a": 1, "b": 2}}
    other = {"nested": {"b": 2, "a": 1}, "limits": [0.0, float("inf"), float("nan")]}
    assert check_full(checkpoint(config=config), base_config=other) == ()


def test_quantization_config_may_be_extra_and_a_changed_one_warns() -> None:
    quantized = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    extra = check_full(checkpoint(config=quantized), base_config=CONFIG)
    assert rules(extra) == set()
    left_out = check_full(checkpoint(), base_config=quantized)
    assert rules(left_out) == set()
    assert rules(left_out, "warning") == {"quantization_differs"}


# Tensor set against the base model


def shapes_of(layout: Layout) -> dict[str, tuple[int, ...] | None]:
    return {name: shape for tensors in layout.values() for name, (_, shape) in tensors.items()}


def test_a_tensor_the_base_has_and_the_snapshot_lacks_is_refused() -> None:
    base = shapes_of(TENSORS) | {"model.layers.2.a": (3,)}
    (finding,) = check_full(checkpoint(), base_shapes=base)
    assert (finding.rule, finding.tensor) == ("missing_tensor", "model.layers.2.a")


def test_a_tensor_the_base_does_not_have_is_refused() -> None:
    base = shapes_of(TENSORS)
    del base["lm_head.weight"]
    assert rules(check_full(checkpoint(), base_shapes=base)) == {"extra_tensor"}


def test_a_shape_of_another_size_than_the_base_is_refused_where_it_is_known() -> None:
    base = shapes_of(TENSORS) | {"lm_head.weight": (32, 8)}
    assert rules(check_full(checkpoint(), base_shapes=base)) == {"base_shape"}
    assert check_full(checkpoint(), base_shapes=base | {"lm_head.weight": None}) == ()


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}]
)
def test_a_tied_head_may_be_missing_on_either_side(config: dict) -> None:
    without = edited(TENSORS, lambda files: files.pop("model-00005.safetensors"))
    assert check_full(checkpoint(without, config=config), base_shapes=shapes_of(TENSORS)) == ()
    copied = check_full(checkpoint(config=config), base_shapes=shapes_of(without))
    assert rules(copied) == set()
    assert rules(copied, "warning") == {"tied_head"}


def test_an_untied_head_may_not_be_missing() -> None:
    without = edited(TENSORS, lambda files: files.pop("model-00005.safetensors"))
    config = {**CONFIG, "tie_word_embeddings": False}
    findings = check_full(checkpoint(without, config=config), base_shapes=shapes_of(TENSORS))
    assert rules(findings) == {"missing_tensor", "missing_head"}


# Quantized snapshots

WEIGHT = "model.layers.0.mlp.up.weight"
QUANTIZED = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}


def quantized(weight: tuple[str, tuple[int, ...]], scale: str | None, name: str = WEIGHT) -> Layout:
    tensors = {name: weight} | ({scale: ("F32", (1, 1))} if scale else {})
    return {"m.safetensors": tensors}


MIXED = {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors"}}


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        (WEIGHT, "F8_E4M3", f"{WEIGHT}_scale_inv"),
        (WEIGHT, "F8_E5M2", f"{WEIGHT}_scale"),
        (WEIGHT, "F4", f"{WEIGHT}_scale"),
        (f"{WEIGHT}_packed", "I32", f"{WEIGHT}_scale"),
        ("model.layers.0.up.qweight", "I32", "model.layers.0.up.scales"),
        ("model.layers.0.experts.up_blocks", "U8", "model.layers.0.experts.up_scales"),
    ],
)
def test_a_quantized_tensor_needs_its_scale_and_a_quantization_config(
    name: str, dtype: str, scale: str
) -> None:
    shape = (1, 1, 16) if name.endswith("_blocks") else (4, 4)
    whole, alone = quantized((dtype, shape), scale, name), quantized((dtype, shape), None, name)
    assert check_full(checkpoint(whole, config=MIXED)) == ()
    assert rules(check_full(checkpoint(alone, config=MIXED))) == {"missing_scale"}
    assert rules(check_full(checkpoint(whole))) == {"quantization_config"}


def test_a_scale_that_the_spec_lacks_is_refused() -> None:
    layout = quantized(("F8_E4M3", (4, 4)), f"{WEIGHT}_scale_inv")
    spec = {"tensor_map": {WEIGHT: {"shape": [4, 4], "dtype": "float8_e4m3fn"}}}
    assert rules(check_full(checkpoint(layout, config=QUANTIZED, spec=spec))) == {"spec_missing"}


@pytest.mark.parametrize("settings", [{}, [], "fp8", {"quant_method": 8}], ids=str)
def test_a_quantization_config_without_method_is_refused(settings: object) -> None:
    layout = quantized(("F8_E4M3", (4, 4)), f"{WEIGHT}_scale")
    config = {**CONFIG, "quantization_config": settings}
    assert rules(check_full(checkpoint(layout, config=config))) == {"quantization_config"}


def test_a_quantization_config_without_quantized_tensors_warns() -> None:
    findings = check_full(checkpoint(config=QUANTIZED))
    assert rules(findings) == set()
    assert rules(findings, "warning") == {"quantization_config"}


def test_scales_and_packing_do_not_count_against_the_base() -> None:
    plain = {WEIGHT: (4, 4)}
    packed = quantized(("I32", (4, 1)), f"{WEIGHT}_scale", f"{WEIGHT}_packed")
    assert check_full(checkpoint(packed, config=MIXED), base_shapes=plain) == ()
    nvfp4 = {"m.safetensors": NVFP4}
    assert check_full(checkpoint(nvfp4, config=MIXED), base_shapes={WEIGHT: (256, 384)}) == ()
    assert rules(check_full(checkpoint(nvfp4, config=MIXED), base_shapes=plain)) == {"base_shape"}
    full = {"m.safetensors": {WEIGHT: ("BF16", (4, 4))}}
    base = {f"{WEIGHT}_packed": (4, 1), f"{WEIGHT}_scale": (1, 1)}
    assert check_full(checkpoint(full), base_shapes=base) == ()


NVFP4 = {
    WEIGHT: ("U8", (256, 192)),
    f"{WEIGHT}_scale": ("F8_E4M3", (256, 24)),
    f"{WEIGHT}_scale_2": ("F32", ()),
    f"{WEIGHT.removesuffix('weight')}input_scale": ("F32", ()),
}


def settings(**fields: object) -> dict[str, object]:
    return {**CONFIG, "quantization_config": {"quant_method": "fp8", **fields}}


BLOCKS, MX, GROUPS = (
    settings(weight_block_size=[128, 128]),
    settings(weight_block_size=[1, 32]),
    settings(quant_method="nvfp4", weight_block_size=[1, 16]),
)


@pytest.mark.parametrize(
    ("config", "tensors", "name"),
    [
        (
            BLOCKS,
            {WEIGHT: ("F8_E4M3", (256, 300)), f"{WEIGHT}_scale_inv": ("F32", (2, 3))},
            "fp8 e4m3, blocks of 128 x 128",
        ),
        (
            QUANTIZED,
            {WEIGHT: ("F8_E5M2", (256, 300)), f"{WEIGHT}_scale": ("F32", ())},
            "fp8 e5m2, one scale a tensor",
        ),
        (
            MIXED,
            {WEIGHT: ("F8_E4M3", (256, 300)), f"{WEIGHT}_scale": ("BF16", (256, 1))},
            "fp8 e4m3, one scale a row",
        ),
        (
            QUANTIZED,
            {WEIGHT: ("F8_E4M3", (256, 300)), "model.layers.0.mlp.up.scale": ("F8_E8M0", (2, 3))},
            "fp8 e4m3, blocks",
        ),
        (
            MX,
            {WEIGHT: ("F8_E4M3", (256, 64)), f"{WEIGHT}_scale_inv": ("U8", (256, 2))},
            "mxfp8, groups of 32",
        ),
        (
            GROUPS,
            {
                WEIGHT: ("F4", (256, 384)),
                f"{WEIGHT}_scale_inv": ("F8_E4M3", (256, 24)),
                f"{WEIGHT}_scale_global": ("F32", ()),
            },
            "nvfp4, groups of 16",
        ),
        (MIXED, NVFP4, "nvfp4, groups of 16"),
        (
            MIXED,
            {
                f"{WEIGHT}_packed": ("U8", (256, 192)),
                f"{WEIGHT}_scale": ("F8_E4M3", (256, 24)),
                f"{WEIGHT}_global_scale": ("F32", (1,)),
            },
            "nvfp4, groups of 16",
        ),
        (
            settings(quant_method="mxfp4"),
            {
                "model.layers.0.experts.up_blocks": ("U8", (4, 32, 2, 16)),
                "model.layers.0.experts.up_scales": ("U8", (4, 32, 2)),
            },
            "mxfp4, groups of 32",
        ),
        (
            MIXED,
            {
                f"{WEIGHT}_packed": ("I32", (256, 8)),
                f"{WEIGHT}_scale": ("BF16", (256, 2)),
                f"{WEIGHT}_shape": ("I64", (2,)),
            },
            "integers packed in I32",
        ),
        (
            MIXED,
            {WEIGHT: ("I8", (256, 64)), f"{WEIGHT}_scale": ("F32", (256, 1))},
            "int8, one scale a row",
        ),
    ],
)
def test_quantized_weights_are_called_what_they_are(
    config: Mapping, tensors: Mapping, name: str
) -> None:
    whole = checkpoint({"m.safetensors": tensors}, config=config)
    assert check_full(whole) == ()
    assert describe_quantization(tuple(whole.tensors), config) == f"1 tensor in {name}"


@pytest.mark.parametrize(
    ("config", "dtype", "scale", "rule", "told"),
    [
        (BLOCKS, "F8_E4M3", ("F32", (256, 1)), "scale_shape", "[2, 3]: blocks of 128 x 128"),
        (MX, "F8_E4M3", ("F32", (2, 3)), "scale_shape", "[256, 10]: blocks of 1 x 32"),
        (QUANTIZED, "F8_E4M3", ("F32", (257,)), "scale_shape", "a row or a block"),
        (MIXED, "F4", ("U8", (256, 11)), "scale_shape", "[256, 10]: blocks of 1 x 32, as the form"),
        (BLOCKS, None, ("F32", (2, 3)), "scale_alone", f"{WEIGHT} or {WEIGHT}_packed"),
        (GROUPS, "F8_E4M3", ("F32", (256, 19)), "quantization_method", "the quant_method of fp8"),
        (QUANTIZED, "F4", ("U8", (256, 10)), "quantization_method", "the quant_method of mxfp4"),
    ],
)
def test_a_scale_belongs_to_its_weight(
    config: Mapping, dtype: str | None, scale: tuple, rule: str, told: str
) -> None:
    tensors = {WEIGHT: (dtype, (256, 300))} if dtype else {}
    tensors |= {f"{WEIGHT}_scale_inv": scale}
    findings = check_full(checkpoint({"m.safetensors": tensors}, config=config))
    (finding,) = (one for one in findings if one.severity == "error")
    assert (finding.rule, finding.who) == (rule, "trainer")
    assert told in finding.expected


def test_nvfp4_needs_both_scales() -> None:
    alone = {name: form for name, form in NVFP4.items() if not name.endswith("_scale_2")}
    (finding,) = check_full(checkpoint({"m.safetensors": alone}, config=MIXED))
    assert (finding.rule, finding.tensor, finding.found) == (
        "missing_scale",
        WEIGHT,
        "nvfp4 with one scale",
    )
    assert f"{WEIGHT}_scale_2" in finding.expected


def test_a_scale_that_stayed_beside_a_plain_weight_warns() -> None:
    layout = {"m.safetensors": {WEIGHT: ("BF16", (4, 4)), f"{WEIGHT}_scale_inv": ("F32", (1, 1))}}
    findings = check_full(checkpoint(layout))
    assert (rules(findings), rules(findings, "warning")) == (set(), {"scale_of_plain"})


def test_a_parameter_called_scale_is_not_a_scale_of_a_weight() -> None:
    names = ("model.layers.0.layer_scale", "model.layers.0.attn.k_scale", "logit_scale")
    layout = {"m.safetensors": dict.fromkeys(names, ("BF16", (4,)))}
    assert rules(check_full(checkpoint(layout))) == set()


# LoRA snapshots

ADAPTER = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "accounts/a/models/m"}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight": ("BF16", (4, 8)), f"{Q}.lora_B.weight": ("BF16", (8, 4))}


def adapter(
    tensors: Mapping = PAIR, config: object = ADAPTER, file: str = "adapter_model.safetensors"
) -> Checkpoint:
    return checkpoint({file: tensors}, adapter=config, config=None, index=None, spec=None)


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors"]
)
def test_a_good_adapter_has_no_finding(file: str) -> None:
    assert check_lora(adapter(file=file), base_model="accounts/a/models/m") == ()
    assert check_lora(adapter(file=file)) == ()


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (None, "missing_file"),
        (b"{", "json"),
        ({**ADAPTER, "base_model_name_or_path": "other"}, "base_model"),
        ({**ADAPTER, "base_model_name_or_path": None}, "base_model"),
        ({key: ADAPTER[key] for key in ("peft_type", "r")}, "base_model"),
        ({**ADAPTER, "peft_type": "IA3"}, "peft_type"),
        ({**ADAPTER, "r": 0}, "rank"),
        ({**ADAPTER, "r": True}, "rank"),
    ],
    ids=str,
)
def test_an_adapter_config_that_breaks_a_rule_is_refused(config: object, rule: str) -> None:
    assert rules(check_lora(adapter(config=config), base_model="accounts/a/models/m")) == {rule}


@pytest.mark.parametrize(
    ("named", "served", "severity"),
    [
        ("accounts/fireworks/models/qwen3-8b", "accounts/fireworks/models/qwen3-8b", None),
        ("Qwen/Qwen3-8B", "accounts/fireworks/models/qwen3-8b", "warning"),
        ("/data/models/qwen3-8b/", "accounts/fireworks/models/qwen3-8b", "warning"),
        ("Qwen/Qwen2.5-7B", "accounts/fireworks/models/qwen2p5-7b", "warning"),
        ("Qwen/Qwen3-4B", "accounts/fireworks/models/qwen3-8b", "error"),
        ("accounts/a/models/qwen3-8b-base", "accounts/a/models/qwen3-8b", "error"),
    ],
)
def test_an_adapter_is_of_the_served_model_whatever_its_spelling(
    named: str, served: str, severity: str | None
) -> None:
    findings = check_lora(
        adapter(config={**ADAPTER, "base_model_name_or_path": named}), base_model=served
    )
    assert [(one.rule, one.severity) for one in findings] == (
        [("base_model", severity)] if severity else []
    )
    if findings:
        assert (named in findings[0].found, served in findings[0].expected) == (True, True)


def test_adapter_weights_have_to_be_there_in_a_known_file() -> None:
    empty = checkpoint({}, adapter=ADAPTER, config=None, index=None, spec=None)
    assert rules(check_lora(empty)) == {"missing_adapter"}
    assert rules(check_lora(adapter(file="weights.safetensors"))) == {
        "missing_adapter",
        "stray_shard",
    }


def test_a_pickled_adapter_is_a_warning() -> None:
    empty = checkpoint({}, adapter=ADAPTER, config=None, index=None, spec=None)
    pickled = replace(empty, side_files=(*empty.side_files, side("adapter_model.bin")))
    assert [(f.rule, f.severity) for f in check_lora(pickled)] == [("pickle", "warning")]


def test_an_adapter_matrix_needs_its_partner_and_one_rank() -> None:
    down = {f"{Q}.lora_A.weight": ("BF16", (4, 8))}
    assert rules(check_lora(adapter(down))) == {"lora_pair"}
    assert rules(check_lora(adapter({**PAIR, f"{Q}.lora_B.weight": ("BF16", (8, 5))}))) == {
        "lora_rank"
    }


# Delta snapshots


def delta_of(full: Checkpoint) -> Checkpoint:
    shards = tuple(
        shard_header(
            {tensor.name: ("U8", (21,)) for tensor in shard.tensors},
            shard.file,
            **{tensor.name: "478807142" for tensor in shard.tensors},
        )
        for shard in full.shards
    )
    return replace(full, shards=shards)


def test_a_good_delta_has_no_finding() -> None:
    assert check_delta(delta_of(checkpoint()), checkpoint()) == ()


def changed_shard(delta: Checkpoint, tensors: Mapping, **metadata: str) -> Checkpoint:
    return replace(
        delta,
        shards=(shard_header(tensors, "model-00001.safetensors", **metadata), *delta.shards[1:]),
    )


EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda d: replace(d, shards=d.shards[1:]), "missing_shard"),
        (
            lambda d: replace(d, shards=(*d.shards, shard_header({}, "z.safetensors"))),
            "stray_shard",
        ),
        (lambda d: changed_shard(d, {}), "missing_tensor"),
        (
            lambda d: changed_shard(
                d, {EMBED: ("U8", (21,)), "x": ("U8", (9,))}, **{EMBED: "1", "x": "1"}
            ),
            "extra_tensor",
        ),
        (lambda d: changed_shard(d, {EMBED: ("I8", (21,))}, **{EMBED: "1"}), "payload"),
        (lambda d: changed_shard(d, {EMBED: ("U8", (3, 7))}, **{EMBED: "1"}), "payload"),
        (lambda d: changed_shard(d, {EMBED: ("U8", (21,))}), "checksum"),
        (lambda d: changed_shard(d, {EMBED: ("U8", (21,))}, **{EMBED: "1c8a0466"}), "checksum"),
        (
            lambda d: replace(d, documents={**d.documents, "adapter_config.json": b"{}"}),
            "adapter_in_delta",
        ),
        (lambda d: replace(d, side_files=d.side_files[1:]), "side_file"),
        (lambda d: replace(d, side_files=(*d.side_files, side("new.json"))), "side_file"),
        (
            lambda d: replace(d, side_files=(*d.side_files[:-1], side("tokenizer.json", b"[]"))),
            "side_file",
        ),
    ],
)
def test_a_delta_that_breaks_a_rule_is_refused(change: Callable, rule: str) -> None:
    findings = check_delta(change(delta_of(checkpoint())), checkpoint())
    assert rules(findings) == {rule}
    assert {finding.who for finding in findings} == {"publisher"}


# Drift


def test_equal_layouts_do_not_drift_whatever_their_metadata() -> None:
    other = checkpoint()
    renamed = tuple(
        replace(shard, metadata={"step": "7"}, data_start=640) for shard in other.shards
    )
    assert delta_obstacle(checkpoint(), replace(other, shards=renamed)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda f: f.pop("model-00005.safetensors"),
            "shard files changed: model-00005.safetensors",
        ),
        (
            lambda f: f["model-00004.safetensors"].update(b=("F32", ())),
            "tensors of model-00004.safetensors changed: b",
        ),
        (
            lambda f: f["model-00004.safetensors"].update({"model.norm.weight": ("F32", (8,))}),
            "model.norm.weight in model-00004.safetensors changed from BF16 [8] to F32 [8]",
        ),
        (
            lambda f: f["model-00004.safetensors"].update({"model.norm.weight": ("BF16", (2, 4))}),
            "model.norm.weight in model-00004.safetensors changed from BF16 [8] to BF16 [2, 4]",
        ),
        (
            lambda f: f.update(
                {"model-00002.safetensors": dict(reversed(f["model-00002.safetensors"].items()))}
            ),
            "order of tensors in model-00002.safetensors changed",
        ),
        (
            lambda f: f["model-00004.safetensors"].update(f.pop("model-00005.safetensors")),
            "shard files changed: model-00005.safetensors",
        ),
    ],
)
def test_a_changed_layout_forces_a_full_and_says_why(change: Callable, reason: str) -> None:
    assert delta_obstacle(checkpoint(), checkpoint(edited(TENSORS, change))) == reason


@pytest.mark.parametrize("document", ["config", "index", "spec"])
def test_a_changed_document_forces_a_full(document: str) -> None:
    changed = checkpoint()
    values = {name: json.loads(data) | {"new": 1} for name, data in changed.documents.items()}
    names = {
        "config": "config.json",
        "index": "model.safetensors.index.json",
        "spec": "model.weight.spec.json",
    }
    other = checkpoint(**{document: values[names[document]]})
    assert (
        delta_obstacle(checkpoint(), other)
        == f"files beside the shards changed: {names[document]}; each time costs 3.2 kB"
    )


def test_a_changed_or_missing_tokenizer_forces_a_full() -> None:
    good = checkpoint()
    for sides in ((*good.side_files[:-1], side("tokenizer.json", b"[]")), good.side_files[:-1]):
        assert (
            delta_obstacle(good, replace(good, side_files=sides))
            == "files beside the shards changed: tokenizer.json; each time costs 3.2 kB"
        )


def test_long_lists_are_told_short() -> None:
    many = {f"m{i}.safetensors": {f"model.layers.{i}.a": ("U8", (1,))} for i in range(9)}
    assert delta_obstacle(checkpoint({}), checkpoint(many)) == (
        "shard files changed: m0.safetensors, m1.safetensors, m2.safetensors and 6 more"
    )


# Renders and refusals


def test_index_and_spec_are_of_the_documented_form() -> None:
    shards = checkpoint().shards
    index = json.loads(build_index(reversed(shards)))
    assert index["weight_map"]["lm_head.weight"] == "model-00005.safetensors"
    assert index["metadata"]["total_size"] == sum(s.size_bytes - s.data_start for s in shards)
    assert build_index(shards) == build_index(reversed(shards))
    spec = json.loads(build_spec(shards))
    assert spec["tensor_map"]["model.layers.1.mlp.gate.scalar"] == {"shape": [], "dtype": "float32"}
    tagged = json.loads(build_spec(shards, "safetensors"))
    assert tagged["tensor_map"]["lm_head.weight"] == {"shape": [16, 8], "dtype": "BF16"}


def test_errors_stop_and_warnings_come_back() -> None:
    warning = Finding("a", "f", None, "x", "y", severity="warning")
    error = Finding("b", "f", None, "x", "y")
    assert refuse_errors([warning]) == (warning,)
    with pytest.raises(InvalidCheckpointError) as caught:
        refuse_errors([warning, error])
    assert caught.value.findings == (error,)
