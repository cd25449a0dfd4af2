"""What holds for every trainer of ours. Without torch the numpy trainer alone; `make test-train`
runs both.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulator.engine.numpy_engine import NumpyEngine
from examples.numpy_trainer import NumpyTrainer
from examples.tiny_trainer import TinyTrainer
from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.dataset.logprob_drift import measure_drift
from hotload.delta.byte_io import read_bytes
from hotload.directory.relayout import view_checkpoint
from hotload.directory.shards import open_shard, read_checkpoint
from hotload.errors import StoreError, TrainerError
from hotload.trainers.base_digest import digest_base
from hotload.trainers.loading import load_trainer
from hotload.trainers.saved_state import read_state
from hotload.trainers.trainer import Trainer, as_remover
from hotload.training.schedule import AdamSettings
from hotload.training.settings import TrainerFunction

FIXTURES = Path(__file__).parents[1] / "emulator" / "fixtures"
FAMILIES = ("llama", "llama_tied", "qwen2", "qwen3")
NAMES = {"numpy": "examples.numpy_trainer:open_trainer"}
if find_spec("torch") and find_spec("transformers"):
    NAMES["torch"] = "hotload.trainers.torch_trainer:open_torch_trainer"
ADAM = AdamSettings()
RATE = 1e-3

Open = Callable[..., Trainer]


@pytest.fixture(params=NAMES)
def open_trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    def opened(family: str = "llama", /, **arguments: Any) -> Trainer:
        given = {"base_model": str(FIXTURES / family), "states": str(tmp_path / "states")}
        declared = TrainerFunction(name=NAMES[request.param], arguments={**given, **arguments})
        return load_trainer(declared)

    return opened


def sequences(seed: int = 0, lengths: Sequence[int] = (9, 4, 2, 13, 6)) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 64, length).tolist() for length in lengths]


def coefficients(asked: Sequence[Sequence[int]], seed: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(len(one) - 1) for one in asked]


def exported(trainer: Trainer, directory: Path) -> dict[str, bytes]:
    trainer.export(directory)
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def gradient_norm(trainer: Trainer, divisor: float = 1.0) -> float:
    norm = trainer.step(ADAM, learning_rate=0.0, divisor=divisor).gradient_norm
    assert norm is not None
    return norm


def engine_logprobs(directory: Path, asked: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What the emulator's engine serves from a checkpoint."""
    weights = NumpyEngine().load(directory)
    found = []
    for ids in asked:
        logits = weights.forward(ids, weights.empty_cache(), all_positions=True).astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        table = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        found.append(table[np.arange(len(ids) - 1), ids[1:]])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_that_are_served(open_trainer: Open, family: str) -> None:
    asked = sequences()
    found = open_trainer(family).logprobs(asked)
    for ours, served in zip(found, engine_logprobs(FIXTURES / family, asked), strict=True):
        assert np.abs(ours - served).max() < 2e-5


def k3(ours: Sequence[np.ndarray], served: Sequence[np.ndarray]) -> float:
    drift = measure_drift(
        np.concatenate(ours), np.concatenate(served), np.ones(sum(map(len, ours)), np.bool_)
    )
    assert drift is not None
    assert drift.k3 is not None
    return drift.k3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_is_served_alike(open_trainer: Open, family: str, tmp_path: Path) -> None:
    trainer, asked = open_trainer(family), sequences()
    trainer.backward(asked, coefficients(asked))
    trainer.step(ADAM, learning_rate=1e-2, divisor=len(asked))
    trainer.export(tmp_path / "out")
    assert view_checkpoint(tmp_path / "out").check_heads() == ()
    assert {one.dtype for _, one in read_checkpoint(tmp_path / "out").tensors} == {"BF16"}
    served = engine_logprobs(tmp_path / "out", asked)
    same_weights = open_trainer(base_model=str(tmp_path / "out"))
    assert k3(same_weights.logprobs(asked), served) < 1e-9
    # Rounded to bf16, these wild weights are a little off their masters, and far from the start.
    assert k3(trainer.logprobs(asked), served) < 1e-3
    assert k3(engine_logprobs(FIXTURES / family, asked), served) > 1e-2


