"""The adapter and the loop with the `tinker` client, before a server that really trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tinker
import yaml

from emulator.engine.weights import adapter_pairs, adapter_scale, read_json, read_tensors
from examples.numpy_trainer import NumpyTrainer
from hotload.errors import TrainerError
from hotload.trainers.loading import load_trainer
from hotload.trainers.step_samples import StepSamples, TrainerSequence
from hotload.trainers.tinker_trainer import TinkerConnection, TinkerTrainer
from hotload.trainers.training_step import forward_backward_custom
from hotload.training.loss_inputs import LossInputs
from hotload.training.schedule import AdamSettings
from hotload.training.settings import TrainerFunction
from tests.flows import training_runs
from tests.flows.fleet import Fleet
from tests.flows.killed_cycle import FlowProcess
from tests.servers import ROOT, LoopbackServer

pytestmark = pytest.mark.server

ADAM = AdamSettings(beta2=0.95, weight_decay=0.1, grad_clip_norm=0.0)
IDS = [[5, 6, 7, 8, 9], [3, 300, 2], [11, 12, 13, 14, 15, 16, 17]]
COEFFICIENTS = [np.array([1.0, -0.5, 0.0, 2.0]), np.array([-1.0, 0.3]), np.linspace(-1, 0.4, 6)]
RANK = 4
RUN_SECONDS = 240.0


def plain(base_url: str, base_model: str, reopens: bool = True) -> TinkerConnection:
    """A connection as one would write it for a service that adds up."""
    service = tinker.ServiceClient(base_url=base_url)
    client = service.create_lora_training_client(base_model=base_model, rank=RANK)
    reopen = service.create_training_client_from_state_with_optimizer
    return TinkerConnection(
        client, tinker.types, lambda path, out: None, reopen if reopens else None
    )


def declared(
    skyrl: LoopbackServer, base: Path, seconds: float = 120, **changes: Any
) -> dict[str, Any]:
    """The trainer as docs/training.md shows it, at this server."""
    (shown,) = [
        block
        for block in (ROOT / "docs/training.md").read_text().split("```yaml\n")[1:]
        if "open_tinker_trainer" in block
    ]
    trainer = yaml.safe_load(shown.split("```")[0])["training"]["trainer"]
    trainer["arguments"] |= {
        "arguments": {"base_url": skyrl.address, "base_model": str(base), "rank": RANK},
        "compute_timeout_seconds": seconds,
        "state_timeout_seconds": seconds,
        **changes,
    }
    return trainer


def opened(
    skyrl: LoopbackServer, base: Path, seconds: float = 120, **changes: Any
) -> TinkerTrainer:
    trainer = load_trainer(TrainerFunction(**declared(skyrl, base, seconds, **changes)))
    assert isinstance(trainer, TinkerTrainer)
    return trainer


class LocalAdapter:
    """The same adapter trained here: numpy's gradient of each weight, taken to its two factors."""

    def __init__(self, base: Path, adapter: Path, states: Path) -> None:
        self.trainer = NumpyTrainer(base, states)
        self.weights = self.trainer.model.weights
        self.start = {name: each.copy() for name, each in self.weights.items()}
        self.scale = adapter_scale(read_json(adapter / "adapter_config.json"))
        self.pairs = {n: list(pair) for n, pair in adapter_pairs(read_tensors(adapter)).items()}
        zeros = [{n: [0 * one for one in pair] for n, pair in self.pairs.items()} for _ in range(2)]
        self.first, self.second = zeros
        self.steps = 0
        self.merge()

    def merge(self) -> None:
        for name, (down, up) in self.pairs.items():
            self.weights[name][...] = self.start[name] + self.scale * (up @ down)

    def step(self, rate: float, divisor: float) -> float:
        """AdamW over the factors; the norm of their gradient."""
        self.steps += 1
        squares = 0.0
        for name, (down, up) in self.pairs.items():
            whole = self.trainer.model.gradients[name] / divisor * self.scale
            for place, gradient in enumerate((up.T @ whole, whole @ down.T)):
                squares += float((gradient**2).sum())
                first, second = self.first[name][place], self.second[name][place]
                first += (1 - ADAM.beta1) * (gradient - first)
                second += (1 - ADAM.beta2) * (gradient**2 - second)
                root = np.sqrt(second / (1 - ADAM.beta2**self.steps)) + ADAM.eps
                moved = first / (1 - ADAM.beta1**self.steps) / root
                self.pairs[name][place] -= rate * (
                    moved + ADAM.weight_decay * self.pairs[name][place]
                )
        for each in self.trainer.model.gradients.values():
            each[...] = 0
        self.merge()
        return squares**0.5


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).max())


