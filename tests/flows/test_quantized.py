"""Quantized models and adapters through whole cycles: what is sampled is what was trained."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import httpx
import numpy as np
import polars as pl
import pytest

from emulator.engine.decoding import log_softmax
from emulator.engine.weights import load_llama
from hotload.errors import InvalidCheckpointError
from hotload.identity import SnapshotKind
from tests.flows.fleet import API_KEY, Fleet, running_fleet, save_blocks
from tests.flows.test_layouts import (
    Model,
    Tensor,
    Writer,
    in_files,
    in_one_file,
    model_in,
    run,
    write_checkpoint,
    write_shard,
)
from tests.quantized import in_blocks, widened
from tests.waiting import PATIENCE_SECONDS

PROMPT = [5, 9, 200, 31, 7]
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
PROJECTION = "self_attn.q_proj"


def quantized(model: Model) -> tuple[Model, Model]:
    """The model with its projections in FP8, in blocks of 128 x 128, and the same in float32."""
    packed: Model = {}
    plain: Model = {}
    for name, tensor in model.items():
        packed[name] = plain[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        bits = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        codes, scales = in_blocks(bits.view("<f4").reshape(tensor.shape), 128, 128)
        packed[name] = Tensor("F8_E4M3", tensor.shape, codes.tobytes())
        packed[f"{name}_scale_inv"] = Tensor("F32", scales.shape, scales.tobytes())
        values = widened(codes, scales, 128, 128)
        plain[name] = Tensor("F32", tensor.shape, values.tobytes())
    return packed, plain


def in_fp8(write: Writer) -> Writer:
    return lambda directory, model: write(directory, quantized(model)[0])


def expected(directory: Path, adapter: Path | None = None) -> list[float]:
    """Log-probabilities of the prompt by the weights in a directory, apart from the service."""
    weights = load_llama(directory, adapter)
    logits = weights.forward(PROMPT, weights.empty_cache(), all_positions=True)
    rows = [log_softmax(row.astype(np.float64)) for row in logits]
    return [float(row[token]) for row, token in zip(rows, PROMPT[1:], strict=False)]


def answered(fleet: Fleet, model: str = "accounts/local/deployments/rollouts") -> list[float]:
    """The same, as a replica answers it."""
    body = {"model": model, "prompt": PROMPT, "echo": True, "logprobs": True, "max_tokens": 0}
    answer = httpx.post(
        f"{fleet.url}/inference/v1/completions",
        json=body,
        headers={"Authorization": f"Bearer {API_KEY}"},
        timeout=PATIENCE_SECONDS,
    )
    content = answer.raise_for_status().json()["choices"][0]["logprobs"]["content"]
    return [entry["logprob"] for entry in content][1:]


def plain_copy(fleet: Fleet, version: int) -> Path:
    """The weights of a version as its FP8 checkpoint stands for them, in float32."""
    directory = fleet.root / f"plain-{version}"
    directory.mkdir()
    source = fleet.checkpoints[version]
    in_one_file(directory, quantized(model_in(source))[1])
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


async def test_an_fp8_model_by_a_full_and_a_delta(fleet: Fleet) -> None:
    changes = {"base_model": str(fleet.checkpoints[0])}  # in bf16: scales are no tensors of it
    write_checkpoint(fleet, 1, in_fp8(in_files(3)), quantization_config=SETTINGS)
    first = await run(fleet, 1, **changes)
    assert (first.snapshot.kind, fleet.served()) == (SnapshotKind.FULL, {first.snapshot.identity})
    before = expected(plain_copy(fleet, 1))
    assert answered(fleet) == pytest.approx(before, abs=1e-5)

    write_checkpoint(fleet, 2, in_fp8(in_files(2)), quantization_config=SETTINGS)
    second = await run(fleet, 2, **changes)
    assert second.snapshot.kind is SnapshotKind.DELTA
    assert fleet.served() == {second.snapshot.identity}
    after = expected(plain_copy(fleet, 2))
    assert after != pytest.approx(before, abs=1e-4)
    assert answered(fleet) == pytest.approx(after, abs=1e-5)
    assert fleet.log()["client_bugs"] == []

    # The trainer quantizes in other blocks than config.json says, and loses a scale.
    def in_other_blocks(directory: Path, model: Model) -> None:
        packed, _ = quantized(model)
        wrong, lost = (f"model.layers.{n}.mlp.up_proj.weight_scale_inv" for n in (0, 1))
        packed[wrong] = Tensor("F32", (352, 1), bytes(4 * 352))
        del packed[lost]
        in_one_file(directory, packed)

    write_checkpoint(fleet, 3, in_other_blocks, quantization_config=SETTINGS)
    with pytest.raises(InvalidCheckpointError) as refused:
        await run(fleet, 3, **changes)
    assert [(one.rule, one.tensor) for one in refused.value.findings] == [
        ("scale_shape", "model.layers.0.mlp.up_proj.weight_scale_inv"),
        ("missing_scale", "model.layers.1.mlp.up_proj.weight"),
    ]
    assert len(fleet.log()["signals"]) == 2


@pytest.fixture
async def slots(prefect_api: str, tmp_path: Path, checkpoints: list[Path]) -> AsyncIterator[Fleet]:
    """A fleet that holds two adapters side by side."""
    name = f"slots-{uuid4().hex[:12]}"
    with running_fleet(name, tmp_path, checkpoints, adapter_slots=2) as running:
        await save_blocks(running)
        yield running


def save_adapter(fleet: Fleet, version: int, base_model: str) -> Path:
    """An adapter as peft writes it, of one projection in every layer."""
    random, directory = np.random.default_rng(version), fleet.root / f"trainer-{version}"
    directory.mkdir(exist_ok=True)
    tensors: Model = {}
    for layer in range(6):
        stem = f"base_model.model.model.layers.{layer}.{PROJECTION}"
        for part, shape in (("A", (2, 128)), ("B", (128, 2))):
            values = random.normal(0, 0.5, shape).astype("<f4")
            tensors[f"{stem}.lora_{part}.weight"] = Tensor("F32", shape, values.tobytes())
    write_shard(directory / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": base_model,
        "target_modules": ["q_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def sampled_from(fleet: Fleet, version: int) -> set[str]:
    """The weights that a version's samples came from, as the answers said."""
    parts = [pl.read_parquet(path) for path in fleet.bucket.rglob("*.parquet")]
    rows = pl.concat(parts).filter(pl.col("policy_version") == version)
    return {*rows["first_identity"], *rows["last_identity"]}


