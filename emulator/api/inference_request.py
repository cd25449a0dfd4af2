"""The body of a completion or chat request, read strictly (protocol §11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from agent.failures import RefusedError
from emulator.api.request_fields import check_fields
from emulator.engine.engine import SamplingParameters
from emulator.engine.tokens import Tokens, UntokenizableError

DEFAULT_MAX_TOKENS = 2048
PROMPT_LIMIT = 128
SEED_LIMIT = 1 << 64
BIAS_LIMIT = 100
PENALTY_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One request. `logprobs` is "content", a count (the legacy form), or None."""

    is_chat: bool
    model: str
    prompts: list[list[int]]
    prompt_texts: list[str]
    n: int
    max_tokens: int
    sampling: SamplingParameters
    logprobs: str | int | None
    is_stream: bool
    wants_metrics: bool
    wants_raw: bool
    wants_ids: bool
    wants_routing: bool
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    echo_count: int | None
    prompt_cache_key: str

    @classmethod
    def parse(
        cls,
        body: Mapping[str, Any],
        tokens: Tokens,
        *,
        is_chat: bool,
        vocab_size: int,
        context_length: int,
    ) -> Self:
        """Parse the request in `body`, its prompt as token ids.

        Raises:
            RefusedError: 400, naming the field.
        """
        check_fields(body, is_chat=is_chat)
        texts: list[str] = []
        try:
            if is_chat:
                messages, tools = _messages(body.get("messages")), _tools(body.get("tools"))
                prompts = [tokens.chat(messages, tools)]
            else:
                prompts, texts = _prompts(body.get("prompt"), tokens)
        except UntokenizableError as error:
            raise RefusedError(400, str(error)) from None
        for prompt in prompts:
            if not prompt:
                raise RefusedError(400, "prompt: Input should have at least one token")
            if not all(0 <= token < vocab_size for token in prompt):
                raise RefusedError(400, f"prompt: token ids should be below {vocab_size}")
        echo_count = None
        if _flag(body, "echo") or body.get("echo_last") is not None:
            echo_count = _whole(body, "echo_last", 0, 1 << 31, default=1 << 31)
        logprobs, top = _logprobs(body)
        return cls(
            is_chat=is_chat,
            model=_text(body, "model"),
            prompts=prompts,
            prompt_texts=texts,
            n=_whole(body, "n", 1, 128, default=1),
            max_tokens=_max_tokens(
                body, prompts, context_length, may_be_zero=echo_count is not None
            ),
            sampling=SamplingParameters(
                temperature=_number(body, "temperature", 0.0, 2.0, tokens.defaults, 1.0),
                top_p=_number(body, "top_p", 0.0, 1.0, tokens.defaults, 1.0),
                top_k=int(_number(body, "top_k", 0, 100, tokens.defaults, 0, whole=True)),
                min_p=_number(body, "min_p", 0.0, 1.0, {}, 0.0),
                logit_bias=_logit_bias(body.get("logit_bias"), vocab_size),
                frequency_penalty=_penalty(body, "frequency_penalty"),
                presence_penalty=_penalty(body, "presence_penalty"),
                top_logprobs=top,
                seed=None
                if body.get("seed") is None
                else _whole(body, "seed", -SEED_LIMIT, SEED_LIMIT, default=0) % SEED_LIMIT,
            ),
            logprobs=logprobs,
            is_stream=_flag(body, "stream"),
            wants_metrics=_flag(body, "perf_metrics_in_response"),
            wants_raw=_flag(body, "raw_output"),
            wants_ids=_flag(body, "return_token_ids"),
            wants_routing=_routing(body, logprobs),
            stop=_stop(body.get("stop")),
            stop_ids=frozenset() if _flag(body, "ignore_eos") else tokens.stop_ids,
            echo_count=echo_count,
            prompt_cache_key=body.get("prompt_cache_key") or "",
        )


