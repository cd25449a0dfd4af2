"""The numpy forward of the Llama/Qwen block, with a KV cache (the measured default).

RMSNorm, rotary positions without scaling, grouped-query attention, optional biases on q, k, v
(Qwen2) and norms on q, k (Qwen3), SwiGLU or experts (Qwen3-MoE), tied or untied head. Computed in
float32; held to `transformers` by recorded logits. Anything outside this block is refused, never
approximated.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from agent.loading.checkpoint_files import UnsupportedModelError
from emulator.engine.feed_forward import DenseBlock, ExpertsBlock, ExpertsShape, FloatArray

WITH_EXPERTS = "qwen3_moe"
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", WITH_EXPERTS})
PREFILL_POSITIONS = 512  # at once: bounds the attention scores of a long prompt


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The numbers of `config.json` the forward needs."""

    vocab_size: int
    hidden_size: int
    layer_count: int
    head_count: int
    key_value_head_count: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope_theta: float
    is_head_tied: bool
    experts: ExpertsShape | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """Read the shape a `config.json` declares.

        Raises:
            UnsupportedModelError: another architecture, or an option this forward does not compute.
        """
        if config.get("model_type") not in MODEL_TYPES:
            raise UnsupportedModelError(f"model_type {config.get('model_type')!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(f"hidden_act {config['hidden_act']!r}")
        sliding = config.get("use_sliding_window", config["model_type"] == "mistral")
        if sliding and config.get("sliding_window"):
            raise UnsupportedModelError("sliding_window")
        # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UnsupportedModelError(f"rope_type {rope_type!r}")
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            layers = int(config["num_hidden_layers"])
            has_experts = config["model_type"] == WITH_EXPERTS
            shape = cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                layer_count=layers,
                head_count=heads,
                key_value_head_count=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                context_length=int(config.get("max_position_embeddings", 2048)),
                norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
                is_head_tied=bool(config.get("tie_word_embeddings", False)),
                experts=ExpertsShape.parse(config, layers) if has_experts else None,
            )
        except UnsupportedModelError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"config.json: {error}") from None
        if heads % shape.key_value_head_count or shape.head_dim % 2:
            raise UnsupportedModelError("head counts do not divide")
        return shape


class KeyValueCache:
    """Keys and values of the positions so far: `[layers, 2, heads, capacity, head_dim]`; and the
    experts each was sent to, `[capacity, layers with any, active]`."""

    def __init__(self, shape: LlamaShape, capacity: int = 64) -> None:
        self._layout = (shape.layer_count, 2, shape.key_value_head_count, shape.head_dim)
        experts = shape.experts
        self._routed = (0, 0) if experts is None else (len(experts.layers), experts.active_count)
        self.length = 0
        self.store, self.experts = self._allocate(capacity)

    @property
    def size_bytes(self) -> int:
        """Bytes held, capacity included."""
        return self.store.nbytes + self.experts.nbytes

    def routing_matrix(self, position: int) -> str | None:
        """Pack the experts that a position was sent to (protocol §12); `None` without experts."""
        if not self.experts.size:
            return None
        return base64.b64encode(self.experts[position].tobytes()).decode()

    def prefix(self, length: int) -> KeyValueCache:
        """Copy the first `length` positions, free to grow on their own."""
        copy = object.__new__(KeyValueCache)
        copy._layout, copy._routed, copy.length = self._layout, self._routed, length
        copy._take(self, length, length + 32)
        return copy

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions."""
        needed, capacity = self.length + count, self.store.shape[3]
        if needed > capacity:
            self._take(self, self.length, max(needed, 2 * capacity))

    def _take(self, other: KeyValueCache, length: int, capacity: int) -> None:
        store, experts = self._allocate(capacity)
        store[:, :, :, :length] = other.store[:, :, :, :length]
        experts[:length] = other.experts[:length]
        self.store, self.experts = store, experts

    def _allocate(self, capacity: int) -> tuple[FloatArray, npt.NDArray[np.uint8]]:
        layers, pair, heads, dim = self._layout
        store = np.empty((layers, pair, heads, capacity, dim), np.float32)
        return store, np.empty((capacity, *self._routed), np.uint8)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights, transposed for `x @ w`; q, k, v side by side.

    `qk_norm` is `[query and key heads, head_dim]`."""

    input_norm: FloatArray
    qkv: FloatArray
    qkv_bias: FloatArray | None
    qk_norm: FloatArray | None
    output: FloatArray
    post_norm: FloatArray
    feed_forward: DenseBlock | ExpertsBlock


