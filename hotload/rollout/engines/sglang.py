"""SGLang: its own endpoint for ids and text, OpenAI's for chats; whole answers only.

Its streams repeat everything from the first token on, and its chats tell no ids in streams. Held to
the request and response classes of SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotload.publish import fireworks_names
from hotload.rollout.completions_api import Logprobs, Reading
from hotload.rollout.engines.kind import InferenceEndpoint, PromptForm, ServerKind
from hotload.rollout.engines.openai import NO_SWAP, openai_body, spell_choices
from hotload.rollout.failures import Action, Cause, FailureRules
from hotload.rollout.request import Request

NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
ALL_TOKENS = -1
"""Its `top_k` for no limit; 0 is refused."""


def sglang_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of `/generate`."""
    sampling, prompt = request.sampling, request.problem.prompt
    parameters: dict[str, Any] = {
        "n": 1,
        "max_new_tokens": sampling.max_completion_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or ALL_TOKENS,
        **NEUTRAL,
        "sampling_seed": request.seed,
    }
    if sampling.stop:
        parameters["stop"] = list(sampling.stop)
    return {
        **({"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt or ())}),
        "sampling_params": parameters,
        "return_logprob": True,
        "return_prompt_token_ids": True,
        "stream": False,
    }


def sglang_chat_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a chat."""
    return openai_body(request, model, is_stream=False) | {
        "top_k": request.sampling.top_k or ALL_TOKENS,
        **NEUTRAL,
        "return_token_ids": True,
    }


def spell_generated(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Spell an answer of `/generate` as the vendor does."""
    if answer.get("error"):
        return answer
    meta = answer["meta_info"]
    end, count = meta["finish_reason"], meta["completion_tokens"]
    if end["type"] == "abort" and end.get("status_code"):
        return {"error": {"status_code": end["status_code"], "message": end.get("message")}}
    choice = {
        "text": answer.get("text"),
        "token_ids": answer["output_ids"],
        "prompt_token_ids": answer.get("prompt_token_ids"),
        "logprobs": {
            "content": [
                {"token_id": token_id, "logprob": logprob}
                for logprob, token_id, *_ in meta.get("output_token_logprobs") or ()
            ]
        },
        "finish_reason": end["type"],
        "weight_versions": _spans(meta, count),
    }
    usage = {
        "prompt_tokens": meta.get("prompt_tokens"),
        "prompt_tokens_details": {"cached_tokens": meta.get("cached_tokens")},
        "completion_tokens": count,
    }
    return {"choices": [choice], "usage": usage}


def spell_chat(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a chat's answer as the vendor does."""
    spelt = spell_choices(answer)
    for choice in spelt["choices"]:
        choice["token_ids"] = ids = choice.get("response_token_ids")
        choice["weight_versions"] = _spans(answer.get("metadata") or {}, len(ids or ()))
    return spelt


def _spans(told: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Read which weights made which tokens: one label, and spans where a request straddled."""
    whole = {"version": told.get("weight_version"), "start": 0, "end": count}
    return told.get("weight_versions") or [whole]


# `/pause_generation` in the mode `abort`, or an update of weights that ends what runs.
_RULES = FailureRules(NO_SWAP, abort=(Action.WAIT_FOR_SWAP, Cause.SWAP_TIMEOUT))
_GENERATE = InferenceEndpoint(
    "/generate", sglang_body, Reading(spell_generated, Logprobs.TEMPERED, _RULES)
)
SGLANG = ServerKind(
    "sglang",
    {
        PromptForm.IDS: _GENERATE,
        PromptForm.TEXT: _GENERATE,
        PromptForm.CHAT: InferenceEndpoint(
            fireworks_names.CHAT, sglang_chat_body, Reading(spell_chat, Logprobs.TEMPERED, _RULES)
        ),
    },
    advice=(
        "start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB, and sample with top_p 1 and top_k 0:"
        " its log-probabilities know the temperature and no filter"
    ),
    certain={"temperature": 0.001},
    session_headers=("x-smg-routing-key",),
)