def test_a_base_is_told_by_its_weights_and_not_by_where_it_lies(
    open_trainer: Open, tmp_path: Path
) -> None:
    def base_of(directory: Path) -> tuple[str, str | None]:
        facts = open_trainer(base_model=str(directory)).describe()
        return facts.model, facts.base_sha256

    shutil.copytree(FIXTURES / "llama", tmp_path / "copy")
    other = open_trainer()
    trained(other, range(1))
    (tmp_path / "b").mkdir()
    other.export(tmp_path / "b" / "llama")
    name, digest = base_of(FIXTURES / "llama")
    assert digest is not None
    assert base_of(tmp_path / "copy") == ("copy", digest)
    assert base_of(tmp_path / "b" / "llama")[0] == name
    assert base_of(tmp_path / "b" / "llama")[1] != digest
    config = (tmp_path / "copy" / "config.json").read_text()
    (tmp_path / "copy" / "config.json").write_text(config.replace("500000.0", "10000.0"))
    assert base_of(tmp_path / "copy")[1] != digest


def test_a_base_is_the_same_in_one_file_as_in_many(tmp_path: Path) -> None:
    TinyTrainer().save(tmp_path / "many")
    infos: list[TensorInfo] = []
    body = b""
    for header in read_checkpoint(tmp_path / "many").shards:
        with open_shard(tmp_path / "many" / header.file) as shard:
            for one in header.tensors:
                end = len(body) + one.size_bytes
                infos.append(TensorInfo(one.name, one.dtype, one.shape, len(body), end))
                body += read_bytes(shard, header.data_start + one.start, one.size_bytes)
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "many" / "config.json", tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").write_bytes(render_header(infos, {}) + body)
    assert digest_base(tmp_path / "one") == digest_base(tmp_path / "many")


def test_rounding_of_an_ordinary_model_costs_a_hundred_thousandth_of_a_nat(
    open_trainer: Open, tmp_path: Path
) -> None:
    TinyTrainer().save(tmp_path / "base")
    trainer, asked = open_trainer(base_model=str(tmp_path / "base")), sequences()
    trained(trainer, range(2))
    trainer.export(tmp_path / "out")
    assert k3(trainer.logprobs(asked), engine_logprobs(tmp_path / "out", asked)) < 1e-5


def test_a_step_goes_where_the_coefficients_say(open_trainer: Open) -> None:
    asked = sequences()
    for sign in (-1.0, 1.0):  # a loss falls where its derivative is negative
        trainer = open_trainer()
        before = np.concatenate(trainer.logprobs(asked)).mean()
        trainer.backward(asked, [np.full(len(one) - 1, sign) for one in asked])
        trainer.step(ADAM, learning_rate=RATE, divisor=1.0)
        after = np.concatenate(trainer.logprobs(asked)).mean()
        assert (after - before) * sign < -0.01


def test_any_split_into_micro_batches_gives_the_same_gradient(
    open_trainer: Open, tmp_path: Path
) -> None:
    asked = sequences()
    values = coefficients(asked)
    states = []
    for split in ([5], [2, 3], [1, 1, 1, 1, 1]):
        trainer, start = open_trainer(), 0
        for count in split:
            end = start + count
            trainer.backward(asked[start:end], values[start:end])
            start = end
        states.append(first_moments(trainer, tmp_path / "states"))
    for other in states[1:]:
        assert np.abs(other - states[0]).max() < 1e-6 * np.abs(states[0]).max()


def first_moments(trainer: Trainer, states: Path) -> np.ndarray:
    """A tenth of the gradient, from the state that a step leaves which changes no weight."""
    trainer.step(AdamSettings(beta1=0.9), learning_rate=0.0, divisor=1.0)
    arrays, _ = read_state(states, trainer.save_state("moments"))
    return np.concatenate([each.ravel() for n, each in arrays.items() if n.startswith("first/")])


def test_the_gradient_follows_scale_mask_and_repetition(open_trainer: Open) -> None:
    trainer, asked = open_trainer(), sequences()
    values = coefficients(asked)

    def norm(sequences: list[list[int]], given: list[np.ndarray], divisor: float = 1.0) -> float:
        trainer.backward(sequences, given)
        return gradient_norm(trainer, divisor)

    once = norm(asked, values)
    assert norm(asked, [2 * each for each in values]) == pytest.approx(2 * once, rel=1e-5)
    assert norm(asked, [-each for each in values]) == pytest.approx(once, rel=1e-5)
    assert norm(asked + asked, values + values) == pytest.approx(2 * once, rel=1e-5)
    assert norm(asked, values, divisor=4) == pytest.approx(once / 4, rel=1e-5)
    masked = [each.copy() for each in values]
    for each in masked:
        each[:-1] = 0
    changed = [[*one[:-1], one[-1]] for one in asked]
    assert norm(changed, masked) < once
    assert norm(asked, [0 * each for each in values]) == 0
    assert gradient_norm(trainer) == 0  # a step clears it


