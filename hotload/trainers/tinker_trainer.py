"""A trainer behind a client that has Tinker's method names; none of their packages is imported.

Named in a declaration as `hotload.trainers.tinker_trainer:open_tinker_trainer`. The user's own
function makes the client; what it returns may give values or futures. A service that trains and
serves its own weights needs no cycle of ours: weights must be downloadable to be published.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from hotload.directory.files import new_directory
from hotload.directory.shards import read_checkpoint
from hotload.errors import HotLoadError, TrainerError
from hotload.sampling.reward.user_errors import describe_exception, secret_values
from hotload.sampling.user_function import import_function
from hotload.trainers.scale_probe import probe_scale
from hotload.trainers.trainer import OptimizerFigures, TrainerFacts
from hotload.training.loss_inputs import PerToken
from hotload.training.schedule import AdamSettings
from hotload.training.settings import StateRef

METHODS = (
    "forward",
    "forward_backward",
    "optim_step",
    "save_state",
    "load_state_with_optimizer",
    "save_weights_for_sampler",
)
COMPUTE_SECONDS = 3600.0
STATE_SECONDS = 2700.0


@dataclass(frozen=True)
class TinkerConnection:
    """What the user's function returns.

    Args:
        client: has Tinker's methods of a training client.
        types: has `Datum`, `ModelInput`, `TensorData` and `AdamParams`: `tinker.types`, say.
        download: called with what `save_weights_for_sampler` returned as path, and with a new
            directory, which it fills with the checkpoint or the PEFT adapter. None is refused.
        reopen: called with the path of a state, returns a client that begins with it:
            `service.create_training_client_from_state_with_optimizer`, say. Tinker's own service
            loads a state as a client's first request alone. None: the client loads it.
    """

    client: Any
    types: Any
    download: Callable[[str, Path], object] | None
    reopen: Callable[[str], Any] | None = None


def open_tinker_trainer(
    connect: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    model: str,
    compute_timeout_seconds: float = COMPUTE_SECONDS,
    state_timeout_seconds: float = STATE_SECONDS,
) -> TinkerTrainer:
    """Connect, and see that the service computes gradients as a sum before it is trusted.

    Args:
        connect: `package.module:function` of the user's, returning a `TinkerConnection`.
        arguments: its keyword arguments.
        model: what a run names the base model.
        compute_timeout_seconds: a forward, a backward or a step may take.
        state_timeout_seconds: a state may take to be written or loaded, weights to be downloaded.

    Raises:
        TrainerError: it cannot be connected, or the probe failed.
    """
    function = import_function(connect, arguments or {}, TrainerError)
    limits = compute_timeout_seconds, state_timeout_seconds
    if min(limits) <= 0:
        raise TrainerError(connect, f"found time limits of {limits} seconds, expected above 0")
    found = _within(state_timeout_seconds, connect, lambda: function(**(arguments or {})))
    if not isinstance(found, TinkerConnection):
        raise TrainerError(connect, f"returned {type(found).__name__}, expected TinkerConnection")
    missing = [name for name in METHODS if not callable(getattr(found.client, name, None))]
    if missing:
        raise TrainerError(connect, f"its client has no {', '.join(missing)}")
    if found.download is None:
        reason = (
            "its weights cannot be downloaded, so no cycle can publish them; a service that serves "
            "what it trains publishes by itself"
        )
        raise TrainerError(connect, reason)
    trainer = TinkerTrainer(found, model, *limits)
    probe_scale(trainer)
    return trainer


class TinkerTrainer:
    """Forward, gradient, step and states by a client's methods.

    A service adds up gradients and divides by nothing; so what is added is sent when the step
    names the divisor.
    """

    def __init__(
        self, connection: TinkerConnection, model: str, compute_seconds: float, state_seconds: float
    ) -> None:
        self._client, self._types = connection.client, connection.types
        self._reopen = connection.reopen
        self._model = model
        assert connection.download is not None  # open_tinker_trainer refuses
        self._download = connection.download
        self._compute_seconds, self._state_seconds = compute_seconds, state_seconds
        self._waiting: list[tuple[list[tuple[int, ...]], list[PerToken]]] = []
        self._exported = 0

    def describe(self) -> TrainerFacts:
        """Say what is trained, as far as the service tells."""
        info: Any = None
        if callable(ask := getattr(self._client, "get_info", None)):
            info = self._ask("get_info", ask, seconds=self._state_seconds)
        told = getattr(info, "model_data", info)
        rank = getattr(info, "lora_rank", None)
        return TrainerFacts(
            model=self._model,
            base_sha256=None,
            parameter_count=None,
            lora_rank=rank if isinstance(rank, int) and rank else None,
            is_deterministic=False,
            details={"trainer": "tinker", "served": str(getattr(told, "model_name", ""))},
        )

    def logprobs(
        self, sequences: Sequence[Sequence[int]], *, is_before_backward: bool = False
    ) -> list[PerToken]:
        """Compute the log-probability of every token but the first, [N−1] each."""
        asked = _checked(sequences)
        data = self._data(asked, [np.zeros(len(one) - 1) for one in asked])
        given = self._ask("forward", self._client.forward, data, "cross_entropy")
        outputs = getattr(given, "loss_fn_outputs", None)
        if outputs is None or len(outputs) != len(asked):
            raise self._broken("forward", f"gave {_size(outputs)} outputs for {len(asked)} rows")
        found = [_numbers(each["logprobs"]) for each in outputs]
        for number, (one, values) in enumerate(zip(asked, found, strict=True)):
            if values.shape != (len(one) - 1,):
                reason = f"gave {values.size} log-probabilities of row {number}"
                raise self._broken("forward", f"{reason}, expected {len(one) - 1}")
        return found

    def backward(
        self, sequences: Sequence[Sequence[int]], coefficients: Sequence[PerToken]
    ) -> None:
        """Keep what is to be added to the gradient until the step."""
        asked = _checked(sequences)
        shapes = [np.shape(each) for each in coefficients]
        if shapes != [(len(one) - 1,) for one in asked]:
            raise ValueError(f"coefficients: found shapes {shapes}, expected one per prediction")
        if not all(np.isfinite(each).all() for each in coefficients):
            raise ValueError("coefficients: found one that is not finite: the loss must be mended")
        self._waiting.append((asked, [np.array(each, dtype=np.float64) for each in coefficients]))

    def step(self, adam: AdamSettings, *, learning_rate: float, divisor: float) -> OptimizerFigures:
        """Send the gradient's parts, divided, and apply their sum.

        Raises:
            TrainerError: the service failed, its optimizer lacks a setting, or it told a norm that
                is not finite. The service keeps the gradient: load a state.
        """
        waiting, self._waiting = self._waiting, []
        params = self._adam(adam, learning_rate)
        told: list[Any] = []
        for asked, coefficients in waiting:
            # Weighted cross-entropy is −Σ weight · log-probability.
            data = self._data(asked, [-each / divisor for each in coefficients])
            method = self._client.forward_backward
            told.append(self._ask("forward_backward", method, data, "cross_entropy"))
        if not np.isfinite(norm := _last_norm(told) or 0.0):
            found = f"the service told a gradient norm of {norm}; nothing was changed"
            raise TrainerError(self._model, f"{found}, and the gradient is left over: load a state")
        told.append(self._ask("optim_step", self._client.optim_step, params))
        if not np.isfinite(_last_norm(told) or 0.0):
            found = f"the service told a gradient norm of {_last_norm(told)}"
            raise TrainerError(self._model, f"{found} after it had applied it: load a state")
        return OptimizerFigures(gradient_norm=_last_norm(told))

    def save_state(self, name: str) -> StateRef:
        """Save weights and optimizer at the service; the digest is of the path it returned, since
        the bytes are the service's.
        """
        path = self._path("save_state", self._client.save_state, name)
        return StateRef(path=path, sha256=hashlib.sha256(path.encode()).hexdigest())

    def load_state(self, ref: StateRef) -> None:
        """Become what was saved, with its optimizer."""
        self._waiting = []
        method = self._reopen or self._client.load_state_with_optimizer
        given = self._ask(
            "load_state_with_optimizer", method, ref.path, seconds=self._state_seconds
        )
        if self._reopen is not None:
            self._client = given

    def export(self, directory: Path) -> None:
        """Download what the service would serve: a checkpoint, or an adapter."""
        self._exported += 1
        name = f"export-{self._exported}"
        path = self._path("save_weights_for_sampler", self._client.save_weights_for_sampler, name)
        with new_directory(directory) as out:
            self._ask("download", self._download, path, out, seconds=self._state_seconds)
            if not read_checkpoint(out).shards:
                raise self._broken("download", f"left no weights of {path}")

    def _adam(self, adam: AdamSettings, learning_rate: float) -> Any:
        wanted = {"learning_rate": learning_rate, **adam.model_dump()}
        # Older clients lack these two, and some ignore what they do not know.
        given = {
            name: value
            for name, value in wanted.items()
            if value or name not in ("weight_decay", "grad_clip_norm")
        }
        try:
            params = self._types.AdamParams(**given)
        except Exception as error:  # a class of theirs may raise anything
            raise self._broken("AdamParams", _described(error)) from error
        for name, value in given.items():
            if getattr(params, name, None) != value:
                raise TrainerError(self._model, f"its optimizer has no {name}: set it to 0")
        return params

    def _data(self, asked: Sequence[tuple[int, ...]], weights: Sequence[PerToken]) -> list[Any]:
        types = self._types

        def tensor(values: Any, dtype: str) -> Any:
            return types.TensorData(data=values, dtype=dtype, shape=[len(values)])

        return [
            types.Datum(
                model_input=types.ModelInput.from_ints(list(one[:-1])),
                loss_fn_inputs={
                    "target_tokens": tensor(list(one[1:]), "int64"),
                    "weights": tensor(each.tolist(), "float32"),
                },
            )
            for one, each in zip(asked, weights, strict=True)
        ]

    def _path(self, what: str, method: Callable[..., Any], name: str) -> str:
        given = self._ask(what, method, name, seconds=self._state_seconds)
        path = getattr(given, "path", given)
        if not isinstance(path, str) or not path:
            raise self._broken(what, f"returned no path for {name!r}")
        return path

    def _ask(
        self, what: str, method: Callable[..., Any], *given: Any, seconds: float | None = None
    ) -> Any:
        limit = self._compute_seconds if seconds is None else seconds
        return _within(limit, self._model, lambda: method(*given), what)

    def _broken(self, what: str, reason: str) -> TrainerError:
        return TrainerError(self._model, f"{what}: {reason}")


def _within(seconds: float, name: str, call: Callable[[], Any], what: str = "connecting") -> Any:
    """Call, and wait for the future it may give: both may hang, so both have a thread that can be
    left behind."""
    answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            value = call()
            if callable(wait := getattr(value, "result", None)):
                value = wait(timeout=seconds)
            answers.put((value, None))
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            answers.put((None, error))

    Thread(target=work, name=f"trainer {what}", daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except Empty:
        error = TimeoutError()
    if isinstance(error, HotLoadError):
        raise error
    if isinstance(error, TimeoutError):
        raise TrainerError(name, f"{what}: no answer within {seconds:g} s: look at the service")
    if error is not None:
        raise TrainerError(name, f"{what}: raised {_described(error)}") from error
    return value


def _described(error: BaseException) -> str:
    return describe_exception(error, secret_values(os.environ))


def _checked(sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    for number, one in enumerate(sequences):
        if len(one) < 2:
            raise ValueError(f"sequence {number}: found {len(one)} tokens, expected 2 or more")
    return [tuple(map(int, one)) for one in sequences]


def _numbers(value: Any) -> PerToken:
    held = getattr(value, "data", None)
    return np.asarray(held if isinstance(held, list) else value, dtype=np.float64)


def _size(outputs: Any) -> int:
    return 0 if outputs is None else len(outputs)


def _last_norm(told: Sequence[Any]) -> float | None:
    return next((found for each in reversed(told) if (found := _norm(each)) is not None), None)


def _norm(told: Any) -> float | None:
    metrics = getattr(told, "metrics", None)
    if not isinstance(metrics, Mapping):
        return None
    found = [value for key, value in metrics.items() if "grad_norm" in str(key)]
    return float(found[0]) if found and isinstance(found[0], (int, float)) else None