def test_an_engine_that_averages_is_refused(skyrl: LoopbackServer, base: Path) -> None:
    with pytest.raises(TrainerError, match=r"no sum over weights.*a weight of 2 gives twice"):
        opened(
            skyrl,
            base,
            connect="tests.tinker.test_skyrl:plain",
            arguments={"base_url": skyrl.address, "base_model": str(base)},
        )


def test_a_client_that_has_worked_loads_no_state(skyrl: LoopbackServer, base: Path) -> None:
    with pytest.raises(TrainerError, match=r"load_state_with_optimizer: .*LoadWeights"):
        opened(
            skyrl,
            base,
            connect="tests.tinker.test_skyrl:plain",
            arguments={"base_url": skyrl.address, "base_model": str(base), "reopens": False},
        )


def test_training_at_a_server_is_training_here(
    skyrl: LoopbackServer, base: Path, tmp_path: Path
) -> None:
    trainer = opened(skyrl, base)
    trainer.export(tmp_path / "start")
    here = LocalAdapter(base, tmp_path / "start", tmp_path / "states")
    assert apart(trainer.logprobs(IDS), here.trainer.logprobs(IDS)) < 1e-5
    for number in range(3):
        for each in (trainer, here.trainer):
            for row, values in zip(IDS, COEFFICIENTS, strict=True):
                each.backward([row], [values * (1 + number)])
        told = trainer.step(ADAM, learning_rate=1e-3, divisor=6.0).gradient_norm
        assert told == pytest.approx(here.step(1e-3, 6.0), rel=1e-3)
    moved = apart(trainer.logprobs(IDS), NumpyTrainer(base, tmp_path).logprobs(IDS))
    found = apart(trainer.logprobs(IDS), here.trainer.logprobs(IDS))
    print(f"moved by {moved:.3g} nat, apart by {found:.3g}")
    assert found < 1e-3 * moved

    trainer.export(tmp_path / "end")
    exported = LocalAdapter(base, tmp_path / "end", tmp_path / "states")
    assert apart(trainer.logprobs(IDS), exported.trainer.logprobs(IDS)) < 1e-5


def squares(inputs: LossInputs, policy_T: np.ndarray) -> tuple[float, np.ndarray, dict[str, float]]:
    """A loss that no service has, and its gradient."""
    return float((policy_T**2).sum()), 2 * policy_T, {}


def test_a_loss_of_ones_own_has_the_gradient_that_it_has_here(
    skyrl: LoopbackServer, base: Path, tmp_path: Path
) -> None:
    trainer = opened(skyrl, base)
    trainer.export(tmp_path / "start")
    here = LocalAdapter(base, tmp_path / "start", tmp_path / "states")
    lengths = [len(one) - 2 for one in IDS]
    inputs = LossInputs.of(
        lengths=lengths,
        loss_mask_T=np.ones(sum(lengths), bool),
        sampling_logprobs_T=-np.ones(sum(lengths)),
        advantages=np.ones(len(IDS)),
    )
    segments = tuple((TrainerSequence(tuple(one), 2, "", None),) for one in IDS)
    samples = StepSamples(segments, inputs, (0, 0, 0), (1.0, 0.0, 1.0))
    values = [
        forward_backward_custom(each, samples, squares, uses="numpy", micro_batch_tokens=9)
        for each in (trainer, here.trainer)
    ]
    assert values[0].loss == pytest.approx(values[1].loss, rel=1e-5)
    told = trainer.step(ADAM, learning_rate=0.0, divisor=1.0).gradient_norm
    assert told == pytest.approx(here.step(0.0, 1.0), rel=1e-3)


def test_a_clipped_gradient_is_refused(skyrl: LoopbackServer, base: Path) -> None:
    trainer = opened(skyrl, base)
    trainer.backward(IDS, COEFFICIENTS)
    with pytest.raises(TrainerError, match=r"does not clip: set adam\.grad_clip_norm to 0"):
        trainer.step(AdamSettings(grad_clip_norm=1.0), learning_rate=1e-3, divisor=1.0)


