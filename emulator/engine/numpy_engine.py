"""The default engine: the numpy forward with sampling on top."""

from __future__ import annotations

from pathlib import Path

from emulator.engine import decoding
from emulator.engine.llama import LlamaWeights
from emulator.engine.weights import load_llama


class NumpyEngine:
    """Serves Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE checkpoints."""

    is_inline = False
    prefill = staticmethod(decoding.prefill)

    def load(self, directory: Path, adapter: Path | None = None) -> LlamaWeights:
        """Load the weights in `directory`, an adapter added to them if given.

        Raises:
            UnsupportedModelError: not a model of this engine.
            InvalidCheckpointError: a shard is not readable.
        """
        return load_llama(directory, adapter)
