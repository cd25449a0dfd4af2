"""The torch trainer against the numpy one, and what it alone has; `make test-train`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import sharded_run
import torch
from transformers import AutoModelForCausalLM

from examples.numpy_trainer import NumpyTrainer
from hotload.directory.shards import read_checkpoint
from hotload.errors import TrainerError
from hotload.trainers.saved_state import read_state
from hotload.trainers.torch_trainer import TorchTrainer, open_torch_trainer
from hotload.trainers.trainer import Trainer
from hotload.training.schedule import AdamSettings
from hotload.training.settings import StateRef

FIXTURES = Path(__file__).parents[1] / "emulator" / "fixtures"
FAMILIES = ("llama", "llama_tied", "qwen2", "qwen3")


def sequences(seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 64, length).tolist() for length in (9, 4, 2, 13, 6)]


def coefficients(asked: list[list[int]], seed: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(len(one) - 1) for one in asked]


def moments(trainer: Trainer, states: Path) -> dict[str, np.ndarray]:
    arrays, _ = read_state(states, trainer.save_state("s"))
    return {name: each for name, each in arrays.items() if name.startswith(("first", "second"))}


def weights(trainer: Trainer, states: Path) -> dict[str, np.ndarray]:
    arrays, _ = read_state(states, trainer.save_state("s"))
    return {name: each for name, each in arrays.items() if name.startswith("weight")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numpy_gradient_is_what_torch_differentiates_to(family: str, tmp_path: Path) -> None:
    base, asked = FIXTURES / family, sequences()
    both: list[Trainer] = [
        NumpyTrainer(base, tmp_path, 0.7),
        open_torch_trainer(str(base), str(tmp_path), temperature=0.7),
    ]
    found = []
    for trainer in both:
        trainer.backward(asked, coefficients(asked))
        trainer.step(AdamSettings(), learning_rate=0.0, divisor=3.0)
        found.append(moments(trainer, tmp_path))
    assert found[0].keys() == found[1].keys()
    for name, ours in found[0].items():
        assert np.abs(ours - found[1][name]).max() < 1e-4 * np.abs(ours).max(), name


def test_both_optimizers_take_the_same_way(tmp_path: Path) -> None:
    """Torch's own AdamW, clipped; a rate at which neither may be far off."""
    both: list[Trainer] = [
        NumpyTrainer(FIXTURES / "llama", tmp_path),
        open_torch_trainer(str(FIXTURES / "llama"), str(tmp_path)),
    ]
    adam = AdamSettings(weight_decay=0.3, grad_clip_norm=0.5, eps=1e-3)
    start = weights(both[0], tmp_path)
    for trainer in both:
        for step in range(4):
            asked = sequences(step)
            trainer.backward(asked, coefficients(asked, step))
            trainer.step(adam, learning_rate=1e-2, divisor=7.0)
    ours, theirs = (weights(trainer, tmp_path) for trainer in both)
    for name, each in ours.items():
        moved = np.abs(each - start[name]).max()
        assert moved > 1e-3
        assert np.abs(each - theirs[name]).max() < 1e-3 * moved, name


def test_checkpointing_computes_twice_and_changes_nothing(tmp_path: Path) -> None:
    asked = sequences()
    found = []
    for is_on in (False, True):
        trainer = open_torch_trainer(
            str(FIXTURES / "qwen3"), str(tmp_path), gradient_checkpointing=is_on
        )
        calls = count_calls(trainer)
        trainer.logprobs(asked, is_before_backward=True)
        trainer.backward(asked, coefficients(asked))
        trainer.step(AdamSettings(), learning_rate=0.0, divisor=1.0)
        found.append((len(calls), moments(trainer, tmp_path)))
    assert [count for count, _ in found] == [2, 4]
    for name, each in found[0][1].items():
        assert np.allclose(each, found[1][1][name], atol=1e-6 * np.abs(each).max()), name


def count_calls(trainer: TorchTrainer) -> list[Any]:
    calls: list[Any] = []
    for layer in trainer._model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_dropout_is_off(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in (FIXTURES / "llama").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    trainer = open_torch_trainer(str(base), str(tmp_path), gradient_checkpointing=True)
    first, second = (np.concatenate(trainer.logprobs(sequences())) for _ in range(2))
    assert np.array_equal(first, second)


def test_an_export_in_float16_says_so(tmp_path: Path) -> None:
    trainer = open_torch_trainer(str(FIXTURES / "llama"), str(tmp_path), export_dtype="float16")
    trainer.export(tmp_path / "out")
    assert {one.dtype for _, one in read_checkpoint(tmp_path / "out").tensors} == {"F16"}
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == "float16"
    with torch.no_grad():
        trainer._masters["model.norm.weight"][0] = 1e6
    with pytest.raises(
        TrainerError, match=r"model\.norm\.weight has a weight that is no number, or beyond float16"
    ):
        trainer.export(tmp_path / "other")


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    trainer = open_torch_trainer(str(FIXTURES / "llama_tied"), str(tmp_path))
    trainer.export(tmp_path / "out")
    names = {one.name for _, one in read_checkpoint(tmp_path / "out").tensors}
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_transformers_reads_what_is_exported(tmp_path: Path) -> None:
    trainer, asked = open_torch_trainer(str(FIXTURES / "qwen2"), str(tmp_path)), sequences()
    trainer.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        logits = model(torch.tensor([asked[0]])).logits[0, :-1].log_softmax(-1)
    chosen = logits[torch.arange(8), torch.tensor(asked[0][1:])].numpy()
    assert np.allclose(chosen, trainer.logprobs(asked[:1])[0], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_two_processes_with_a_share_each_are_one(family: str, tmp_path: Path) -> None:
    """FSDP2 over gloo, the second model with a tied head and biases, the third along routes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("sharded_run.py")
    root = str(script.parents[2])
    run = subprocess.run(
        [*torchrun, str(script), str(FIXTURES / family), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads((tmp_path / f"process-{rank}.json").read_bytes()) for rank in (0, 1)]
    assert {**found[0], "held": 0} == {**found[1], "held": 0}
    assert "gradient is not finite" in found[0]["refused"]
    names = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert [path.name for path in sorted((tmp_path / "resumed").iterdir())] == names
    for name in names:
        straight, resumed = (tmp_path / each / name for each in ("straight", "resumed"))
        assert straight.read_bytes() == resumed.read_bytes(), name
    assert max(each["held"] for each in found) < 0.7 * found[0]["parameter_count"]
    # One process goes on from what two have saved, and comes to the same.
    has_experts = family == "qwen3_moe"
    alone = open_torch_trainer(
        str(FIXTURES / family), str(tmp_path / "states"), router_replay=has_experts
    )
    norms = sharded_run.trained(alone, range(2))
    alone.load_state(StateRef(**found[0]["ref"]))
    norms += sharded_run.trained(alone, range(2, 4))
    assert found[0]["norms"] == pytest.approx(norms, rel=1e-4)
    assert found[0]["parameter_count"] == alone.describe().parameter_count
    ours = alone.logprobs(sharded_run.sequences(0))
    for one, theirs in zip(ours, found[0]["logprobs"], strict=True):
        assert np.abs(one - theirs).max() < 1e-3
