"""The numpy forward is held to transformers: recorded logits, and live where torch is installed."""

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from agent.loading.checkpoint_files import UnsupportedModelError, read_json
from emulator.engine.llama import LlamaShape, LlamaWeights
from emulator.engine.weights import load_llama, read_tensors

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["llama", "llama_tied", "qwen2", "qwen3", "qwen3_moe"]
DENSE = NAMES[:-1]
TOLERANCE = 1e-5


def recorded(name: str) -> tuple[list[int], np.ndarray]:
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    return expected["ids"], np.array(expected["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_recorded_from_transformers(name: str) -> None:
    ids, expected = recorded(name)
    weights = load_llama(FIXTURES / name)
    found = weights.forward(ids, weights.empty_cache(), all_positions=True)
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_equals_the_whole_prompt(name: str) -> None:
    ids, expected = recorded(name)
    weights = load_llama(FIXTURES / name)
    cache = weights.empty_cache()
    weights.forward(ids[:5], cache)
    rows = [weights.forward([token], cache)[-1] for token in ids[5:]]
    assert np.abs(np.array(rows) - expected[5:]).max() < TOLERANCE


def test_every_position_is_sent_to_the_experts_recorded_from_transformers() -> None:
    ids, _ = recorded("qwen3_moe")
    expected = json.loads((FIXTURES / "qwen3_moe" / "expected.json").read_text())["experts"]
    weights = load_llama(FIXTURES / "qwen3_moe")
    assert weights.has_experts
    cache = weights.empty_cache()
    weights.forward(ids[:7], cache)
    copy = cache.prefix(5)  # of a token, an answer goes on with what its prompt has
    weights.forward([0] * 70, cache)  # and the cache grows
    for token in ids[5:]:
        weights.forward([token], copy)
    assert copy.experts[: len(ids)].tolist() == expected
    assert cache.experts[:7].tolist() == expected[:7]
    packed = base64.b64decode(copy.routing_matrix(6) or "")
    assert np.frombuffer(packed, np.uint8).tolist() == np.ravel(expected[6]).tolist()
    assert cache.size_bytes > cache.store.nbytes
    dense = load_llama(FIXTURES / "qwen3")
    assert not dense.has_experts
    assert dense.empty_cache().routing_matrix(0) is None


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_a_copied_prefix_goes_on_by_itself(name: str) -> None:
    ids, expected = recorded(name)
    weights = load_llama(FIXTURES / name)
    cache = weights.empty_cache()
    weights.forward(ids, cache)
    copy = cache.prefix(4)
    weights.forward([0] * 40, cache)  # the original grows and changes
    found = weights.forward(ids[4:], copy, all_positions=True)
    assert np.abs(found - expected[4:]).max() < TOLERANCE


def test_a_long_prompt_is_computed_in_pieces() -> None:
    weights = load_llama(FIXTURES / "llama")
    ids = [int(x) for x in np.random.default_rng(0).integers(0, 64, 1100)]
    whole = weights.forward(ids, weights.empty_cache(), all_positions=True)
    cache = weights.empty_cache()
    pieces = [weights.forward(ids[i : i + 100], cache)[-1] for i in range(0, 1100, 100)]
    assert whole.shape == (1100, 64)
    assert np.abs(whole[99::100] - np.array(pieces)).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding_window"),
        ({"num_key_value_heads": 3}, "divide"),
        ({"vocab_size": None}, "config.json"),
    ],
)
def test_what_the_forward_does_not_compute_is_refused(change: dict, told: str) -> None:
    config = read_json(FIXTURES / "qwen2" / "config.json") | change
    with pytest.raises(UnsupportedModelError, match=told):
        LlamaShape.parse(config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"num_experts_per_tok": 0}, "0 of 8 experts"),
        ({"num_experts": 257}, "2 of 257 experts in 2 layers"),
        ({"decoder_sparse_step": 0}, "in 0 layers"),
        ({"mlp_only_layers": [0, 1, 2]}, "in 0 layers"),
        ({"mlp_only_layers": 1}, "config.json"),
        ({"num_experts": None}, "config.json"),
        ({"moe_intermediate_size": "wide"}, "config.json"),
        ({"mlp_only_layers": []}, "model.layers.1.mlp.gate.weight"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, "model.layers.0.mlp.gate_proj.weight"),
        ({"moe_intermediate_size": 11}, "expected \\(11, 16\\)"),
    ],
)
def test_experts_that_do_not_fit_are_refused(change: dict, told: str) -> None:
    config = read_json(FIXTURES / "qwen3_moe" / "config.json") | change
    with pytest.raises(UnsupportedModelError, match=told):
        LlamaWeights(config, read_tensors(FIXTURES / "qwen3_moe"))


def test_missing_misshapen_and_unknown_tensors_are_refused() -> None:
    config = read_json(FIXTURES / "llama" / "config.json")
    tensors = read_tensors(FIXTURES / "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(UnsupportedModelError, match="down_proj"):
        LlamaWeights(config, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UnsupportedModelError, match="shape"):
        LlamaWeights(config, tensors | {name: tensors[name].T})
    with pytest.raises(UnsupportedModelError, match="expert"):
        LlamaWeights(config, tensors | {"model.layers.0.mlp.expert": tensors[name]})


@pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="torch is not installed",
)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", DENSE)
def test_logits_equal_those_of_transformers_now(name: str) -> None:
    from emulator.engine.torch_engine import TorchEngine

    ids = [int(x) for x in np.random.default_rng(7).integers(0, 64, 50)]
    numpy_weights = load_llama(FIXTURES / name)
    torch_weights = TorchEngine().load(FIXTURES / name)
    found = numpy_weights.forward(ids, numpy_weights.empty_cache(), all_positions=True)
    cache = torch_weights.empty_cache()
    expected = torch_weights.forward(ids[:30], cache, all_positions=True)
    copy = cache.prefix(20)
    assert np.abs(found[:30] - expected).max() < 2e-5
    rest = torch_weights.forward(ids[20:], copy, all_positions=True)
    assert np.abs(found[20:] - rest).max() < 2e-5
