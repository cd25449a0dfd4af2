"""vLLM: OpenAI's endpoints with token ids beside them, and its own with ids in and ids out.

Held to the request and response classes of vLLM 0.33.
"""

from __future__ import annotations

from typing import Any

from hotload.publish import fireworks_names
from hotload.rollout.completions_api import Logprobs, Reading
from hotload.rollout.engines.kind import InferenceEndpoint, PromptForm, ServerKind
from hotload.rollout.engines.openai import NO_SWAP, openai_body, spell_choices
from hotload.rollout.failures import Action, Cause, FailureRules
from hotload.rollout.request import Request

# What a model's generation_config would set where it is left out.
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def vllm_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a completion or a chat; routes of experts are told in whole answers."""
    is_stream = not request.sampling.include_routing_matrix
    body = openai_body(request, model, is_stream=is_stream) | {
        "top_k": request.sampling.top_k,
        **NEUTRAL,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "return_weight_versions": True,
    }
    if request.problem.messages is None:
        body["logprobs"] = 0
    return body


def vllm_generate_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of `/inference/v1/generate`, which names the weights without being asked."""
    sampling = request.sampling
    parameters: dict[str, Any] = {
        "n": 1,
        "max_tokens": sampling.max_completion_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        **NEUTRAL,
        "seed": request.seed,
        "logprobs": 0,
    }
    if sampling.stop:
        parameters["stop"] = list(sampling.stop)
    return {
        "model": model,
        "token_ids": list(request.problem.prompt or ()),
        "sampling_params": parameters,
        "output_mode": "text",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


_READING = Reading(
    spell_choices,
    Logprobs.SAMPLED,
    # `/pause` in the modes `abort` and `wait`: what runs is ended, what comes is refused.
    FailureRules(NO_SWAP, ("generation is paused",), (Action.WAIT_FOR_SWAP, Cause.SWAP_TIMEOUT)),
)
_PROCESSED = (
    "start vLLM with --logprobs-mode processed_logprobs, or sample with temperature 1, top_p 1,"
    " top_k 0; a name is what --served-model-name says"
)
_COMPLETIONS = InferenceEndpoint(fireworks_names.COMPLETIONS, vllm_body, _READING)
_CHAT = InferenceEndpoint(fireworks_names.CHAT, vllm_body, _READING)
VLLM = ServerKind(
    "vllm",
    {PromptForm.IDS: _COMPLETIONS, PromptForm.TEXT: _COMPLETIONS, PromptForm.CHAT: _CHAT},
    advice=_PROCESSED,
    certain={"top_k": 1},
    tells_routes=True,
    session_headers=("x-session-id",),
)
VLLM_GENERATE = ServerKind(
    "vllm-generate",
    {
        PromptForm.IDS: InferenceEndpoint("/inference/v1/generate", vllm_generate_body, _READING),
        PromptForm.TEXT: _COMPLETIONS,
        PromptForm.CHAT: _CHAT,
    },
    advice=f"start vLLM with --enable-scale-out; {_PROCESSED}",
    certain={"top_k": 1},
    tells_routes=True,
    session_headers=("x-session-id",),
)
