"""The Llama/Qwen block of the emulator once more, for training: a forward over padded sequences,
and the gradient of every weight, written by hand.

Every part returns its value and a function that takes the loss's derivative by that value, adds to
the gradients of its weights, and returns the derivative by its input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agent.loading.checkpoint_files import UnsupportedModelError
from emulator.engine.llama import LlamaShape

Array = np.ndarray
Pull = Callable[[Array], Array]


class NumpyLlama:
    """Weights by their names in a checkpoint, and their gradients; float32 or float64.

    The arrays of `weights` are used as they are: change them in place.
    """

    def __init__(self, config: Mapping[str, Any], weights: dict[str, Array]) -> None:
        self.shape, self.weights = LlamaShape.parse(config), weights
        if self.shape.experts is not None:
            raise UnsupportedModelError("experts: their gradient is not written by hand")
        self.gradients = {name: np.zeros_like(value) for name, value in weights.items()}
        self.head = "lm_head.weight"
        if self.shape.is_head_tied:
            self.head = "model.embed_tokens.weight"
        half = np.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        self._frequencies = self.shape.rope_theta**-half

    def forward(
        self, sequences: Sequence[Sequence[int]]
    ) -> tuple[list[Array], Callable[..., None]]:
        """Compute the logits of every prediction, [N−1, vocabulary] each, and what takes the
        derivatives by them. Sequences are padded on the right, which no prediction sees.
        """
        lengths = [len(one) - 1 for one in sequences]
        is_token = np.arange(max(lengths)) < np.array(lengths)[:, None]
        ids = np.zeros(is_token.shape, np.int64)
        ids[is_token] = np.concatenate([one[:-1] for one in sequences])
        embedding = self.weights["model.embed_tokens.weight"]
        hidden = embedding[ids]
        pulls: list[Pull] = []
        turn = self._turn(ids.shape[1], hidden.dtype)
        for layer in range(self.shape.layer_count):
            prefix = f"model.layers.{layer}."
            for part in (self._attention(prefix, turn), self._mlp(prefix)):
                added, pull = part(hidden)
                hidden = hidden + added
                pulls.append(pull)
        kept, pull_norm = self._rms(hidden, "model.norm.weight")
        logits, pull_head = self._linear(kept[is_token], self.head)

        def back(derivatives: Sequence[Array]) -> None:
            slope = np.zeros_like(hidden)
            slope[is_token] = pull_head(np.concatenate(derivatives))
            slope = pull_norm(slope)
            for pull in reversed(pulls):
                slope = slope + pull(slope)
            np.add.at(self.gradients["model.embed_tokens.weight"], ids[is_token], slope[is_token])

        return np.split(logits, np.cumsum(lengths)[:-1]), back

    def _linear(self, x: Array, name: str) -> tuple[Array, Pull]:
        weight, bias = self.weights[name], name.replace(".weight", ".bias")
        has_bias = bias in self.weights
        y = x @ weight.T
        if has_bias:
            y += self.weights[bias]

        def pull(dy: Array) -> Array:
            rows = dy.reshape(-1, dy.shape[-1])
            self.gradients[name] += rows.T @ x.reshape(-1, x.shape[-1])
            if has_bias:
                self.gradients[bias] += rows.sum(axis=0)
            return dy @ weight

        return y, pull

    def _rms(self, x: Array, name: str) -> tuple[Array, Pull]:
        weight = self.weights[name]
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.shape.norm_epsilon)
        scaled = x * scale

        def pull(dy: Array) -> Array:
            self.gradients[name] += (dy * scaled).reshape(-1, x.shape[-1]).sum(axis=0)
            inner = dy * weight
            return scale * (inner - scaled * (inner * scaled).mean(-1, keepdims=True))

        return scaled * weight, pull

    def _turn(self, count: int, dtype: Any) -> Callable[[Array, int], Array]:
        """Rotary positions in the half-split layout, [batch, positions, heads, head_dim]; a sign of
        −1 turns back."""
        angles = np.arange(count)[:, None] * self._frequencies
        cosine, sine = (f(angles)[:, None].astype(dtype) for f in (np.cos, np.sin))

        def turn(x: Array, sign: int) -> Array:
            first, second = np.split(x, 2, axis=-1)
            over = sign * sine
            return np.concatenate(
                [first * cosine - second * over, second * cosine + first * over], axis=-1
            )

        return turn

    def _attention(self, prefix: str, turn: Callable[[Array, int], Array]) -> Callable[..., Any]:
        shape, own = self.shape, prefix + "self_attn."
        pairs, size = shape.key_value_head_count, shape.head_dim
        group = shape.head_count // pairs

        def part(x: Array) -> tuple[Array, Pull]:
            batch, count, _ = x.shape
            normed, pull_norm = self._rms(x, prefix + "input_layernorm.weight")
            heads: list[Array] = []
            pulls: list[list[Pull]] = []
            for name in "qkv":
                y, pull = self._linear(normed, f"{own}{name}_proj.weight")
                y, chain = y.reshape(batch, count, -1, size), [pull]
                if f"{own}{name}_norm.weight" in self.weights:
                    y, pull = self._rms(y, f"{own}{name}_norm.weight")
                    chain.append(pull)
                heads.append(y if name == "v" else turn(y, 1))
                pulls.append(chain)
            # [batch, pairs, group · positions or positions, head_dim]
            q = heads[0].reshape(batch, count, pairs, group, size).transpose(0, 2, 3, 1, 4)
            q = q.reshape(batch, pairs, group * count, size)
            k, v = (each.transpose(0, 2, 1, 3) for each in heads[1:])
            scores = (q @ k.swapaxes(-1, -2)) * size**-0.5
            ahead = np.triu(np.ones((count, count), np.bool_), k=1)
            scores.reshape(batch, pairs, group, count, count)[..., ahead] = -np.inf
            scores -= scores.max(-1, keepdims=True)
            share = np.exp(scores)
            share /= share.sum(-1, keepdims=True)

            def side_by_side(y: Array) -> Array:
                y = y.reshape(batch, pairs, group, count, size).transpose(0, 3, 1, 2, 4)
                return y.reshape(batch, count, -1)

            out, pull_out = self._linear(side_by_side(share @ v), own + "o_proj.weight")

            def pull(dy: Array) -> Array:
                mixed = pull_out(dy).reshape(batch, count, pairs, group, size)
                mixed = mixed.transpose(0, 2, 3, 1, 4).reshape(q.shape)
                dshare = mixed @ v.swapaxes(-1, -2)
                dscores = share * (dshare - (dshare * share).sum(-1, keepdims=True))
                dscores *= size**-0.5
                dk, dv = dscores.swapaxes(-1, -2) @ q, share.swapaxes(-1, -2) @ mixed
                slopes = [
                    turn(side_by_side(dscores @ k).reshape(heads[0].shape), -1),
                    turn(dk.transpose(0, 2, 1, 3), -1),
                    dv.transpose(0, 2, 1, 3),
                ]
                total = np.zeros_like(x)
                for slope, (pull_linear, *pull_head_norm) in zip(slopes, pulls, strict=True):
                    for each in pull_head_norm:
                        slope = each(slope)
                    total += pull_linear(slope.reshape(batch, count, -1))
                return pull_norm(total)

            return out, pull

        return part

    def _mlp(self, prefix: str) -> Callable[..., Any]:
        def part(x: Array) -> tuple[Array, Pull]:
            normed, pull_norm = self._rms(x, prefix + "post_attention_layernorm.weight")
            gate, pull_gate = self._linear(normed, prefix + "mlp.gate_proj.weight")
            up, pull_up = self._linear(normed, prefix + "mlp.up_proj.weight")
            open_ = 1 / (1 + np.exp(-gate))
            out, pull_out = self._linear(gate * open_ * up, prefix + "mlp.down_proj.weight")

            def pull(dy: Array) -> Array:
                inner = pull_out(dy)
                slope = inner * up * open_ * (1 + gate * (1 - open_))
                return pull_norm(pull_gate(slope) + pull_up(inner * gate * open_))

            return out, pull

        return part
