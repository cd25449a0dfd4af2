"""llama.cpp's server: completions of token ids, with the probabilities after all its samplers.

Whole answers: after a stream it closes the connection that it promised to keep.
Run against the server itself (`make engines`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hotload.publish import fireworks_names
from hotload.rollout.completions_api import Logprobs, Reading
from hotload.rollout.engines.kind import InferenceEndpoint, PromptForm, ServerKind
from hotload.rollout.engines.openai import NO_SWAP, openai_body, spell_choices
from hotload.rollout.failures import FailureRules
from hotload.rollout.request import Request

# Its own defaults, and those of its command line, would cut the policy: `min_p` is 0.05.
NEUTRAL = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dynatemp_range": 0.0,
    "adaptive_target": -1.0,
    "mirostat": 0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
}


def llama_cpp_body(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a completion."""
    return openai_body(request, model, is_stream=False) | {
        "top_k": request.sampling.top_k,
        **NEUTRAL,
        "post_sampling_probs": True,
    }


def spell_probabilities(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a chunk as the vendor does; beside a token stands its id, and `prob`."""
    spelt = spell_choices(chunk)
    for choice, told in zip(spelt["choices"], chunk.get("choices") or (), strict=True):
        entries = (told.get("logprobs") or {}).get("content") or ()
        for entry, beside in zip(choice["logprobs"]["content"], entries, strict=True):
            entry["logprob"] = math.log(beside["prob"]) if beside.get("prob") else None
    return spelt


_READING = Reading(spell_probabilities, Logprobs.SAMPLED, FailureRules(NO_SWAP, ("loading model",)))
LLAMA_CPP = ServerKind(
    "llama.cpp",
    {PromptForm.IDS: InferenceEndpoint(fireworks_names.COMPLETIONS, llama_cpp_body, _READING)},
    advice="ask llama.cpp token ids alone: it does not tell those of a text or a chat",
)
