"""The kinds of server that are known, by the name a block declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from hotload.rollout.engines.fireworks import FIREWORKS
from hotload.rollout.engines.kind import ServerKind
from hotload.rollout.engines.llama_cpp import LLAMA_CPP
from hotload.rollout.engines.openai import OPENAI
from hotload.rollout.engines.sglang import SGLANG
from hotload.rollout.engines.tgi import TGI
from hotload.rollout.engines.vllm import VLLM, VLLM_GENERATE

EngineName = Literal[
    "fireworks", "vllm", "vllm-generate", "sglang", "llama.cpp", "mlx", "tgi", "openai"
]
# mlx_lm.server 0.32: a prompt of ids is a bad request, and nobody is told the ids of another.
MLX = ServerKind(
    "mlx",
    {},
    advice="sample from another server: mlx_lm takes no token ids of a prompt, tells none",
)
KINDS: Mapping[EngineName, ServerKind] = {
    "fireworks": FIREWORKS,
    "vllm": VLLM,
    "vllm-generate": VLLM_GENERATE,
    "sglang": SGLANG,
    "llama.cpp": LLAMA_CPP,
    "mlx": MLX,
    "tgi": TGI,
    "openai": OPENAI,
}
