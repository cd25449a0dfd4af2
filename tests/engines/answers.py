"""Answers of other servers, as their own classes write them (`make engines` holds them to those).

All are to the prompt 1, 2 and of the tokens 5, 6.
"""

from dataclasses import dataclass
from typing import Any

IDENTITY = "run-000003-0badf00d"
PROMPT, IDS, LOGPROBS, TEXT = (1, 2), (5, 6), (-0.5, -1.25), "ab"
SPAN = {"version": IDENTITY, "start": 0, "end": 2}
USAGE = {"prompt_tokens": 2, "total_tokens": 4, "completion_tokens": 2}


@dataclass(frozen=True)
class Recorded:
    """What a server says to one form of request: the chunks of a stream, or one whole answer."""

    engine: str
    form: str
    path: str
    chunks: list[dict[str, Any]]
    is_stream: bool = True
    names_weights: bool = True


def vllm_token(number: int, **extra: Any) -> dict[str, Any]:
    name, logprob = f"token_id:{IDS[number]}", LOGPROBS[number]
    logprobs = {
        "text_offset": [number],
        "token_logprobs": [logprob],
        "tokens": [name],
        "top_logprobs": [{}],
    }
    choice = {
        "index": 0,
        "text": TEXT[number],
        "logprobs": logprobs,
        "finish_reason": None,
        "stop_reason": None,
        "prompt_token_ids": None,
        "token_ids": [IDS[number]],
        "weight_versions": None,
        **extra,
    }
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m@1.5",
        "choices": [choice],
    }


def vllm_chat(choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": choices,
        **extra,
    }


def vllm_said(number: int, **extra: Any) -> dict[str, Any]:
    entry = {"token": f"token_id:{IDS[number]}", "logprob": LOGPROBS[number], "bytes": None}
    return {
        "index": 0,
        "delta": {"content": TEXT[number]},
        "logprobs": {"content": [{**entry, "top_logprobs": []}]},
        "finish_reason": None,
        "token_ids": [IDS[number]],
        **extra,
    }


def generated(number: int, **extra: Any) -> dict[str, Any]:
    entry = {"token": TEXT[number], "logprob": LOGPROBS[number], "bytes": [97 + number]}
    choice = {
        "index": 0,
        "finish_reason": None,
        "stop_reason": None,
        "token_ids": [IDS[number]],
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": None,
        "text": TEXT[number],
        "logprobs": {"content": [{**entry, "top_logprobs": []}]},
        **extra,
    }
    return {"request_id": "r", "usage": None, "output_mode": "text", "choices": [choice]}


def sglang_meta(**extra: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 2,
        "weight_version": IDENTITY,
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[-0.5, 5, None], [-1.25, 6, None]],
        "output_token_logprobs_length": 2,
        "reasoning_tokens": 0,
        "completion_tokens": 2,
        "cached_tokens": 1,
        "e2e_latency": 0.25,
        **extra,
    }


def sglang(meta: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    return {
        "text": TEXT,
        "output_ids": [*IDS],
        "meta_info": meta or sglang_meta(),
        "prompt_token_ids": [*PROMPT],
        **extra,
    }


def sglang_chat(**extra: Any) -> dict[str, Any]:
    content = [
        {"token": text, "bytes": [97], "logprob": logprob, "top_logprobs": []}
        for text, logprob in zip(TEXT, LOGPROBS, strict=True)
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": TEXT, "reasoning_content": None},
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "matched_stop": 2,
        "prompt_token_ids": [*PROMPT],
        "response_token_ids": [*IDS],
        **extra,
    }
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": {**USAGE, "prompt_tokens_details": None},
        "metadata": {"weight_version": IDENTITY},
    }


def llama_cpp(*numbers: int) -> dict[str, Any]:
    """An answer, of the tokens that it does not leave out."""
    entries = [llama_cpp_entry(number) for number in numbers]
    choice = {
        "text": TEXT,
        "index": 0,
        "logprobs": {"content": entries},
        "finish_reason": "stop",
    }
    return {
        "choices": [choice],
        "created": 1,
        "model": "dir/m@2.gguf",
        "object": "text_completion",
        "usage": USAGE,
        "id": "1",
    }


def llama_cpp_entry(number: int) -> dict[str, Any]:
    prob = (0.6065306597126334, 0.2865047968601901)[number]  # exp of the log-probabilities
    return {"id": IDS[number], "token": TEXT[number], "bytes": [97 + number], "prob": prob}


def tgi(**details: Any) -> dict[str, Any]:
    tokens = [
        {"id": token_id, "text": text, "logprob": logprob, "special": False}
        for token_id, text, logprob in zip(IDS, TEXT, LOGPROBS, strict=True)
    ]
    return {
        "generated_text": TEXT,
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 2,
            "seed": 1,
            "prefill": [
                {"id": 1, "text": "<s>", "logprob": None},
                {"id": 2, "text": "x", "logprob": -3.5},
            ],
            "tokens": tokens,
            **details,
        },
    }


def openai(**extra: Any) -> dict[str, Any]:
    """A plain server's, with the ids where llama.cpp and mlx put them."""
    entries = [
        {"id": token_id, "logprob": logprob}
        for token_id, logprob in zip(IDS, LOGPROBS, strict=True)
    ]
    choice = {
        "index": 0,
        "text": TEXT,
        "logprobs": {"content": entries},
        "finish_reason": "stop",
        **extra,
    }
    return {"id": "1", "model": "m", "choices": [choice], "usage": USAGE}


VLLM_LAST = {"id": "cmpl-1", "created": 1, "model": "m@1.5", "choices": [], "usage": USAGE}
VLLM_ENDS = {"finish_reason": "stop", "weight_versions": [SPAN]}
VLLM_STREAM = [
    vllm_token(0, prompt_token_ids=[*PROMPT]),
    vllm_token(1, **VLLM_ENDS),
    {**VLLM_LAST, "object": "text_completion"},
]
CHAT_STREAM = [
    vllm_chat(
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}],
        prompt_token_ids=[*PROMPT],
    ),
    vllm_chat([vllm_said(0)]),
    vllm_chat([vllm_said(1, **VLLM_ENDS)]),
    vllm_chat([], usage=USAGE),
]
GENERATE_STREAM = [
    generated(0),
    generated(1, **VLLM_ENDS),
    {"request_id": "r", "usage": USAGE, "output_mode": "text", "choices": []},
]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RECORDED = [
    Recorded("vllm", "ids", COMPLETIONS, VLLM_STREAM),
    Recorded("vllm", "text", COMPLETIONS, VLLM_STREAM),
    Recorded("vllm", "chat", CHAT, CHAT_STREAM),
    Recorded("vllm-generate", "ids", "/inference/v1/generate", GENERATE_STREAM),
    Recorded("vllm-generate", "text", COMPLETIONS, VLLM_STREAM),
    Recorded("vllm-generate", "chat", CHAT, CHAT_STREAM),
    Recorded("sglang", "ids", "/generate", [sglang()], is_stream=False),
    Recorded("sglang", "text", "/generate", [sglang()], is_stream=False),
    Recorded("sglang", "chat", CHAT, [sglang_chat()], is_stream=False),
    Recorded(
        "llama.cpp", "ids", COMPLETIONS, [llama_cpp(0, 1)], is_stream=False, names_weights=False
    ),
    Recorded("tgi", "text", "/generate", [tgi()], is_stream=False, names_weights=False),
    Recorded("openai", "ids", COMPLETIONS, [openai()], is_stream=False, names_weights=False),
]
