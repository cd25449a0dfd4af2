"""The adapter for clients with Tinker's methods, before a local service that really trains."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulator.engine.numpy_engine import NumpyEngine
from examples.numpy_trainer import NumpyTrainer
from hotload.errors import TrainerError
from hotload.trainers.loading import load_trainer
from hotload.trainers.tinker_trainer import TinkerTrainer
from hotload.training.schedule import AdamSettings
from hotload.training.settings import TrainerFunction
from tests.trainers.local_service import BASE, SECRET

ADAM = AdamSettings(weight_decay=0.1, grad_clip_norm=0.5)
IDS = [[5, 6, 7, 8, 9], [3, 1, 2]]
COEFFICIENTS = [np.array([1.0, -0.5, 0.0, 2.0]), np.array([-1.0, 0.3])]


def opened(
    tmp_path: Path, connect: str = "connect", seconds: float = 30, **arguments: Any
) -> TinkerTrainer:
    given = {
        "connect": f"tests.trainers.local_service:{connect}",
        "arguments": arguments or {"states": str(tmp_path / "service")},
        "model": "llama",
        "compute_timeout_seconds": seconds,
        "state_timeout_seconds": seconds,
    }
    name = "hotload.trainers.tinker_trainer:open_tinker_trainer"
    trainer = load_trainer(TrainerFunction(name=name, arguments=given))
    assert isinstance(trainer, TinkerTrainer)
    return trainer


def served(tmp_path: Path, **arguments: Any) -> dict[str, Any]:
    return {"states": str(tmp_path / "service"), **arguments}


@pytest.mark.parametrize("gives_futures", [True, False], ids=["futures", "values"])
def test_training_behind_a_client_is_training_here(tmp_path: Path, gives_futures: bool) -> None:
    trainer = opened(tmp_path, **served(tmp_path, gives_futures=gives_futures))
    here = NumpyTrainer(BASE, tmp_path / "here")
    for ours, theirs in zip(here.logprobs(IDS), trainer.logprobs(IDS), strict=True):
        assert np.array_equal(ours, theirs)
    norms = []
    for each in (here, trainer):
        for number in range(3):
            for row, values in zip(IDS, COEFFICIENTS, strict=True):
                each.backward([row], [values * (1 + number)])
            norms.append(each.step(ADAM, learning_rate=1e-2, divisor=6.0).gradient_norm)
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-5)
    apart = np.abs(np.concatenate(here.logprobs(IDS)) - np.concatenate(trainer.logprobs(IDS))).max()
    assert apart < 1e-4
    trainer.export(tmp_path / "out")
    NumpyEngine().load(tmp_path / "out")
    facts = trainer.describe()
    assert (facts.model, facts.lora_rank, facts.parameter_count) == ("llama", 8, None)
    assert "tinker" not in sys.modules


@pytest.mark.parametrize("loads_first", [True, False], ids=["by a new client", "by the same"])
def test_a_state_is_named_as_the_service_returns_it(tmp_path: Path, loads_first: bool) -> None:
    trainer = opened(tmp_path, **served(tmp_path, loads_first=loads_first))
    ref = trainer.save_state("run-step-1")
    assert ref.path.startswith("tinker://run/renamed-run-step-1")
    before = trainer.logprobs(IDS)
    trainer.backward(IDS, COEFFICIENTS)
    trainer.step(ADAM, learning_rate=1e-2, divisor=1.0)
    assert not np.allclose(before[0], trainer.logprobs(IDS)[0], atol=1e-3)
    trainer.backward(IDS, COEFFICIENTS)  # is forgotten with the state
    trainer.load_state(ref)
    assert np.array_equal(before[0], trainer.logprobs(IDS)[0])
    assert trainer.step(ADAM, learning_rate=0.0, divisor=1.0).gradient_norm == 0


@pytest.mark.parametrize("tells_norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize(
    ("scale", "rule"),
    [
        ("by_weight_sums", "a weight of 2 gives twice the gradient of 1"),
        ("by_rows", "a row that is sent twice gives twice the gradient"),
        ("only_positive", "a weight of −1 gives as large a gradient as 1"),
    ],
)
def test_a_service_that_divides_is_refused(
    tmp_path: Path, scale: str, rule: str, tells_norm: bool
) -> None:
    with pytest.raises(TrainerError, match=f"llama.*no sum over weights.*{rule}"):
        opened(tmp_path, **served(tmp_path, scale=scale, tells_norm=tells_norm))


def test_the_probe_leaves_no_trace(tmp_path: Path) -> None:
    for tells_norm in (True, False):
        trainer = opened(tmp_path, **served(tmp_path, tells_norm=tells_norm))
        behind = trainer._client.trainer
        assert behind._step == 0
        fresh = NumpyTrainer(BASE, tmp_path / "here").save_state("s")
        assert behind.save_state("s").sha256 == fresh.sha256
    assert trainer.step(ADAM, learning_rate=0.0, divisor=1.0).gradient_norm is None


@pytest.mark.parametrize("what", ["forward", "forward_backward", "save_state"])
def test_a_service_that_does_not_answer_has_a_limit(tmp_path: Path, what: str) -> None:
    def use() -> None:
        opened(tmp_path, **served(tmp_path, hangs_in=what), seconds=0.5).logprobs(IDS)

    with pytest.raises(TrainerError, match=rf"{what}: no answer within 0\.5 s"):
        use()


def test_an_optimizer_without_a_setting_is_refused(tmp_path: Path) -> None:
    trainer = opened(tmp_path, **served(tmp_path, old_adam=True))
    with pytest.raises(TrainerError, match="its optimizer has no weight_decay: set it to 0"):
        trainer.step(AdamSettings(), learning_rate=1e-3, divisor=1.0)
    trainer.step(AdamSettings(weight_decay=0.0), learning_rate=1e-3, divisor=1.0)


def test_a_gradient_that_is_told_not_to_be_finite_is_not_applied(tmp_path: Path) -> None:
    trainer = opened(tmp_path)
    before = trainer.logprobs(IDS)
    trainer._client.backward_norm = float("inf")
    trainer.backward(IDS, COEFFICIENTS)
    with pytest.raises(TrainerError, match=r"norm of inf; nothing was changed.*a state"):
        trainer.step(ADAM, learning_rate=1e-2, divisor=1.0)
    for ours, theirs in zip(before, trainer.logprobs(IDS), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_wrong_number_of_log_probabilities_is_named(tmp_path: Path) -> None:
    trainer = opened(tmp_path, **served(tmp_path, drops_first=True))
    with pytest.raises(
        TrainerError, match="forward: gave 3 log-probabilities of row 0, expected 4"
    ):
        trainer.logprobs(IDS)


def test_what_cannot_be_connected_is_refused_without_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", SECRET)
    with pytest.raises(TrainerError, match="raised PermissionError") as caught:
        opened(tmp_path, "refuses", key=SECRET)
    assert SECRET not in str(caught.value)
    with pytest.raises(TrainerError, match="returned str, expected TinkerConnection"):
        opened(tmp_path, "name_of", states=str(tmp_path))
    with pytest.raises(TrainerError, match="cannot be downloaded, so no cycle can publish"):
        opened(tmp_path, "keeps_its_weights", states=str(tmp_path))
    with pytest.raises(TrainerError, match="expected above 0"):
        opened(tmp_path, seconds=0)
