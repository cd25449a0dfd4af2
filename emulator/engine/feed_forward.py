"""The second half of a block: SwiGLU, or experts of it that a router chooses from (Qwen3-MoE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from agent.loading.checkpoint_files import UnsupportedModelError

FloatArray = npt.NDArray[np.float32]
EXPERT_LIMIT = 256  # their numbers travel as bytes (protocol §12)


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """How many experts a layer has, how many a token is sent to, and which layers have any."""

    count: int
    active_count: int
    inner_size: int
    is_normalized: bool
    layers: tuple[int, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any], layer_count: int) -> Self:
        """Read the shape that a `config.json` of Qwen3-MoE declares.

        Raises:
            UnsupportedModelError: the counts do not fit each other, or a byte.
            KeyError, TypeError, ValueError: a number is missing, or is none.
        """
        named = "num_experts" if "num_experts" in config else "num_local_experts"  # transformers 5
        step = int(config.get("decoder_sparse_step", 1))
        dense = {int(layer) for layer in config.get("mlp_only_layers") or ()}
        shape = cls(
            count=int(config[named]),
            active_count=int(config["num_experts_per_tok"]),
            inner_size=int(config["moe_intermediate_size"]),
            is_normalized=bool(config.get("norm_topk_prob", False)),
            layers=tuple(
                layer
                for layer in range(layer_count)
                if step > 0 and (layer + 1) % step == 0 and layer not in dense
            ),
        )
        if not (1 <= shape.active_count <= shape.count <= EXPERT_LIMIT and shape.layers):
            found = f"{shape.active_count} of {shape.count} experts in {len(shape.layers)} layers"
            raise UnsupportedModelError(found)
        return shape


@dataclass(frozen=True, slots=True)
class DenseBlock:
    """One SwiGLU for every token; weights transposed for `x @ w`, gate and up side by side."""

    gate_up: FloatArray
    down: FloatArray

    def apply(self, hidden_T: FloatArray) -> FloatArray:
        """Compute what is added to each token, `[T, hidden]`."""
        return _swiglu(hidden_T, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class ExpertsBlock:
    """A router, and a SwiGLU per expert: `[experts, …]`, otherwise as `DenseBlock`."""

    shape: ExpertsShape
    router: FloatArray
    gate_up: FloatArray
    down: FloatArray

    def mix(self, hidden_T: FloatArray) -> tuple[FloatArray, npt.NDArray[np.intp]]:
        """Compute what is added to each token, `[T, hidden]`, and the experts it was sent to,
        `[T, active]`, the likeliest first.
        """
        scores = hidden_T @ self.router
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : self.shape.active_count]
        weights = np.take_along_axis(scores, chosen, axis=1)
        if self.shape.is_normalized:
            weights /= weights.sum(axis=1, keepdims=True)
        mixed = np.zeros_like(hidden_T)
        for expert in np.unique(chosen):
            tokens, places = np.nonzero(chosen == expert)
            made = _swiglu(hidden_T[tokens], self.gate_up[expert], self.down[expert])
            mixed[tokens] += weights[tokens, places, None] * made
        return mixed, chosen


def _swiglu(hidden_T: FloatArray, gate_up: FloatArray, down: FloatArray) -> FloatArray:
    both = hidden_T @ gate_up
    inner = len(down)
    gate, up = both[:, :inner], both[:, inner:]
    made: FloatArray = (gate / (1.0 + np.exp(-gate)) * up) @ down
    return made
