"""A trainer that needs numpy alone: it learns, on any machine that runs the demo.

Named in a declaration as `examples.numpy_trainer:open_trainer`. It draws no random number, so the
same state and the same calls give the same bits.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emulator.engine.weights import read_tensors
from examples.numpy_llama import NumpyLlama
from examples.tiny_trainer import bf16
from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.directory.files import copy_file, new_directory, write_atomic
from hotload.directory.relayout import view_checkpoint
from hotload.directory.shards import read_checkpoint
from hotload.errors import StoreError, TrainerError
from hotload.trainers.base_digest import digest_base
from hotload.trainers.saved_state import read_state, remove_state, write_state
from hotload.trainers.trainer import OptimizerFigures, TrainerFacts
from hotload.training.schedule import AdamSettings
from hotload.training.settings import StateRef


def open_trainer(base_model: str, states: str, temperature: float = 1.0) -> "NumpyTrainer":
    """Load a checkpoint directory of a Llama, Mistral, Qwen2 or Qwen3 for training.

    Args:
        states: the directory that states are written to and read from.
        temperature: the samples', at which log-probabilities are taken.
    """
    return NumpyTrainer(Path(base_model), Path(states), temperature)


class NumpyTrainer:
    """fp32 masters with AdamW, exported as bf16."""

    def __init__(
        self, base_model: Path, states: Path, temperature: float = 1.0, dtype: type = np.float32
    ) -> None:
        self._base, self._states, self._temperature = base_model, states, temperature
        self._base_sha256 = digest_base(base_model)
        config = json.loads((base_model / CONFIG_FILE).read_bytes())
        tensors = read_tensors(base_model)
        if config.get("tie_word_embeddings"):
            tensors.pop("lm_head.weight", None)
        self.model = NumpyLlama(config, {n: tensors[n].astype(dtype) for n in sorted(tensors)})
        self._moments = [self._zeros(), self._zeros()]
        self._step = 0
        self._kept: tuple[list[tuple[int, ...]], _Forward] | None = None

    def describe(self) -> TrainerFacts:
        """Say what is trained."""
        return TrainerFacts(
            model=self._base.name,
            base_sha256=self._base_sha256,
            parameter_count=sum(each.size for each in self.model.weights.values()),
            lora_rank=None,
            is_deterministic=True,
            details={"trainer": "numpy", "temperature": self._temperature},
        )

    def logprobs(
        self, sequences: Sequence[Sequence[int]], *, is_before_backward: bool = False
    ) -> list[np.ndarray]:
        """Compute the log-probability of every token but the first, [N−1] each."""
        forward = _Forward(self.model, self._checked(sequences), self._temperature)
        self._kept = (forward.sequences, forward) if is_before_backward else None
        return [each.astype(np.float64) for each in forward.logprobs]

    def backward(
        self, sequences: Sequence[Sequence[int]], coefficients: Sequence[np.ndarray]
    ) -> None:
        """Add the sum of coefficient × gradient of log-probability to the gradient."""
        asked = self._checked(sequences)
        kept, self._kept = self._kept, None
        forward = kept[1] if kept and kept[0] == asked else None
        shapes = [np.shape(each) for each in coefficients]
        if shapes != [(len(one) - 1,) for one in asked]:
            raise ValueError(f"coefficients: found shapes {shapes}, expected one per prediction")
        if not all(np.isfinite(each).all() for each in coefficients):
            raise ValueError("coefficients: found one that is not finite: the loss must be mended")
        with np.errstate(over="ignore", invalid="ignore"):  # the step refuses what overflows
            (forward or _Forward(self.model, asked, self._temperature)).backward(coefficients)

    def step(self, adam: AdamSettings, *, learning_rate: float, divisor: float) -> OptimizerFigures:
        """Divide, clip, update by AdamW (what has one dimension does not decay), and clear."""
        self._kept = None
        gradients = self.model.gradients
        norm = sum(float((each.astype(np.float64) ** 2).sum()) for each in gradients.values())
        norm = norm**0.5 / divisor
        if not np.isfinite(norm):
            self._clear()
            raise TrainerError(self._base.name, "its gradient is not finite; nothing was changed")
        scale = min(1.0, adam.grad_clip_norm / (norm + 1e-6)) if adam.grad_clip_norm else 1.0
        self._step += 1
        corrections = [1 - beta**self._step for beta in (adam.beta1, adam.beta2)]
        for name, weight in self.model.weights.items():
            gradient = gradients[name] * (scale / divisor)
            first, second = (moments[name] for moments in self._moments)
            first += (1 - adam.beta1) * (gradient - first)
            second += (1 - adam.beta2) * (gradient * gradient - second)
            if weight.ndim > 1:
                weight *= 1 - learning_rate * adam.weight_decay
            root = np.sqrt(second / corrections[1]) + adam.eps
            weight -= learning_rate / corrections[0] * first / root
        self._clear()
        return OptimizerFigures(gradient_norm=norm)

    def save_state(self, name: str) -> StateRef:
        """Write masters and moments durably."""
        parts = dict(zip(("weight", "first", "second"), self._parts(), strict=True))
        arrays = {f"{key}/{n}": each for key, part in parts.items() for n, each in part.items()}
        facts = {"trainer": "numpy", "step": self._step}
        return write_state(self._states, name, arrays, facts)

    def load_state(self, ref: StateRef) -> None:
        """Become what was saved."""
        arrays, facts = read_state(self._states, ref)
        parts = dict(zip(("weight", "first", "second"), self._parts(), strict=True))
        own = {f"{key}/{n}": each for key, part in parts.items() for n, each in part.items()}
        found = {name: each.shape for name, each in arrays.items()}
        if facts.get("trainer") != "numpy" or found != {n: each.shape for n, each in own.items()}:
            raise StoreError(ref.path, "a state of another trainer or model")
        for name, each in own.items():
            each[...] = arrays[name]
        self._step = int(facts["step"])
        self._clear()

    def remove_state(self, ref: StateRef) -> None:
        """Remove what was saved."""
        remove_state(self._states, ref)

    def export(self, directory: Path) -> None:
        """Write a checkpoint in bf16, one layer a file, with the base model's other files."""
        view = view_checkpoint(self._base)
        with new_directory(directory) as out:
            for shard in view.checkpoint.shards:
                bits = {each.name: bf16(self.model.weights[each.name]) for each in shard.tensors}
                infos, end = [], 0
                for name, each in bits.items():
                    infos.append(TensorInfo(name, "BF16", each.shape, end, end + each.nbytes))
                    end += each.nbytes
                body = b"".join(each.tobytes() for each in bits.values())
                write_atomic(out / shard.file, render_header(infos, {"format": "pt"}) + body)
            for each in view.checkpoint.side_files:
                if each.file not in (INDEX_FILE, SPEC_FILE):
                    copy_file(view.file(each.file), out / each.file)
            shards = read_checkpoint(out).shards
            write_atomic(out / INDEX_FILE, build_index(shards))
            write_atomic(out / SPEC_FILE, build_spec(shards))

    def _parts(self) -> list[dict[str, np.ndarray]]:
        return [self.model.weights, *self._moments]

    def _zeros(self) -> dict[str, np.ndarray]:
        return {name: np.zeros_like(each) for name, each in self.model.weights.items()}

    def _clear(self) -> None:
        self._kept = None
        for each in self.model.gradients.values():
            each[...] = 0

    def _checked(self, sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        shape = self.model.shape
        for number, one in enumerate(sequences):
            if not 2 <= len(one) <= shape.context_length + 1:
                expected = f"2 to {shape.context_length + 1}"
                raise ValueError(f"sequence {number}: found {len(one)} tokens, expected {expected}")
            if not 0 <= min(one) <= max(one) < shape.vocab_size:
                raise ValueError(f"sequence {number}: expected ids below {shape.vocab_size}")
        return [tuple(one) for one in sequences]


class _Forward:
    """Log-probabilities of sequences, and all that their gradient needs."""

    def __init__(
        self, model: NumpyLlama, sequences: list[tuple[int, ...]], temperature: float
    ) -> None:
        self.sequences = sequences
        self._temperature = temperature
        logits, self._back = model.forward(sequences)
        self._shares: list[np.ndarray] = []
        self.logprobs: list[np.ndarray] = []
        for ids, each in zip(sequences, logits, strict=True):
            scaled = each / temperature
            scaled -= scaled.max(-1, keepdims=True)
            scaled -= np.log(np.exp(scaled).sum(-1, keepdims=True))
            self.logprobs.append(scaled[np.arange(len(ids) - 1), ids[1:]])
            self._shares.append(np.exp(scaled))

    def backward(self, coefficients: Sequence[np.ndarray]) -> None:
        """Take coefficients to the gradients of all weights."""
        derivatives = []
        for ids, share, values in zip(self.sequences, self._shares, coefficients, strict=True):
            column = (np.asarray(values) / self._temperature).astype(share.dtype)
            derivative = -share * column[:, None]
            derivative[np.arange(len(ids) - 1), ids[1:]] += column
            derivatives.append(derivative)
        self._back(derivatives)
