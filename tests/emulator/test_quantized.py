"""Quantized snapshots: codes become the numbers they stand for, and what is served is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.loading.checkpoint_files import UnsupportedModelError
from emulator.engine.quantized import apply_scales, e4m3, e5m2, e8m0
from emulator.engine.weights import load_llama
from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.quantization import QuantizedTensor, quantized_tensors
from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.directory.operations import encode_directory
from hotload.directory.shards import read_checkpoint
from tests.emulator.conftest import CONFIG, step, tensors, write_json
from tests.emulator.test_loading import answered, logprobs
from tests.quantized import E4M3, E5M2, in_blocks, widened

Start = Callable[..., Any]
Entries = Mapping[str, tuple[str, np.ndarray]]
CODES = bytes(range(256))
QUANTIZED = ("_proj.weight",)


def test_every_code_of_e4m3_and_e5m2_is_what_its_definition_says() -> None:
    assert (E4M3[0x7E], E4M3[0x08], E4M3[0x01]) == (448.0, 2**-6, 2**-9)
    assert (E5M2[0x7B], E5M2[0x7C], E5M2[0x01]) == (57344.0, float("inf"), 2**-16)
    np.testing.assert_array_equal(e4m3(CODES), np.array(E4M3, "<f4"))
    np.testing.assert_array_equal(e5m2(CODES), np.array(E5M2, "<f4"))
    assert [np.signbit(table[0x80]) for table in (e4m3(CODES), e5m2(CODES))] == [True, True]  # −0
    powers = [*(2.0**exponent for exponent in range(-127, 128)), float("nan")]
    np.testing.assert_array_equal(e8m0(CODES), np.array(powers, "<f4"))


def quantized(scale: np.ndarray | None, name: str) -> list[QuantizedTensor]:
    """A weight of 5 x 4 in FP8, as it is found with its scale."""
    tensors = [TensorInfo("a.weight", "F8_E4M3", (5, 4), 0, 20)]
    if scale is not None:
        tensors.append(TensorInfo(name, "F32", scale.shape, 20, 20 + scale.nbytes))
    return quantized_tensors([("a.safetensors", one) for one in tensors], {})


@pytest.mark.parametrize(
    ("block", "scale"),
    [
        (None, [2.0]),
        (None, 2.0),
        (None, [1.0, 2.0, 3.0, 4.0, 5.0]),
        (None, [[1.0], [2.0], [3.0], [4.0], [5.0]]),
        ((2, 3), [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        ((1, 4), [[1.0], [2.0], [3.0], [4.0], [5.0]]),
        ((128, 128), [[3.0]]),
        (None, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),  # blocks that no config declares
    ],
)
@pytest.mark.parametrize("name", ["a.weight_scale", "a.weight_scale_inv", "a.scale"])
def test_a_scale_is_a_tensors_a_rows_or_a_blocks(name: str, block: Any, scale: Any) -> None:
    weight, scales = np.arange(20, dtype="<f4").reshape(5, 4), np.array(scale, "<f4")
    found = {"a.weight": weight.copy(), name: scales, "a.input_scale": weight}
    apply_scales(found, quantized(scales, name), block)
    assert found.keys() == {"a.weight"}
    whole_or_rows = (5, 4) if scales.size == 1 else (1, 4)
    rows, columns = block or ((2, 2) if scales.shape == (3, 2) else whole_or_rows)
    grid = scales.reshape(-(-5 // rows), -(-4 // columns))
    for (i, j), value in np.ndenumerate(weight):
        assert found["a.weight"][i, j] == value * grid[i // rows, j // columns]


@pytest.mark.parametrize(
    ("block", "scale", "reason"),
    [
        (None, None, "has no scale"),
        (None, np.ones((4, 2), "<f4"), r"is \[4, 2\], its weight \[5, 4\]"),
        ((128, 128), np.ones((2, 1), "<f4"), r"is \[2, 1\]"),
        ((2, 3), np.ones((), "<f4"), r"is \[\]"),
    ],
)
def test_a_scale_that_is_missing_or_does_not_fit_is_refused(
    block: Any, scale: np.ndarray | None, reason: str
) -> None:
    found = {"a.weight": np.ones((5, 4), "<f4")}
    if scale is not None:
        found["a.weight_scale_inv"] = scale
    with pytest.raises(UnsupportedModelError, match=reason):
        apply_scales(found, quantized(scale, "a.weight_scale_inv"), block)


def save(directory: Path, entries: Entries, config: Mapping[str, Any], source: Path) -> Path:
    """A checkpoint of these tensors, a layer a file, with the tokenizer of `source`."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    files: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    for name, entry in entries.items():
        parts = name.split(".")
        file = f"layer-{parts[2]}" if parts[1] == "layers" else parts[-2]
        files.setdefault(f"{file}.safetensors", {})[name] = entry
    for file, ours in files.items():
        infos, start = [], 0
        for name, (dtype, array) in ours.items():
            shape = (*array.shape[:-1], 2 * array.shape[-1]) if dtype == "F4" else array.shape
            infos.append(TensorInfo(name, dtype, shape, start, start + array.nbytes))
            start += array.nbytes
        data = b"".join(array.tobytes() for _, array in ours.values())
        (directory / file).write_bytes(render_header(infos, {"format": "pt"}) + data)
    shards = read_checkpoint(directory).shards
    (directory / "model.safetensors.index.json").write_bytes(build_index(shards))
    (directory / "model.weight.spec.json").write_bytes(build_spec(shards))
    write_json(directory / "config.json", config)
    return directory