class LlamaWeights:
    """Weights of one snapshot, ready to compute logits."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, FloatArray]) -> None:
        """
        Args:
            tensors: by their Hugging Face names, float32.

        Raises:
            UnsupportedModelError: a tensor is missing, misshapen, or of another block.
        """
        self.shape = LlamaShape.parse(config)
        self.vocab_size, self.context_length = self.shape.vocab_size, self.shape.context_length
        self.has_experts = self.shape.experts is not None
        left = dict(tensors)
        shape = self.shape
        self._embedding = _take(
            left, "model.embed_tokens.weight", shape.vocab_size, shape.hidden_size
        )
        self._layers = [self._layer(left, number) for number in range(shape.layer_count)]
        self._norm = _take(left, "model.norm.weight", shape.hidden_size)
        head = left.pop("lm_head.weight", None)
        if shape.is_head_tied or head is None:
            if not shape.is_head_tied:
                raise UnsupportedModelError("lm_head.weight is missing and the head is not tied")
            head = self._embedding
        self._head = np.ascontiguousarray(head.T)
        unknown = [name for name in left if not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise UnsupportedModelError(f"tensor {sorted(unknown)[0]!r} is not of this block")
        half = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
        self._frequencies = (1.0 / np.float32(shape.rope_theta) ** half).astype(np.float32)

    def empty_cache(self) -> KeyValueCache:
        """Make a cache without positions."""
        return KeyValueCache(self.shape)

    def forward(
        self, ids: Sequence[int], cache: KeyValueCache, *, all_positions: bool = False
    ) -> FloatArray:
        """Compute the logits after `ids`, which follow what `cache` holds; the cache grows by them.

        Returns:
            `[T, vocab]` with `all_positions`, else `[1, vocab]` of the last position.
        """
        # Weights may be any bytes: what overflows or is no number shows in the logits.
        with np.errstate(over="ignore", invalid="ignore"):
            parts = [
                self._forward(ids[start : start + PREFILL_POSITIONS], cache, all_positions)
                for start in range(0, len(ids), PREFILL_POSITIONS)
            ]
        return np.concatenate(parts) if all_positions and len(parts) > 1 else parts[-1]

    def _forward(self, ids: Sequence[int], cache: KeyValueCache, all_positions: bool) -> FloatArray:
        count, shape = len(ids), self.shape
        cache.reserve(count)
        start, end = cache.length, cache.length + count
        angles = np.arange(start, end, dtype=np.float32)[:, None] * self._frequencies
        cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
        hidden_T = self._embedding[np.asarray(ids)]
        mask = None
        if count > 1:
            mask = np.triu(np.full((count, end), -np.inf, np.float32), k=start + 1)
        heads, dim, half = shape.head_count, shape.head_dim, shape.head_dim // 2
        rotated = heads + shape.key_value_head_count  # query heads and key heads, turned together
        group = heads // shape.key_value_head_count
        scale = np.float32(dim**-0.5)
        with_experts = 0
        for layer, store in zip(self._layers, cache.store, strict=True):
            qkv = self._rms(hidden_T, layer.input_norm) @ layer.qkv
            if layer.qkv_bias is not None:
                qkv += layer.qkv_bias
            qkv = qkv.reshape(count, -1, dim)
            turning = qkv[:, :rotated]
            if layer.qk_norm is not None:
                turning = self._rms(turning, layer.qk_norm)
            # Rotary positions in Hugging Face's half-split layout.
            first, second = turning[:, :, :half], turning[:, :, half:]
            turned = np.concatenate(
                [first * cosine - second * sine, second * cosine + first * sine], axis=2
            )
            store[0, :, start:end] = turned[:, heads:].transpose(1, 0, 2)
            store[1, :, start:end] = qkv[:, rotated:].transpose(1, 0, 2)
            grouped = turned[:, :heads].transpose(1, 0, 2).reshape(-1, group * count, dim)
            scores = grouped @ store[0, :, :end].transpose(0, 2, 1)
            scores *= scale
            if mask is not None:
                scores = (scores.reshape(-1, group, count, end) + mask).reshape(scores.shape)
            scores -= np.maximum.reduce(scores, axis=2, keepdims=True)
            np.exp(scores, out=scores)
            scores /= np.add.reduce(scores, axis=2, keepdims=True)
            mixed = (scores @ store[1, :, :end]).reshape(heads, count, dim)
            hidden_T = hidden_T + mixed.transpose(1, 0, 2).reshape(count, -1) @ layer.output
            normed = self._rms(hidden_T, layer.post_norm)
            if isinstance(layer.feed_forward, DenseBlock):
                added = layer.feed_forward.apply(normed)
            else:
                added, cache.experts[start:end, with_experts] = layer.feed_forward.mix(normed)
                with_experts += 1
            hidden_T = hidden_T + added
        cache.length = end
        if not all_positions:
            hidden_T = hidden_T[-1:]
        return self._rms(hidden_T, self._norm) @ self._head

    def _rms(self, values: FloatArray, weight: FloatArray) -> FloatArray:
        # The reduction itself: `mean` costs more than the forward of a small matrix.
        mean: FloatArray = np.add.reduce(values * values, axis=-1, keepdims=True)
        mean /= np.float32(values.shape[-1])
        mean += np.float32(self.shape.norm_epsilon)
        np.sqrt(mean, out=mean)
        return values / mean * weight

    def _layer(self, left: dict[str, FloatArray], number: int) -> Layer:
        shape, prefix = self.shape, f"model.layers.{number}."
        queries = shape.head_count * shape.head_dim
        pairs = shape.key_value_head_count * shape.head_dim
        sizes = {"q_proj": queries, "k_proj": pairs, "v_proj": pairs}
        attention = prefix + "self_attn."
        qkv = [
            _take(left, f"{attention}{name}.weight", size, shape.hidden_size)
            for name, size in sizes.items()
        ]
        biases = None
        if f"{attention}q_proj.bias" in left:
            biases = np.concatenate(
                [_take(left, f"{attention}{name}.bias", size) for name, size in sizes.items()]
            )
        qk_norm = None
        if f"{attention}q_norm.weight" in left:
            counts = {"q_norm": shape.head_count, "k_norm": shape.key_value_head_count}
            norms = [
                np.tile(_take(left, f"{attention}{name}.weight", shape.head_dim), (count, 1))
                for name, count in counts.items()
            ]
            qk_norm = np.concatenate(norms)
        output = _take(left, f"{attention}o_proj.weight", shape.hidden_size, queries)
        return Layer(
            input_norm=_take(left, f"{prefix}input_layernorm.weight", shape.hidden_size),
            qkv=np.ascontiguousarray(np.concatenate(qkv).T),
            qkv_bias=biases,
            qk_norm=qk_norm,
            output=np.ascontiguousarray(output.T),
            post_norm=_take(left, f"{prefix}post_attention_layernorm.weight", shape.hidden_size),
            feed_forward=self._feed_forward(left, number, prefix + "mlp."),
        )

    def _feed_forward(
        self, left: dict[str, FloatArray], number: int, mlp: str
    ) -> DenseBlock | ExpertsBlock:
        hidden, experts = self.shape.hidden_size, self.shape.experts
        if experts is None or number not in experts.layers:
            return DenseBlock(*_take_swiglu(left, mlp, None, hidden))
        router = _take(left, f"{mlp}gate.weight", experts.count, hidden)
        each = [
            _take_swiglu(left, f"{mlp}experts.{expert}.", experts.inner_size, hidden)
            for expert in range(experts.count)
        ]
        gate_up, down = (np.stack(parts) for parts in zip(*each, strict=True))
        return ExpertsBlock(experts, np.ascontiguousarray(router.T), gate_up, down)


def _take_swiglu(
    left: dict[str, FloatArray], prefix: str, inner_size: int | None, hidden_size: int
) -> tuple[FloatArray, FloatArray]:
    """Gate and up side by side, and down, transposed for `x @ w`."""
    gate = _take(left, f"{prefix}gate_proj.weight", inner_size, hidden_size)
    up = _take(left, f"{prefix}up_proj.weight", len(gate), hidden_size)
    down = _take(left, f"{prefix}down_proj.weight", hidden_size, len(gate))
    gate_up = np.concatenate([gate, up])
    return np.ascontiguousarray(gate_up.T), np.ascontiguousarray(down.T)


def _take(left: dict[str, FloatArray], name: str, *expected: int | None) -> FloatArray:
    tensor = left.pop(name, None)
    if tensor is None:
        raise UnsupportedModelError(f"tensor {name!r} is missing")
    matches = tensor.ndim == len(expected) and all(
        size is None or size == found for size, found in zip(expected, tensor.shape, strict=True)
    )
    if not matches:
        raise UnsupportedModelError(
            f"tensor {name!r} has shape {tensor.shape}, expected {expected}"
        )
    return tensor
