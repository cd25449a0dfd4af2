"""OpenAI's endpoints, as servers have them that say nothing more of themselves.

The token ids may stand where any known server puts them. One that tells none is refused by the
preflight: nothing is ever tokenized here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hotload.publish import fireworks_names
from hotload.rollout.completions_api import Reading
from hotload.rollout.engines.kind import InferenceEndpoint, PromptForm, ServerKind, asked_of
from hotload.rollout.failures import Action, Cause, FailureRules
from hotload.rollout.request import Request

UNTOLD = -9999.0
"""Stands for a log-probability that the server does not have, or that is minus infinity."""
ID_TEXT = "token_id:"
NO_SWAP = {404: (Action.STOP_RUN, Cause.REFUSED)}
"""404 is a path or a name that is not there, and will not be."""


def openai_body(request: Request, model: str, *, is_stream: bool = True) -> dict[str, Any]:
    """Return the body of a completion or a chat, with nothing but OpenAI's own fields."""
    sampling = request.sampling
    body = {
        "model": model,
        **asked_of(request.problem),
        "n": 1,
        "max_tokens": sampling.max_completion_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request.seed,
        # A completion's is the number of other tokens beside the sampled one.
        "logprobs": True if request.problem.messages is not None else 1,
        "stream": is_stream,
    }
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    return body


def spell_choices(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a chunk, or a whole answer, of OpenAI's endpoints as the vendor does.

    The model's name is left out: it says nothing of the weights.
    """
    prompt = chunk.get("prompt_token_ids")
    return {
        "error": chunk.get("error"),
        "usage": chunk.get("usage"),
        "choices": [
            {
                "token_ids": None,
                "prompt_token_ids": prompt,
                **choice,
                "logprobs": {"content": [*_entries(choice.get("logprobs") or {})]},
            }
            for choice in chunk.get("choices") or ()
        ],
    }


def _entries(logprobs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "token_logprobs" in logprobs:  # a completion of OpenAI's first kind
        for text, value in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True):
            yield _entry(_id_in(text), value)
        return
    for entry in logprobs.get("content") or ():
        number = entry.get("token_id", entry.get("id"))
        yield _entry(_id_in(entry.get("token")) if number is None else number, entry.get("logprob"))


def _entry(token_id: int | None, logprob: float | None) -> dict[str, Any]:
    is_told = logprob is not None and logprob > UNTOLD
    return {"token_id": token_id, "logprob": logprob if is_told else None}


def _id_in(text: str | None) -> int | None:
    """Read the id out of `token_id:N`, as vLLM writes tokens when it is asked to."""
    return int(text[len(ID_TEXT) :]) if text and text.startswith(ID_TEXT) else None


_READING = Reading(spell_choices, rules=FailureRules(NO_SWAP))
_COMPLETIONS = InferenceEndpoint(fireworks_names.COMPLETIONS, openai_body, _READING)
OPENAI = ServerKind(
    "openai",
    {
        PromptForm.IDS: _COMPLETIONS,
        PromptForm.TEXT: _COMPLETIONS,
        PromptForm.CHAT: InferenceEndpoint(fireworks_names.CHAT, openai_body, _READING),
    },
    advice=(
        "a server that tells the ids of prompt and tokens with their log-probabilities is needed;"
        " if it is vLLM, SGLang, llama.cpp or TGI, say so as the block's engine"
    ),
)
