"""The vendor-neutral `openai` client drives the emulator and gets what it expects."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

IDENTITY = "run-000001-0badf00d"
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def fleet(start: Callable[..., Any], publisher: Any) -> Any:
    caller = start(replica_count=1)
    publisher.full(IDENTITY)
    caller.load(IDENTITY)
    return caller


@pytest.fixture
def client(fleet: Any) -> Iterator[openai.OpenAI]:
    headers = {"fireworks-deployment": fleet.config.deployment}
    with openai.OpenAI(
        base_url=f"{fleet.running.url}/inference/v1",
        api_key="a-key",
        default_headers=headers,
        max_retries=0,
    ) as made:
        yield made


def test_completions_and_chats_whole_and_streamed(fleet: Any, client: openai.OpenAI) -> None:
    model = fleet.config.model
    asked: dict[str, Any] = {"model": model, "max_tokens": 6, "temperature": 1.0, "seed": 7}
    asked["extra_body"] = {"ignore_eos": True, "raw_output": True, "perf_metrics_in_response": True}

    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, **asked)
    assert whole.object == "chat.completion"
    assert whole.model == f"{model}@{IDENTITY}"
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 6
    assert all(entry.logprob <= 0 for entry in choice.logprobs.content)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    assert whole.usage.prompt_tokens_details is not None

    chunks = list(
        client.chat.completions.create(messages=MESSAGES, logprobs=True, stream=True, **asked)
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {whole.model}
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content  # the seed is the same
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    ids = chunks[-1].choices[0].model_extra["raw_output"]["completion_token_ids"]
    assert len(ids) == 6

    plain = client.completions.create(prompt=[1, 2, 3], logprobs=2, **asked)
    assert plain.object == "text_completion"
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.token_logprobs is not None
    assert len(plain.choices[0].logprobs.token_logprobs) == 6
    pieces = list(client.completions.create(prompt=[1, 2, 3], logprobs=2, stream=True, **asked))
    assert "".join(piece.choices[0].text for piece in pieces) == plain.choices[0].text
    assert len(fleet.log()["requests"]) == 4


def test_refusals_become_the_clients_own_errors(fleet: Any, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "model": fleet.config.model, "max_tokens": 2}
    expected = {
        425: openai.APIStatusError,
        429: openai.RateLimitError,
        500: openai.InternalServerError,
    }
    for status, error in expected.items():
        fleet.fault("respond", operation="inference", status=status)
        with pytest.raises(error) as caught:
            client.chat.completions.create(**asked)
        assert isinstance(caught.value, openai.APIStatusError)
        assert caught.value.status_code == status
        fleet.clear_faults()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**asked, "model": "accounts/x/models/y"})
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(extra_body={"nonsense": 1}, **asked)
    assert "Extra inputs are not permitted" in refused.value.message
