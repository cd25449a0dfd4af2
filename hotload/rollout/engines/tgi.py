"""TGI (text-generation-inference): `/generate` with its details, whole answers only.

Read in its source, not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotload.rollout.completions_api import Logprobs, Reading
from hotload.rollout.engines.kind import InferenceEndpoint, PromptForm, ServerKind
from hotload.rollout.engines.openai import NO_SWAP
from hotload.rollout.failures import Action, Cause, FailureRules
from hotload.rollout.request import Request

ENDS = {"eos_token": "stop", "stop_sequence": "stop"}


def tgi_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of `/generate`; a filter that is off is left out: its neutral values are
    refused.
    """
    sampling = request.sampling
    parameters: dict[str, Any] = {
        "max_new_tokens": sampling.max_completion_tokens,
        "do_sample": True,
        "temperature": sampling.temperature,
        "seed": request.seed,
        "details": True,
        "decoder_input_details": True,
        "return_full_text": False,
    }
    if sampling.top_p < 1:
        parameters["top_p"] = sampling.top_p
    if sampling.top_k:
        parameters["top_k"] = sampling.top_k
    if sampling.stop:
        parameters["stop"] = list(sampling.stop)
    return {"inputs": request.problem.prompt, "parameters": parameters}


def spell_details(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Spell an answer as the vendor does."""
    if answer.get("error"):
        return answer
    details = answer["details"]
    prompt, tokens = ([*details[name]] for name in ("prefill", "tokens"))
    choice = {
        "text": answer["generated_text"],
        "token_ids": None,
        "prompt_token_ids": [token["id"] for token in prompt],
        "logprobs": {
            "content": [
                {"token_id": token["id"], "logprob": token.get("logprob")} for token in tokens
            ]
        },
        "finish_reason": ENDS.get(details["finish_reason"], details["finish_reason"]),
    }
    usage = {"prompt_tokens": len(prompt), "completion_tokens": details["generated_tokens"]}
    return {"choices": [choice], "usage": usage}


_FAILED = {424: (Action.RETRY, Cause.SERVER_ERROR)}
TGI = ServerKind(
    "tgi",
    {
        PromptForm.TEXT: InferenceEndpoint(
            "/generate",
            tgi_body,
            Reading(spell_details, Logprobs.SAMPLED, FailureRules(NO_SWAP | _FAILED)),
        )
    },
    advice="start TGI with --enable-prefill-logprobs, and ask it text: it takes no token ids",
)
