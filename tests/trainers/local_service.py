"""A training client with Tinker's method names over the numpy trainer: what a service does, here.

`connect` is what a declaration names.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from examples.numpy_trainer import NumpyTrainer
from hotload.trainers.tinker_trainer import TinkerConnection
from hotload.training.schedule import AdamSettings
from hotload.training.settings import StateRef

BASE = Path(__file__).parents[1] / "emulator" / "fixtures" / "llama"
SECRET = "tml-0123456789abcdef"


@dataclass
class TensorData:
    data: list[float]
    dtype: str
    shape: list[int]


@dataclass
class ModelInput:
    ids: list[int]

    @classmethod
    def from_ints(cls, ids: list[int]) -> "ModelInput":
        return cls(ids)


@dataclass
class Datum:
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]


@dataclass
class AdamParams:
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass
class OldAdamParams:
    learning_rate: float
    beta1: float
    beta2: float
    eps: float

    def __init__(self, **given: float) -> None:
        for name in ("learning_rate", "beta1", "beta2", "eps"):
            setattr(self, name, given[name])


@dataclass
class Client:
    """A gradient is what `scale` makes of a row's weights and of the number of rows."""

    states: Path
    scale: Callable[[np.ndarray, int], np.ndarray]
    tells_norm: bool = True
    gives_futures: bool = True
    drops_first: bool = False
    hangs_in: str = ""
    loads_first: bool = False
    """Whether it loads a state as its first request alone, as Tinker's service and SkyRL's do."""
    backward_norm: float | None = None
    """What it tells with a gradient's part, where it tells anything."""
    refs: dict[str, StateRef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trainer = NumpyTrainer(BASE, self.states)
        self.is_new = True

    def get_info(self) -> Any:
        return SimpleNamespace(model_data=SimpleNamespace(model_name="llama"), lora_rank=8)

    def forward(self, data: list[Datum], loss_fn: str) -> Any:
        assert loss_fn == "cross_entropy"
        return self._answer("forward", lambda: self._outputs(data))

    def forward_backward(self, data: list[Datum], loss_fn: str) -> Any:
        assert loss_fn == "cross_entropy"

        def work() -> Any:
            weights = [np.array(each.loss_fn_inputs["weights"].data) for each in data]
            scaled = [self.scale(each, len(data)) for each in weights]
            self.trainer.backward(self._ids(data), [-each for each in scaled])
            made = self._outputs(data)
            if self.backward_norm is not None:
                made.metrics["grad_norm:last"] = self.backward_norm
            return made

        return self._answer("forward_backward", work)

    def optim_step(self, params: Any) -> Any:
        given = {name: getattr(params, name) for name in vars(params)}
        rate = given.pop("learning_rate")

        def work() -> Any:
            done = self.trainer.step(
                AdamSettings(**{"weight_decay": 0.0, **given}), learning_rate=rate, divisor=1.0
            )
            norm = {"optim/grad_norm": done.gradient_norm} if self.tells_norm else {}
            return SimpleNamespace(metrics=norm)

        return self._answer("optim_step", work)

    def save_state(self, name: str) -> Any:
        def work() -> Any:
            ref = self.trainer.save_state(f"renamed-{name}")
            self.refs[f"tinker://run/{ref.path}"] = ref
            return SimpleNamespace(path=f"tinker://run/{ref.path}")

        return self._answer("save_state", work)

    def load_state_with_optimizer(self, path: str) -> Any:
        if self.loads_first and not self.is_new:
            raise PermissionError("LoadWeights is permitted as the first request alone")
        return self._answer("load", lambda: self.trainer.load_state(self.refs[path]))

    def save_weights_for_sampler(self, name: str) -> Any:
        directory = Path(tempfile.mkdtemp(dir=self.states.parent)) / "weights"
        self.trainer.export(directory)
        return self._answer("sampler", lambda: SimpleNamespace(path=f"tinker://{directory}"))

    def _ids(self, data: list[Datum]) -> list[list[int]]:
        targets = [each.loss_fn_inputs["target_tokens"].data for each in data]
        pairs = zip(data, targets, strict=True)
        return [[*each.model_input.ids, int(target[-1])] for each, target in pairs]

    def _outputs(self, data: list[Datum]) -> Any:
        found = self.trainer.logprobs(self._ids(data))
        outputs = [
            {"logprobs": TensorData(each[self.drops_first :].tolist(), "float32", [len(each)])}
            for each in found
        ]
        return SimpleNamespace(loss_fn_outputs=outputs, metrics={"loss:sum": 1.0})

    def _answer(self, what: str, work: Callable[[], Any]) -> Any:
        self.is_new = False
        if what == self.hangs_in:
            never: Future[Any] = Future()
            return never
        if not self.gives_futures:
            return work()
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - the future's
                future.set_exception(error)

        threading.Thread(target=run).start()
        return future


def as_sums(weights: np.ndarray, row_count: int) -> np.ndarray:
    return weights


def by_weight_sums(weights: np.ndarray, row_count: int) -> np.ndarray:
    """As an open server did: each row by the sum of its weights, and rows averaged."""
    return weights / max(weights.sum(), 1e-9) / row_count


def by_rows(weights: np.ndarray, row_count: int) -> np.ndarray:
    return weights / row_count


def only_positive(weights: np.ndarray, row_count: int) -> np.ndarray:
    return np.maximum(weights, 0)


def download(path: str, directory: Path) -> None:
    source = Path(path.removeprefix("tinker://"))
    for file in source.iterdir():
        shutil.copy(file, directory)


def connect(
    states: str, scale: str = "as_sums", old_adam: bool = False, **given: Any
) -> TinkerConnection:
    types = SimpleNamespace(
        TensorData=TensorData,
        ModelInput=ModelInput,
        Datum=Datum,
        AdamParams=OldAdamParams if old_adam else AdamParams,
    )
    client = Client(Path(states), globals()[scale], **given)

    def reopen(path: str) -> Client:
        other = replace(client)
        other.load_state_with_optimizer(path).result()
        return other

    return TinkerConnection(client, types, download, reopen if client.loads_first else None)


def refuses(key: str) -> TinkerConnection:
    raise PermissionError(f"key {key} is not known")


def keeps_its_weights(states: str) -> TinkerConnection:
    made = connect(states)
    return TinkerConnection(made.client, made.types, None)


def name_of(states: str) -> str:
    return states