def values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def fp8(weights: Mapping[str, np.ndarray], rows: int, columns: int) -> tuple[Entries, Entries]:
    """A model with its projections in FP8, and the same in float32."""
    packed: dict[str, tuple[str, np.ndarray]] = {}
    plain: dict[str, tuple[str, np.ndarray]] = {}
    for name, bits in weights.items():
        if not name.endswith(QUANTIZED):
            packed[name], plain[name] = ("BF16", bits), ("F32", values(bits))
            continue
        codes, scales = in_blocks(values(bits), rows, columns)
        packed |= {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", scales)}
        plain[name] = ("F32", widened(codes, scales, rows, columns))
    return packed, plain


def test_fp8_in_blocks_is_served_as_the_numbers_it_stands_for(
    start: Start, publisher: Any, tmp_path: Path
) -> None:
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 24]}
    config = CONFIG | {"quantization_config": settings}
    caller = start(replica_count=1)
    first = tensors(1)
    packed, plain = fp8(first, 16, 24)
    one = save(publisher.bucket / "a", packed, config, publisher.base)
    caller.load("a")
    expected = logprobs(save(tmp_path / "plain-a", plain, CONFIG, publisher.base))
    assert answered(caller) == pytest.approx(expected, abs=1e-5)

    packed, plain = fp8(step(first, 2), 16, 24)
    two = save(tmp_path / "two", packed, config, publisher.base)
    encode_directory(one, two, publisher.bucket / "b")
    caller.load("b", "a")
    assert caller.served() == ["b"]
    after = logprobs(save(tmp_path / "plain-b", plain, CONFIG, publisher.base))
    assert after != pytest.approx(expected, abs=1e-3)
    assert answered(caller) == pytest.approx(after, abs=1e-5)


@pytest.mark.parametrize("declared", [{"weight_block_size": [1, 32]}, {}], ids=["block", "none"])
def test_groups_with_powers_of_two_are_widened_too(
    publisher: Any, tmp_path: Path, declared: dict[str, Any]
) -> None:
    """MXFP8 as the vendor's quantizer writes it: scales of E8M0 in U8, groups of 32 in a row."""
    settings = {"quant_method": "fp8", "fmt": "e4m3", **declared}
    packed, plain = map(dict, fp8(tensors(1), 1, 32))
    exponents = np.random.default_rng(3).integers(118, 125, 1 << 12, np.uint8)
    for name, (_, array) in [*packed.items()]:
        if name.endswith("_scale_inv"):
            chosen = exponents[: array.size].reshape(array.shape)
            packed[name] = ("U8", chosen)
            scales = np.exp2(chosen.astype("<f4") - 127)
            weight = name.removesuffix("_scale_inv")
            plain[weight] = ("F32", widened(packed[weight][1], scales, 1, 32))
    config = CONFIG | {"quantization_config": settings}
    one = save(tmp_path / "mx", packed, config, publisher.base)
    assert logprobs(one) == logprobs(save(tmp_path / "plain", plain, CONFIG, publisher.base))