def test_what_a_forward_keeps_changes_no_result(open_trainer: Open, tmp_path: Path) -> None:
    asked = sequences()
    results = []
    for keeps in (False, True):
        trainer = open_trainer()
        logprobs = trainer.logprobs(asked, is_before_backward=keeps)
        trainer.backward(asked, coefficients(asked))
        trainer.step(ADAM, learning_rate=RATE, divisor=3.0)
        results.append((logprobs, exported(trainer, tmp_path / str(keeps))))
    assert results[0][1] == results[1][1]
    assert all(np.array_equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    # What was kept of other sequences is not used.
    trainer = open_trainer()
    trainer.logprobs(sequences(7), is_before_backward=True)
    trainer.backward(asked, coefficients(asked))
    trainer.step(ADAM, learning_rate=RATE, divisor=3.0)
    assert exported(trainer, tmp_path / "other") == results[0][1]


def trained(trainer: Trainer, steps: range) -> None:
    for step in steps:
        asked = sequences(step)
        trainer.backward(asked, coefficients(asked, step))
        trainer.step(AdamSettings(grad_clip_norm=1.0), learning_rate=RATE, divisor=2.0)


def test_resumed_is_straight_to_the_last_bit(open_trainer: Open, tmp_path: Path) -> None:
    straight = open_trainer()
    assert straight.describe().is_deterministic
    trained(straight, range(4))
    killed = open_trainer()
    trained(killed, range(2))
    ref = killed.save_state("run-step-2")
    trained(killed, range(2, 3))  # and is lost
    resumed = open_trainer()
    resumed.backward(sequences(9), coefficients(sequences(9)))  # a gradient that is left over
    resumed.load_state(ref)
    trained(resumed, range(2, 4))
    assert exported(resumed, tmp_path / "resumed") == exported(straight, tmp_path / "straight")
    assert resumed.save_state("a").sha256 == straight.save_state("b").sha256


def test_a_state_moves_with_its_directory(open_trainer: Open, tmp_path: Path) -> None:
    trainer = open_trainer()
    ref = trainer.save_state("s")
    assert trainer.save_state("s") == ref
    trained(trainer, range(1))
    assert trainer.save_state("s").path != ref.path  # and the first one stays
    (tmp_path / "states").rename(tmp_path / "moved")
    open_trainer(states=str(tmp_path / "moved")).load_state(ref)
    with pytest.raises(StoreError, match="no state to load"):
        trainer.load_state(ref)


def test_a_truncated_or_changed_state_is_refused(open_trainer: Open, tmp_path: Path) -> None:
    trainer = open_trainer()
    trained(trainer, range(1))
    ref = trainer.save_state("s")
    path = tmp_path / "states" / ref.path
    whole = path.read_bytes()
    before = trainer.logprobs(sequences())
    for data in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(data)
        with pytest.raises(StoreError, match="not the state that was saved"):
            trainer.load_state(ref)
    with pytest.raises(StoreError, match="without directories"):
        trainer.load_state(ref.model_copy(update={"path": f"../states/{ref.path}"}))
    assert np.array_equal(before[0], trainer.logprobs(sequences())[0])


def test_a_state_can_be_removed_and_may_be_again(open_trainer: Open, tmp_path: Path) -> None:
    trainer = as_remover(open_trainer())
    assert trainer is not None
    ref = trainer.save_state("s")
    for _ in range(2):
        trainer.remove_state(ref)
    assert list((tmp_path / "states").iterdir()) == []
    with pytest.raises(StoreError, match="without directories"):
        trainer.remove_state(ref.model_copy(update={"path": f"../states/{ref.path}"}))


def test_a_state_of_another_model_is_refused(open_trainer: Open) -> None:
    ref = open_trainer("qwen2").save_state("s")
    with pytest.raises(StoreError, match="another trainer or model"):
        open_trainer("llama").load_state(ref)


def test_a_state_that_does_not_fit_the_disk_leaves_the_one_before(
    open_trainer: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = open_trainer()
    ref = trainer.save_state("s")
    trained(trainer, range(1))
    real = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if offset > 10_000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="cannot be written: No space left"):
        trainer.save_state("s")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "states").iterdir()] == [ref.path]
    trainer.load_state(ref)