def unload(fleet: Fleet, identity: str) -> None:
    """Unload an adapter by the control plane."""
    url = f"{fleet.url}/v1/accounts/local/deployedModels/{identity}"
    answer = httpx.delete(url, headers={"X-Api-Key": API_KEY}, timeout=PATIENCE_SECONDS)
    answer.raise_for_status()


async def test_adapters_over_a_delta_are_served_sampled_and_unloaded(slots: Fleet) -> None:
    fleet = slots
    base = f"accounts/fireworks/models/{fleet.checkpoints[0].name}"
    for version in (1, 2):
        write_checkpoint(fleet, version, in_files(2))
        below = await run(fleet, version)
    assert below.snapshot.kind is SnapshotKind.DELTA
    weights = fleet.checkpoints[2]

    # Of another model: told by both names, and nothing of it is uploaded.
    save_adapter(fleet, 3, "accounts/fireworks/models/another-8b")
    with pytest.raises(InvalidCheckpointError, match=f"another-8b.*expected.*{base}") as refused:
        await run(fleet, 3)
    assert [one.rule for one in refused.value.findings] == ["base_model"]
    assert [*fleet.bucket.rglob("adapter*")] == []
    assert len(fleet.log()["signals"]) == 2

    names: dict[int, str] = {}
    for version in (3, 4):
        directory = save_adapter(fleet, version, base)
        report = await run(fleet, version)
        names[version] = report.snapshot.identity
        assert report.snapshot.kind is SnapshotKind.LORA
        assert answered(fleet) == pytest.approx(expected(weights, directory), abs=1e-5)
        assert sampled_from(fleet, version) == {names[version]}
    assert fleet.served() == {below.snapshot.identity}
    listed = [{"identity": name, "status": "loaded"} for name in names.values()]
    assert [each["loaded_adapters"] for each in fleet.replicas()] == [listed] * 2
    older = f"accounts/local/models/{names[3]}#accounts/local/deployments/rollouts"
    before = expected(weights, fleet.root / "trainer-3")
    assert answered(fleet, older) == pytest.approx(before, abs=1e-5)

    for identity in names.values():
        unload(fleet, identity)
    assert all("loaded_adapters" not in each for each in fleet.replicas())
    assert answered(fleet) == pytest.approx(expected(weights), abs=1e-5)

    # The weights below go on by deltas, as if there had been no adapter.
    write_checkpoint(fleet, 5, in_files(2))
    last = await run(fleet, 5)
    assert last.snapshot.kind is SnapshotKind.DELTA
    assert fleet.log()["client_bugs"] == []
