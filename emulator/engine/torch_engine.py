"""`--engine transformers`: any causal Hugging Face model, where torch is installed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.loading.checkpoint_files import UnsupportedModelError, read_json
from emulator.engine import decoding
from emulator.engine.weights import adapter_pairs, adapter_scale, read_tensors
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE


@dataclass(slots=True)
class TorchCache:
    """A `DynamicCache` and how many positions it holds."""

    store: Any
    length: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        layers = [
            (layer.keys, layer.values) for layer in self.store.layers if layer.keys is not None
        ]
        return sum(part.nbytes for pair in layers for part in pair)

    def prefix(self, length: int) -> TorchCache:
        """Copy the first `length` positions."""
        store = copy.deepcopy(self.store)
        if length < self.length:
            store.crop(length - self.length)
        return TorchCache(store, length)

    def routing_matrix(self, position: int) -> None:
        """Tell nothing of experts: the models of transformers keep no routes."""


class TorchWeights:
    """A transformers model in float32 on the CPU."""

    has_experts = False

    def __init__(self, model: Any, context_length: int) -> None:
        self._model = model
        self.vocab_size = int(model.config.vocab_size)
        self.context_length = context_length

    def empty_cache(self) -> TorchCache:
        """Make a cache without positions."""
        from transformers import DynamicCache

        return TorchCache(DynamicCache())

    def forward(
        self, ids: Sequence[int], cache: TorchCache, *, all_positions: bool = False
    ) -> npt.NDArray[np.float32]:
        """Compute the logits after `ids`: `[T, vocab]` with `all_positions`, else `[1, vocab]`."""
        import torch

        if cache.length == 0 and len(cache.store.layers):
            cache.store = self.empty_cache().store  # cropped to nothing
        with torch.inference_mode():
            output = self._model(
                torch.tensor([list(ids)]),
                past_key_values=cache.store,
                use_cache=True,
                logits_to_keep=0 if all_positions else 1,
            )
        cache.length += len(ids)
        logits: npt.NDArray[np.float32] = output.logits[0].numpy()
        return logits


class TorchEngine:
    """Loads checkpoints into transformers' own classes."""

    is_inline = False
    prefill = staticmethod(decoding.prefill)

    def load(self, directory: Path, adapter: Path | None = None) -> TorchWeights:
        """Load the model in `directory`, an adapter added to its weights.

        Raises:
            UnsupportedModelError: transformers does not know it, or its tensors do not fit.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        raw = read_json(directory / CONFIG_FILE)
        try:
            config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (KeyError, OSError, ValueError) as error:
            raise UnsupportedModelError(f"{CONFIG_FILE}: {error}") from None
        tensors = {name: torch.from_numpy(array) for name, array in read_tensors(directory).items()}
        if adapter is not None:
            scale = adapter_scale(read_json(adapter / ADAPTER_CONFIG_FILE))
            for name, (down, up) in adapter_pairs(read_tensors(adapter)).items():
                if name not in tensors:
                    raise UnsupportedModelError(
                        f"adapter tensor for {name!r} does not fit the model"
                    )
                tensors[name] = tensors[name] + scale * torch.from_numpy(up @ down)
        try:
            missing, unexpected = model.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise UnsupportedModelError(str(error)) from None
        model.tie_weights()
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise UnsupportedModelError(f"tensors missing {missing}, unexpected {unexpected}")
        return TorchWeights(model.eval(), int(raw.get("max_position_embeddings", 2048)))
