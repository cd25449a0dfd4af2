"""What the vendor's SDK and typed client (`fireworks-ai` 1.2.30) send, and how they read answers.

`make strangers` runs the clients themselves; here is their wire form by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from emulator.engine.decoding import log_softmax
from emulator.engine.weights import load_llama
from tests.waiting import PATIENCE_SECONDS

Start = Callable[..., Any]
Caller = Any
ACCOUNT = "/v1/accounts/local"
CONTROL = [
    "/v1/accounts?pageSize=2",
    ACCOUNT,
    f"{ACCOUNT}/deployments",
    f"{ACCOUNT}/deployments/rollouts",
    f"{ACCOUNT}/deployments/rollouts/ledger",
    f"{ACCOUNT}/models",
    f"{ACCOUNT}/models/policy",
]
REFUSED = "Extra inputs are not permitted, field: '{}'"


def ask(caller: Caller, path: str, headers: dict[str, str]) -> httpx.Response:
    """A GET with these headers and no others of the caller's."""
    url = f"{caller.running.url}{path}"
    return httpx.get(url, headers=headers, timeout=PATIENCE_SECONDS)


def message(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "INVALID_ARGUMENT"
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("path", CONTROL)
def test_the_control_plane_takes_either_header(keyed: Caller, path: str) -> None:
    assert ask(keyed, path, {"X-Api-Key": "right"}).status_code == 200
    assert ask(keyed, path, {"Authorization": "Bearer right"}).status_code == 200
    for headers in (
        {},
        {"X-Api-Key": ""},
        {"X-Api-Key": "wrong"},
        {"X-Api-Key": "right", "Authorization": "Bearer wrong"},
        {"X-Api-Key": "wrong", "Authorization": "Bearer right"},
    ):
        expected = 200 if headers.get("Authorization") == "Bearer right" else 401
        answer = ask(keyed, path, headers)
        assert answer.status_code == expected
        assert "right" not in answer.text or expected == 200


def test_the_gateway_takes_a_bearer_alone(keyed: Caller) -> None:
    names = {"fireworks-model": keyed.config.model, "fireworks-deployment": keyed.config.deployment}
    path = "/hot_load/v1/models/hot_load"
    assert ask(keyed, path, {"X-Api-Key": "right", **names}).status_code == 401
    assert ask(keyed, path, {"Authorization": "Bearer right", **names}).status_code == 200


@pytest.mark.parametrize("engine", ["numpy", "stub"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_echoed_tokens_are_in_the_raw_output_and_each_has_a_number(
    start: Start, read_events: Any, engine: str, is_stream: bool
) -> None:
    caller = start(replica_count=1, engine=engine)
    prompt = [7, 8, 9]
    asked = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "seed": 0, "stream": is_stream}
    asked |= {"logprobs": True, "top_logprobs": 1, "raw_output": True}
    for fields, echoed in (({"echo": True}, prompt), ({"echo_last": 2}, [8, 9]), ({}, [])):
        answer = caller.complete(**asked, **fields)
        chunks = read_events(answer) if is_stream else [answer.json()]
        content = [
            entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]
        ]
        raw = chunks[-1]["choices"][0]["raw_output"]
        ids = [entry["token_id"] for entry in content]
        assert ids[: len(echoed)] == echoed
        assert raw["completion_token_ids"] == ids
        assert raw["prompt_token_ids"] == prompt
        assert raw["completion_logprobs"]["content"] == content
        assert raw["completion"] == "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert all(isinstance(entry["logprob"], float) for entry in content)
        assert all(entry["top_logprobs"] for entry in content)
        sampled = [entry["sampling_logprob"] for entry in content]
        assert sampled[: len(echoed)] == [None] * len(echoed)
        assert None not in sampled[len(echoed) :]
        assert chunks[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "field", ["routing_matrix_format", "top_sampling_logprobs", "top_sampling_format",
              "sampling_mask", "surprise"],
)  # fmt: skip
def test_an_unknown_field_is_refused_by_the_vendors_sentence(caller: Caller, field: str) -> None:
    assert message(caller.complete(**{field: "parquet_v1"})) == REFUSED.format(field)
    assert message(caller.chat(**{field: "parquet_v1"})) == REFUSED.format(field)


def test_a_signals_unknown_field_too(caller: Caller) -> None:
    assert message(caller.signal("a", more=1)) == REFUSED.format("more")
    answer = caller.signal("a", validation={"x": 1})
    assert message(answer) == REFUSED.format("validation.x")


NEUTRAL: list[dict[str, Any]] = [
    {"frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0},
    {"min_p": 0, "typical_p": 1, "logit_bias": {}},
    {"mirostat_target": None, "mirostat_lr": None},
    {"response_format": {"type": "text"}, "service_tier": "auto", "metadata": {"step": "4"}},
    {"reasoning_effort": "none", "reasoning_history": None, "thinking": {"type": "disabled"}},
    {"reasoning_effort": False, "thinking": None, "user": "u", "prompt_cache_key": "k"},
    {"prediction": "abc", "speculation": [1, 2, 3]},
    {"prediction": {"type": "content", "content": "abc"}, "speculation": "abc"},
]
NEUTRAL_IN_CHATS: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tools": None, "tool_choice": "none", "functions": [], "function_call": "none"},
    {"prompt_truncate_len": None, "safe_tokenization": False},
]
UNSERVED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.1},
    {"typical_p": 0.9},
    {"mirostat_target": 3.0},
    {"mirostat_lr": 0.1},
    {"response_format": {"type": "json_object"}},
    {"reasoning_effort": "low"},
    {"reasoning_effort": True},
    {"reasoning_effort": 100},
    {"reasoning_history": "preserved"},
    {"thinking": {"type": "enabled"}},
]
UNSERVED_IN_CHATS: list[dict[str, Any]] = [
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"functions": [{"name": "f"}]},
    {"function_call": {"name": "f"}},
    {"prompt_truncate_len": 10},
    {"safe_tokenization": True},
]
ODD: list[dict[str, Any]] = [
    {"frequency_penalty": 2.1},
    {"presence_penalty": "x"},
    {"min_p": 1.1},
    {"min_p": True},
    {"logit_bias": []},
    {"logit_bias": {"a": 1}},
    {"logit_bias": {"261": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"9" * 5000: 1}},
    {"logit_bias": {"1": 101}},
    {"logit_bias": {"1": None}},
    {"metadata": "x"},
    {"user": 3},
    {"service_tier": 3},
    {"prompt_cache_key": ["k"]},
    {"typical_p": True},
]


