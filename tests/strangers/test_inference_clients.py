"""The vendor's typed client and `openai` ask the emulator for completions, chats and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fireworks import APIStatusError, Fireworks

from tests.strangers.door import KEY, Door

MESSAGES: Any = [{"role": "user", "content": "2 + 2?"}]
IDS = list(b"What is 2 + 2?")
# As an environment library sends them: every field of the typed client that trains nothing.
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "metadata": {"step": "1"},
    "min_p": 0.0,
    "mirostat_lr": None,
    "mirostat_target": None,
    "prediction": None,
    "reasoning_effort": "none",
    "reasoning_history": None,
    "response_format": {"type": "text"},
    "service_tier": "default",
    "speculation": None,
    "typical_p": 1.0,
    "user": "trainer",
    "context_length_exceeded_behavior": "error",
    "prompt_cache_key": "k",
    "prompt_cache_isolation_key": "i",
    "perf_metrics_in_response": True,
    "raw_output": True,
    "return_token_ids": True,
    "ignore_eos": True,
}
NEUTRAL_IN_CHATS: dict[str, Any] = {
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "prompt_truncate_len": None,
    "safe_tokenization": False,
}
# What neither serves, and the field its refusal must name.
UNSERVED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.2},
    {"response_format": {"type": "json_object"}},
    {"reasoning_effort": "high"},
    {"extra_body": {"routing_matrix_format": "parquet_v1"}},
]


@pytest.fixture
def service(open_door: Callable[..., Door]) -> Door:
    return open_door("ASYNC", "--replicas", "1")


@pytest.fixture
def typed(service: Door) -> Iterator[Fireworks]:
    """As with FIREWORKS_BASE_URL set: no `/inference` in its paths."""
    with Fireworks(api_key=KEY, account_id="local", base_url=service.url, max_retries=0) as client:
        yield client


@pytest.fixture(params=["/inference/v1", "/v1"])
def neutral_client(request: pytest.FixtureRequest, service: Door) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=service.url + request.param, max_retries=0) as client:
        yield client


def test_the_typed_client_completes_and_chats(service: Door, typed: Fireworks) -> None:
    asked: dict[str, Any] = {"model": service.deployment, "max_tokens": 5, "seed": 1, **NEUTRAL}
    whole = typed.completions.create(prompt=IDS, logprobs=True, images=[], **asked)
    (choice,) = whole.choices
    assert choice.raw_output.completion_token_ids == choice.token_ids
    assert len(choice.token_ids) == 5
    pieces = list(typed.completions.create(prompt=IDS, logprobs=True, stream=True, **asked))
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text
    assert pieces[-1].usage.completion_tokens == 5

    chat = typed.chat.completions.create(messages=MESSAGES, **asked, **NEUTRAL_IN_CHATS)
    assert chat.choices[0].message.role == "assistant"
    chunks = list(
        typed.chat.completions.create(messages=MESSAGES, stream=True, **asked, **NEUTRAL_IN_CHATS)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == chat.choices[0].message.content

    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    plain = typed.chat.completions.create(
        messages=MESSAGES, tools=tools, model=service.deployment, max_tokens=2
    )
    assert plain.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("fields", UNSERVED)
def test_the_typed_client_is_refused_by_name(
    service: Door, typed: Fireworks, fields: dict[str, Any]
) -> None:
    (name,) = fields.get("extra_body", fields)
    with pytest.raises(APIStatusError) as caught:
        typed.completions.create(model=service.deployment, prompt=IDS, max_tokens=1, **fields)
    assert caught.value.status_code == 400
    assert f"Extra inputs are not permitted, field: '{name}'" in str(caught.value)


def test_the_typed_client_reads_lists(service: Door, typed: Fireworks) -> None:
    (account,) = typed.accounts.list()
    assert account.name == typed.accounts.get(account_id="local").name == "accounts/local"
    (deployment,) = typed.deployments.list()
    assert deployment == typed.deployments.get("rollouts")
    assert (deployment.name, deployment.state) == (service.deployment, "READY")
    (model,) = typed.models.list()
    assert model == typed.models.get("policy")
    assert model.name == service.model
    with pytest.raises(APIStatusError) as caught:
        typed.deployments.get("other")
    assert caught.value.status_code == 404


def test_openai_completes_chats_and_lists(service: Door, neutral_client: openai.OpenAI) -> None:
    client, model = neutral_client, service.deployment
    assert [entry.id for entry in client.models.list()] == [service.model, service.deployment]
    asked: dict[str, Any] = {"model": model, "max_tokens": 5, "seed": 1, "temperature": 1.0}
    asked |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {}, "user": "u"}
    chatting: dict[str, Any] = {
        **asked,
        "messages": MESSAGES,
        "logprobs": True,
        "top_logprobs": 2,
        "metadata": {"step": "1"},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "extra_body": {"ignore_eos": True, "raw_output": True, "return_token_ids": True},
    }
    chat = client.chat.completions.create(**chatting)
    (choice,) = chat.choices
    assert len(choice.logprobs.content) == len(choice.model_extra["token_ids"]) == 5
    chunks = list(client.chat.completions.create(stream=True, **chatting))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert chunks[-1].usage.completion_tokens == 5

    extra: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
    text = client.completions.create(prompt="2 + 2", n=2, logprobs=2, echo=True, **asked, **extra)
    assert len(text.choices) == 2
    assert all(choice.text.startswith("2 + 2") for choice in text.choices)
    assert None not in text.choices[0].logprobs.token_logprobs
    pieces = client.completions.create(prompt=IDS, stream=True, **asked, **extra)
    ids = client.completions.create(prompt=IDS, **asked, **extra)
    assert "".join(piece.choices[0].text for piece in pieces) == ids.choices[0].text
    raw = client.completions.with_raw_response.create(prompt=IDS, **asked)
    assert raw.headers["fireworks-prompt-tokens"] == str(len(IDS))

    biased = client.completions.create(
        prompt=IDS, **{**asked, "temperature": 0, "logit_bias": {"70": 100}},
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert biased.choices[0].model_extra["token_ids"] == [70] * 5


ERRORS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
    **dict.fromkeys((402, 408, 413, 425), openai.APIStatusError),
}


def test_openai_makes_its_own_errors_of_refusals(
    service: Door, neutral_client: openai.OpenAI
) -> None:
    client = neutral_client
    asked: dict[str, Any] = {"model": service.deployment, "messages": MESSAGES, "max_tokens": 2}
    for status, kind in ERRORS.items():
        service.fault("respond", operation="inference", status=status, count=1)
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**asked)
        assert caught.value.status_code == status
    with pytest.raises(openai.BadRequestError, match="field: 'surprise'") as refused:
        client.chat.completions.create(extra_body={"surprise": 1}, **asked)
    assert (refused.value.code, refused.value.type) == (
        "INVALID_ARGUMENT",
        "invalid_request_error",
    )
    service.fault("respond", operation="inference", status=429, retry_after=0.01, count=1)
    assert client.with_options(max_retries=2).chat.completions.create(**asked).choices
    for fault in ({}, {"as_event": True}):
        service.fault("stream_error", count=1, **fault)
        with pytest.raises(openai.APIError):
            list(client.chat.completions.create(stream=True, **asked))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