@pytest.mark.parametrize("place", ["weight_scale_inv", "weight_scale", "scale"])
def test_blocks_that_no_config_declares_are_computed_under_any_name_of_a_scale(
    publisher: Any, tmp_path: Path, place: str
) -> None:
    packed, plain = fp8(tensors(1), 16, 32)  # the last one of 48 columns is half a block
    packed = {name.replace("weight_scale_inv", place): one for name, one in packed.items()}
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    one = save(tmp_path / "fp8", packed, config, publisher.base)
    assert logprobs(one) == logprobs(save(tmp_path / "plain", plain, CONFIG, publisher.base))


@pytest.mark.parametrize("lacking", ["quantization_config", "scale"])
def test_fp8_without_setting_or_scale_is_refused_at_the_signal(
    start: Start, publisher: Any, lacking: str
) -> None:
    packed, _ = fp8(tensors(1), 128, 128)
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    if lacking == "scale":
        packed = {name: one for name, one in packed.items() if "0.mlp.up_proj.weight_" not in name}
    save(publisher.bucket / "a", packed, CONFIG if lacking != "scale" else config, publisher.base)
    answer = start(replica_count=1).signal("a")
    assert (answer.status_code, lacking in answer.text) == (400, True), answer.text


def nibbles(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def int4(name: str, rows: int, columns: int, seed: int) -> Entries:
    return {
        f"{name}_packed": ("I32", nibbles((rows, columns // 2), seed).view("<i4")),
        f"{name}_scale": ("BF16", np.ones((rows, columns // 16), "<u2")),
        f"{name}_shape": ("I64", np.array([rows, columns])),
    }


def mxfp4(name: str, rows: int, columns: int, seed: int) -> Entries:
    return {
        f"{name}_packed": ("U8", nibbles((rows, columns // 2), seed)),
        f"{name}_scale": ("U8", nibbles((rows, columns // 16), seed)),
    }


def nvfp4(name: str, rows: int, columns: int, seed: int) -> Entries:
    return {
        name: ("F4", nibbles((rows, columns // 2), seed)),
        f"{name}_scale_inv": ("F8_E4M3", nibbles((rows, columns // 16), seed)),
        f"{name}_scale_global": ("F32", np.array(0.5, "<f4")),
    }


@pytest.mark.parametrize(
    ("pack", "method"),
    [(int4, "compressed-tensors"), (mxfp4, "compressed-tensors"), (nvfp4, "nvfp4")],
)
def test_four_bits_are_loaded_by_the_stub_over_a_base_in_bf16(
    start: Start, publisher: Any, tmp_path: Path, pack: Callable[..., Entries], method: str
) -> None:
    def model(seed: int) -> Entries:
        found: dict[str, tuple[str, np.ndarray]] = {}
        for name, bits in tensors(1).items():
            is_packed = name.endswith(QUANTIZED)
            found |= pack(name, *bits.shape, seed) if is_packed else {name: ("BF16", bits)}
        return found

    config = CONFIG | {"quantization_config": {"quant_method": method}}
    caller = start(replica_count=2, engine="stub")
    one = save(publisher.bucket / "a", model(1), config, publisher.base)
    caller.load("a")
    two = save(tmp_path / "two", model(2), config, publisher.base)
    encode_directory(one, two, publisher.bucket / "b")
    caller.load("b", "a")
    assert caller.served() == ["b", "b"]
    held = [*(tmp_path / "work").glob("emulator-*/replica-*/held/b")]
    assert len(held) == 2
    for directory in held:
        for path in two.glob("*.safetensors"):
            assert (directory / path.name).read_bytes() == path.read_bytes()
    # What computes says that it cannot, and the replica goes on with what it has.
    with pytest.raises(UnsupportedModelError, match="has dtype"):
        load_llama(two)


def test_a_setting_in_a_part_of_the_config_counts(start: Start, publisher: Any) -> None:
    """Kimi K2.5 has it under `text_config`: the base model's config may have none there."""
    part = {"text_config": {"hidden_size": 32}}
    write_json(publisher.base / "config.json", CONFIG | part)
    caller = start(replica_count=1, engine="stub")
    part["text_config"] |= {"quantization_config": {"quant_method": "fp8"}}  # type: ignore[dict-item]
    packed, _ = fp8(tensors(1), 128, 128)
    save(publisher.bucket / "a", packed, CONFIG | part, publisher.base)
    caller.load("a")
    assert caller.served() == ["a"]
    assert json.loads((publisher.base / "config.json").read_text()) == CONFIG | {
        "text_config": {"hidden_size": 32}
    }