@contextmanager
def paused_engine(skyrl: LoopbackServer) -> Iterator[None]:
    """The server answers, and nothing that it is asked for is ever done."""
    (engine,) = [
        each
        for each in psutil.Process(skyrl.pid).children(recursive=True)
        if "skyrl.tinker.engine" in each.cmdline()
    ]
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def test_a_future_that_never_comes_has_a_limit(skyrl: LoopbackServer, base: Path) -> None:
    trainer = opened(skyrl, base, compute_timeout_seconds=30)
    trainer._compute_seconds = trainer._state_seconds = 1.0
    with paused_engine(skyrl):
        with pytest.raises(
            TrainerError, match="forward: no answer within 1 s: look at the service"
        ):
            trainer.logprobs(IDS)
        with pytest.raises(TrainerError, match="save_state: no answer within 1 s"):
            trainer.save_state("late")
        with pytest.raises(TrainerError, match="connecting: no answer within 2 s"):
            opened(skyrl, base, seconds=2)


def test_a_state_outlives_the_server(skyrl: LoopbackServer, base: Path) -> None:
    def step(trainer: TinkerTrainer) -> list[np.ndarray]:
        trainer.backward(IDS, COEFFICIENTS)
        trainer.step(ADAM, learning_rate=1e-3, divisor=6.0)
        return trainer.logprobs(IDS)

    before = opened(skyrl, base, seconds=40)
    step(before)
    kept = before.save_state("kept")
    expected = step(before)
    skyrl.stop()
    skyrl.start()
    skyrl.wait()
    with pytest.raises(TrainerError, match="forward: "):
        before.logprobs(IDS)
    after = opened(skyrl, base)
    after.load_state(kept)
    assert apart(step(after), expected) < 1e-5
    # And once more, by a client that has worked.
    after.load_state(kept)
    assert apart(step(after), expected) < 1e-5


async def test_the_loop_trains_at_a_server_that_is_killed_in_mid_run(
    fleet: Fleet, skyrl: LoopbackServer, base: Path, tmp_path: Path
) -> None:
    """One group a step, one step a version; a group that teaches nothing makes none."""
    training_runs.with_problems(fleet, 6)
    file = fleet.root / "run.yaml"
    document = training_runs.declared(
        fleet,
        trainer=declared(skyrl, base, seconds=60),
        windows={"prompt_groups_per_step": 1, "seed": 3},
    )
    process = FlowProcess("flows.rl_loop", file, document)
    assert process.reaches(lambda one: one.has_said("Task run 'record-1'")), process.log
    skyrl.stop()
    assert process.ends_within(RUN_SECONDS)
    assert process.exit_code == 1
    print(process.log[-1])
    assert process.has_said("error: trainer 'base': "), "\n".join(process.log[-40:])
    begun = await training_runs.read_run(fleet)
    skyrl.start()
    skyrl.wait()

    process = FlowProcess("flows.rl_loop", file, document)
    assert process.ends_within(RUN_SECONDS), "\n".join(process.log[-40:])
    assert process.exit_code == 0, "\n".join(process.log[-40:])
    records = await training_runs.read_run(fleet)
    assert 1 <= len(begun) < len(records)
    assert records[: len(begun)] == begun
    problems = [problem for one in records for problem in training_runs.problems_of(one)]
    assert len({*problems}) == len(problems) == len(records)
    for one in records:
        assert one.figures["train/inference_k3"] < 1e-6
        assert one.figures["train/grad_norm"] > 0

    # The last version is served, and is what the newest state says.
    last = records[-1]
    assert last.state is not None
    assert last.checkpoint is not None
    trainer = opened(skyrl, base)
    trainer.load_state(last.state)
    name = f"learn-{last.checkpoint.policy_version:06d}-"
    (adapter,) = (path.parent for path in fleet.bucket.glob(f"{name}*/adapter_config.json"))
    served = [one["loaded_adapters"] for one in fleet.replicas()]
    assert served == [[{"identity": adapter.name, "status": "loaded"}]] * len(served)
    local = LocalAdapter(base, adapter, tmp_path / "states")
    assert apart(trainer.logprobs(IDS), local.trainer.logprobs(IDS)) < 1e-5
    untrained = NumpyTrainer(base, tmp_path / "states").logprobs(IDS)
    assert apart(local.trainer.logprobs(IDS), untrained) > 1e-2
