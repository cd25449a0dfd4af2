"""The vendor's service: completions and chats with its own fields (protocol §11, §12)."""

from __future__ import annotations

from typing import Any

from hotload.publish import fireworks_names
from hotload.rollout.engines.kind import InferenceEndpoint, PromptForm, ServerKind, asked_of
from hotload.rollout.request import Request


def sample_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a request, a completion or a chat; every default is sent (protocol §11).

    An omitted temperature, top_p or top_k would let the model's generation_config truncate the
    policy.
    """
    sampling = request.sampling
    body = {
        "model": model,
        **asked_of(request.problem),
        "n": 1,
        "max_tokens": sampling.max_completion_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "logprobs": True,
        "stream": True,
        "perf_metrics_in_response": True,
        "raw_output": True,
        "context_length_exceeded_behavior": "error",
        "seed": request.seed,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.include_routing_matrix:
        body["include_routing_matrix"] = True
    return body


_COMPLETIONS = InferenceEndpoint(fireworks_names.COMPLETIONS, sample_body)
FIREWORKS = ServerKind(
    "fireworks",
    {
        PromptForm.IDS: _COMPLETIONS,
        PromptForm.TEXT: _COMPLETIONS,
        PromptForm.CHAT: InferenceEndpoint(fireworks_names.CHAT, sample_body),
    },
    tells_routes=True,
)
