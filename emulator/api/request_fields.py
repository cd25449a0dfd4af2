"""Which request fields are served, without effect, neutral, or refused (protocol §11).

The fields are those of the vendor's typed client, `fireworks-ai` 1.2.30.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from agent.failures import RefusedError, refused_field
from agent.fleet.signals import refuse_extra

SERVED = frozenset(
    [
        "model",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "logit_bias",
        "frequency_penalty",
        "presence_penalty",
        "logprobs",
        "top_logprobs",
        "stream",
        "perf_metrics_in_response",
        "raw_output",
        "return_token_ids",
        "seed",
        "stop",
        "ignore_eos",
        "echo",
        "echo_last",
        "context_length_exceeded_behavior",
        "include_routing_matrix",
    ]
)
SERVED_IN_COMPLETIONS = frozenset(["prompt"])
SERVED_IN_CHATS = frozenset(["messages", "tools"])
# No token of an answer depends on them, here or at the vendor's: any value of these types.
WITHOUT_EFFECT: Mapping[str, tuple[type, ...]] = {
    "metadata": (dict,),
    "prediction": (str, dict),
    "prompt_cache_isolation_key": (str,),
    "prompt_cache_key": (str,),
    "service_tier": (str,),
    "speculation": (str, list),
    "stream_options": (dict,),
    "user": (str,),
}
KINDS: Mapping[type, str] = {str: "text", dict: "an object", list: "a list"}
# What the engine cannot do: the values that ask for nothing, beside null.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "mirostat_lr": (),
    "mirostat_target": (),
    "reasoning_effort": ("none", False),
    "reasoning_history": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "thinking": ({"type": "disabled"},),
    "typical_p": (1,),
}
NEUTRAL_IN_COMPLETIONS: Mapping[str, tuple[object, ...]] = {"images": ([],)}
NEUTRAL_IN_CHATS: Mapping[str, tuple[object, ...]] = {
    "function_call": ("auto", "none"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "prompt_truncate_len": (),
    "safe_tokenization": (False,),
    "tool_choice": ("auto", "none"),  # a message is an answer to both
}


def check_fields(body: Mapping[str, Any], *, is_chat: bool) -> None:
    """Return if the body has no field that the engine does not serve.

    Raises:
        RefusedError: 400, in the vendor's sentence for a field that is unknown, or asks for
            something the engine cannot do.
    """
    served, neutral = SERVED_IN_COMPLETIONS, NEUTRAL_IN_COMPLETIONS
    if is_chat:
        served, neutral = SERVED_IN_CHATS, NEUTRAL_IN_CHATS
    neutral = {**NEUTRAL, **neutral}
    refuse_extra(body, SERVED | served | WITHOUT_EFFECT.keys() | neutral.keys())
    for name, value in body.items():
        if value is None:
            continue
        if name in neutral and not _is_among(value, neutral[name]):
            raise refused_field(name)
        if name in WITHOUT_EFFECT and not isinstance(value, WITHOUT_EFFECT[name]):
            kinds = " or ".join(KINDS[kind] for kind in WITHOUT_EFFECT[name])
            raise RefusedError(400, f"{name}: Input should be {kinds}")


def _is_among(value: object, values: Collection[object]) -> bool:
    """Whether JSON's `value` is among `values`; Python takes true for 1."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in values
    )