def _prompts(prompt: object, tokens: Tokens) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and its text where text came."""
    if isinstance(prompt, str):
        return [tokens.encode(prompt)], [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RefusedError(400, "prompt: Input should be text, token ids, or a list of either")
    if _are_ids(prompt):
        return [prompt], []
    if len(prompt) > PROMPT_LIMIT:
        raise RefusedError(400, f"prompt: at most {PROMPT_LIMIT} prompts")
    if all(isinstance(part, str) for part in prompt):
        return [tokens.encode(part) for part in prompt], prompt
    if all(isinstance(part, list) and _are_ids(part) for part in prompt):
        return prompt, []
    raise RefusedError(400, "prompt: Input should be text, token ids, or a list of either")


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "messages: Input should be a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError(400, "messages: each should be an object with a role")
        content = message.get("content")
        if isinstance(content, list):  # parts, as multimodal clients send them
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
                raise RefusedError(400, "messages: content should be text")
            message["content"] = "".join(map(str, parts))
        elif content is not None and not isinstance(content, str):
            raise RefusedError(400, "messages: content should be text")
    return messages


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """Tools for the chat template; like a template of Hugging Face, None where there are none."""
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RefusedError(400, "tools: Input should be a list of objects")
    return tools


def _logit_bias(biases: object, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if biases is None:
        return ()
    if not isinstance(biases, dict):
        raise RefusedError(400, "logit_bias: Input should be an object")
    for token, bias in biases.items():
        is_number = token.isascii() and token.isdigit() and len(token) < 10
        if not (is_number and int(token) < vocab_size):
            raise RefusedError(400, f"logit_bias: token ids should be below {vocab_size}")
        if type(bias) not in (int, float) or not -BIAS_LIMIT <= bias <= BIAS_LIMIT:
            reason = f"logit_bias: Input should be numbers from {-BIAS_LIMIT} to {BIAS_LIMIT}"
            raise RefusedError(400, reason)
    return tuple((int(token), float(bias)) for token, bias in biases.items())


def _penalty(body: Mapping[str, Any], name: str) -> float:
    return _number(body, name, -PENALTY_LIMIT, PENALTY_LIMIT, {}, 0.0)


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _max_tokens(
    body: Mapping[str, Any], prompts: list[list[int]], context_length: int, *, may_be_zero: bool
) -> int:
    name = "max_tokens" if body.get("max_tokens") is not None else "max_completion_tokens"
    lowest = 0 if may_be_zero else 1
    wanted = _whole(body, name, lowest, 1 << 31, default=DEFAULT_MAX_TOKENS)
    behavior = body.get("context_length_exceeded_behavior", "truncate")
    if behavior not in ("truncate", "error"):
        reason = "context_length_exceeded_behavior: Input should be 'truncate' or 'error'"
        raise RefusedError(400, reason)
    longest = max(map(len, prompts))
    room = context_length - longest
    is_explicit = body.get(name) is not None
    if room < lowest or (behavior == "error" and is_explicit and wanted > room):
        reason = f"prompt of {longest} tokens and max_tokens {wanted} exceed the context of"
        raise RefusedError(400, f"{reason} {context_length}", "context_length_exceeded")
    return min(wanted, room)


def _logprobs(body: Mapping[str, Any]) -> tuple[str | int | None, int]:
    """The form of log-probabilities asked for, and how many alternatives per token."""
    value = body.get("logprobs")
    top = _whole(body, "top_logprobs", 0, 5, default=0)
    if value is None or value is False:
        if top:
            raise RefusedError(400, "top_logprobs: needs logprobs")
        return None, 0
    if value is True:
        return "content", top
    if type(value) is int and 0 <= value <= 5:
        return value, max(value, top)
    raise RefusedError(400, "logprobs: Input should be true or an integer from 0 to 5")


def _routing(body: Mapping[str, Any], logprobs: object) -> bool:
    wanted = _flag(body, "include_routing_matrix")
    if wanted and logprobs != "content":
        raise RefusedError(400, "include_routing_matrix: needs logprobs: true")
    return wanted


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > 4:
        raise RefusedError(400, "stop: Input should be text or a list of at most 4")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise RefusedError(400, "stop: Input should be non-empty text")
    return tuple(stops)


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise RefusedError(400, f"{name}: Input should be a string")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise RefusedError(400, f"{name}: Input should be true or false")
    return value


def _whole(body: Mapping[str, Any], name: str, lowest: int, highest: int, *, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not lowest <= value <= highest:
        raise RefusedError(400, f"{name}: Input should be an integer from {lowest} to {highest}")
    return value


def _number(
    body: Mapping[str, Any],
    name: str,
    lowest: float,
    highest: float,
    defaults: Mapping[str, Any],
    neutral: float,
    *,
    whole: bool = False,
) -> float:
    """A number; omitted, the one of the model's generation_config (protocol §11)."""
    value = body.get(name)
    if value is None:
        value = defaults.get(name)
        return float(value) if isinstance(value, (int, float)) else float(neutral)
    allowed = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not lowest <= value <= highest:
        kind = "an integer" if whole else "a number"
        raise RefusedError(400, f"{name}: Input should be {kind} from {lowest} to {highest}")
    return float(value)