@pytest.mark.parametrize("fields", NEUTRAL)
def test_neutral_values_are_taken_and_change_nothing(
    caller: Caller, fields: dict[str, Any]
) -> None:
    asked = {"seed": 3, "ignore_eos": True, "return_token_ids": True}
    plain = caller.complete(**asked).json()["choices"][0]["token_ids"]
    assert caller.complete(**asked, **fields).json()["choices"][0]["token_ids"] == plain
    assert caller.chat(**fields).status_code == 200


@pytest.mark.parametrize("fields", NEUTRAL_IN_CHATS)
def test_neutral_values_of_chats(caller: Caller, fields: dict[str, Any]) -> None:
    assert caller.chat(**fields).status_code == 200
    assert "field: '" in message(caller.complete(**fields))


@pytest.mark.parametrize("fields", UNSERVED)
def test_what_the_engine_cannot_serve_is_refused_by_name(
    caller: Caller, fields: dict[str, Any]
) -> None:
    (field,) = fields
    assert message(caller.complete(**fields)) == REFUSED.format(field)
    assert message(caller.chat(**fields)) == REFUSED.format(field)


def test_images_are_of_completions(caller: Caller) -> None:
    assert caller.complete(images=[]).status_code == 200
    assert message(caller.complete(images=["data:,"])) == REFUSED.format("images")
    assert message(caller.chat(images=[])) == REFUSED.format("images")


@pytest.mark.parametrize("fields", UNSERVED_IN_CHATS)
def test_what_it_cannot_serve_of_chats(caller: Caller, fields: dict[str, Any]) -> None:
    (field,) = fields
    assert message(caller.chat(**fields)) == REFUSED.format(field)


@pytest.mark.parametrize("fields", ODD)
def test_odd_values_are_400_by_name(caller: Caller, fields: dict[str, Any]) -> None:
    (field,) = fields
    assert field in message(caller.complete(**fields))


def test_tools_reach_the_chat_template(start: Start, publisher: Any) -> None:
    template = '{"chat_template": "{% for t in tools %}[{{ t.function.name }}]{% endfor %}x"}'
    (publisher.base / "tokenizer_config.json").write_text(template)
    caller = start(replica_count=1)
    tools = [{"type": "function", "function": {"name": "add"}}]
    choice = caller.chat(tools=tools, raw_output=True).json()["choices"][0]
    assert choice["raw_output"]["prompt_fragments"] == ["[add]x"]
    for odd in ("add", ["add"], [1]):
        assert "tools" in message(caller.chat(tools=odd))