def test_a_gradient_that_is_not_finite_changes_nothing(open_trainer: Open) -> None:
    trainer, asked = open_trainer(), sequences()
    trained(trainer, range(1))
    before = trainer.save_state("before")
    for _ in range(2):
        trainer.backward(asked, [np.full(len(one) - 1, 1e38) for one in asked])
    with pytest.raises(TrainerError, match="gradient is not finite"):
        trainer.step(ADAM, learning_rate=RATE, divisor=1e-30)
    assert trainer.save_state("after").sha256 == before.sha256


@pytest.mark.parametrize(
    ("asked", "values", "why"),
    [
        ([[1]], [np.zeros(0)], "found 1 tokens"),
        ([[1] * 200], [np.zeros(199)], "found 200 tokens"),
        ([[1, 64]], [np.zeros(1)], "ids below 64"),
        ([[1, -1]], [np.zeros(1)], "ids below 64"),
        ([[1, 2]], [np.zeros(2)], "expected one per prediction"),
        ([[1, 2]], [np.array([np.nan])], "not finite"),
    ],
)
def test_what_makes_no_sense_is_refused(
    open_trainer: Open, asked: list[list[int]], values: list[np.ndarray], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        open_trainer().backward(asked, values)


def test_log_probabilities_are_taken_at_the_samples_temperature(open_trainer: Open) -> None:
    asked = sequences()
    hot = open_trainer(temperature=2.0)
    found = np.concatenate(hot.logprobs(asked))
    assert found.mean() > np.concatenate(open_trainer().logprobs(asked)).mean() + 0.1
    hot.backward(asked, coefficients(asked))
    assert gradient_norm(hot) > 0


def test_an_export_takes_the_place_of_nothing(open_trainer: Open, tmp_path: Path) -> None:
    trainer = open_trainer()
    files = exported(trainer, tmp_path / "out")
    assert "config.json" in files
    with pytest.raises(FileExistsError):
        trainer.export(tmp_path / "out")


def test_adamw_is_the_one_of_the_paper(open_trainer: Open, tmp_path: Path) -> None:
    """One step from nothing moves every weight by the rate in the sign of its gradient, after the
    decay of what has two dimensions."""
    trainer, asked = open_trainer(), sequences()
    trainer.backward(asked, coefficients(asked))
    adam = AdamSettings(eps=1e-30, weight_decay=0.5)
    trainer.step(adam, learning_rate=0.25, divisor=1.0)
    from emulator.engine.weights import read_tensors

    before = read_tensors(FIXTURES / "llama")
    trainer.export(tmp_path / "out")
    for name, after in read_tensors(tmp_path / "out").items():
        kept = before[name] * (1 - 0.125 if before[name].ndim > 1 else 1)
        moved = np.abs(after - kept)
        is_touched = moved > 0.125
        assert is_touched.any(), name
        assert np.abs(moved[is_touched] - 0.25).max() < 0.02, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numpy_gradient_is_that_of_finite_differences(family: str, tmp_path: Path) -> None:
    trainer = NumpyTrainer(FIXTURES / family, tmp_path, temperature=0.7, dtype=np.float64)
    asked = sequences(3, (7, 5))
    values = coefficients(asked)
    trainer.backward(asked, values)
    model = trainer.model
    random = np.random.default_rng(5)

    def loss() -> float:
        pairs = zip(trainer.logprobs(asked), values, strict=True)
        return float(sum((found * each).sum() for found, each in pairs))

    for name, weights in model.weights.items():
        for _ in range(3):
            direction = random.standard_normal(weights.shape)
            start, step = weights.copy(), 1e-6
            weights += step * direction
            above = loss()
            weights[...] = start - step * direction
            below = loss()
            weights[...] = start
            slope = float((model.gradients[name] * direction).sum())
            assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-7), name