def expected_logprob(
    raw: np.ndarray, answer: list[int], fields: dict[str, Any], temperature: float
) -> np.ndarray:
    """Log-probabilities really sampled from after the tokens of `answer`, written out."""
    shifted = raw.copy()
    for token, bias in fields.get("logit_bias", {}).items():
        shifted[int(token)] += bias
    for token, count in Counter(answer).items():
        shifted[token] -= fields.get("presence_penalty", 0)
        shifted[token] -= count * fields.get("frequency_penalty", 0)
    scaled = log_softmax(shifted / temperature)
    low = np.exp(scaled) < fields.get("min_p", 0) * np.exp(scaled.max())
    return log_softmax(np.where(low, -np.inf, scaled))


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 0.3},
        {"logit_bias": {"65": 3.5, "66": -100}},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -2.0},
        {"frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"65": 2}, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_filters_and_penalties_are_served_and_seen_in_the_sampling_logprob(
    start: Start, publisher: Any, fields: dict[str, Any], temperature: float
) -> None:
    caller = start(replica_count=1)
    prompt = [4, 8, 15]
    answer = caller.complete(
        prompt=prompt, max_tokens=24, logprobs=True, seed=0, ignore_eos=True,
        temperature=temperature, top_p=1, top_k=0, **fields,
    )  # fmt: skip
    content = answer.json()["choices"][0]["logprobs"]["content"]
    weights = load_llama(publisher.base)
    ids = [entry["token_id"] for entry in content]
    logits = weights.forward(prompt + ids, weights.empty_cache(), all_positions=True)[2:-1]
    for at, (entry, row) in enumerate(zip(content, logits.astype(np.float64), strict=True)):
        raw = log_softmax(row)
        want = expected_logprob(raw, ids[:at], fields, temperature)
        assert entry["logprob"] == pytest.approx(raw[ids[at]], abs=1e-5)
        assert entry["sampling_logprob"] == pytest.approx(want[ids[at]], abs=1e-5)


def test_a_bias_decides_a_greedy_answer(caller: Caller) -> None:
    asked = {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
    choice = caller.complete(**asked, logit_bias={"70": 100}).json()["choices"][0]
    assert choice["token_ids"] == [70, 70, 70]


def test_a_prompt_cache_key_keeps_one_replica(start: Start) -> None:
    caller = start(replica_count=2)
    for _ in range(4):
        assert caller.complete(prompt_cache_key="k").status_code == 200
    requests = caller.log()["requests"]
    assert len({request["replica"] for request in requests}) == 1
    assert {request["session"] for request in requests} == {"k"}
    caller.complete(prompt_cache_key="k", headers={"x-session-affinity": "s"})
    assert caller.log()["requests"][-1]["session"] == "s"


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_inference_without_its_prefix(caller: Caller, read_events: Any, kind: str) -> None:
    given: dict[str, Any] = {"model": caller.config.deployment, "max_tokens": 3, "seed": 1}
    if kind == "completions":
        given["prompt"] = "ab"
    else:
        given["messages"] = [{"role": "user", "content": "ab"}]
    long, short = (
        caller.http.post(f"{prefix}/v1/{kind}", json=given) for prefix in ("/inference", "")
    )
    assert short.status_code == 200
    assert short.json()["choices"] == long.json()["choices"]
    assert short.json()["object"] == long.json()["object"]
    streamed = caller.http.post(f"/v1/{kind}", json=given | {"stream": True})
    assert read_events(streamed)[0]["object"].startswith(
        "chat" if kind != "completions" else "text"
    )
    refused = caller.http.post(f"/v1/{kind}", json=given | {"surprise": 1})
    assert message(refused) == REFUSED.format("surprise")


def test_read_only_lists(caller: Caller) -> None:
    def read(path: str) -> Any:
        answer = caller.http.get(path)
        assert answer.status_code == 200
        return answer.json()

    deployments = read(f"{ACCOUNT}/deployments")
    assert deployments["deployments"] == [read(f"{ACCOUNT}/deployments/rollouts")]
    assert (deployments["nextPageToken"], deployments["totalSize"]) == ("", 1)
    accounts = read("/v1/accounts")
    assert accounts["accounts"] == [read(ACCOUNT)]
    assert accounts["accounts"][0]["name"] == "accounts/local"
    models = read(f"{ACCOUNT}/models")
    assert models["models"] == [read(f"{ACCOUNT}/models/policy")]
    assert models["models"][0]["name"] == caller.config.model
    assert models["models"][0]["contextLength"] == 128
    for path in ("/v1/models", "/inference/v1/models"):
        listed = read(path)
        assert listed["object"] == "list"
        assert [entry["id"] for entry in listed["data"]] == [
            caller.config.model,
            caller.config.deployment,
        ]
    for path in ("/v1/accounts/other", "/v1/accounts/other/deployments",
                 "/v1/accounts/other/models", f"{ACCOUNT}/models/other"):  # fmt: skip
        assert caller.http.get(path).status_code == 404
        assert caller.http.get(path).json().keys() == {"code", "message", "details"}
