"""Requests and answers of completions and chat (protocol §11, §12)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from emulator.engine.decoding import log_softmax
from emulator.engine.weights import load_llama

FIXTURES = Path(__file__).parent / "fixtures"
Start = Callable[..., Any]
Events = Callable[[httpx.Response], list[dict[str, Any]]]


def test_a_plain_completion_has_every_documented_part(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    publisher.full("a")
    caller.load("a")
    answer = caller.complete(
        prompt=[1, 2, 3],
        max_tokens=6,
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        raw_output=True,
        return_token_ids=True,
        perf_metrics_in_response=True,
        seed=3,
        headers={"X-Request-Id": "mine"},
    )
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
    body = answer.json()
    assert body["model"] == f"{caller.config.model}@a"
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    content = choice["logprobs"]["content"]
    ids = [entry["token_id"] for entry in content]
    assert len(ids) == 6
    assert choice["finish_reason"] == "length"
    assert choice["token_ids"] == ids
    assert choice["prompt_token_ids"] == [1, 2, 3]
    raw = choice["raw_output"]
    assert raw["prompt_token_ids"] == [1, 2, 3]
    assert raw["completion_token_ids"] == ids
    assert raw["completion"] == choice["text"]
    assert raw["completion_logprobs"]["content"] == content
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    for entry in content:
        assert entry["logprob"] == entry["sampling_logprob"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"] - 1e-9
    assert body["perf_metrics"]["backend-host"] == "replica-0"
    assert float(answer.headers["fireworks-server-processing-time"]) > 0
    assert answer.headers["fireworks-prompt-tokens"] == "3"


def test_a_stream_says_the_same_as_a_plain_answer(caller: Any, read_events: Events) -> None:
    ask = {
        "prompt": "hello",
        "max_tokens": 30,
        "logprobs": True,
        "raw_output": True,
        "return_token_ids": True,
        "seed": 11,
        "n": 2,
    }
    plain = caller.complete(**ask).json()
    streamed = caller.complete(**ask, stream=True, perf_metrics_in_response=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    chunks = read_events(streamed)
    for index in range(2):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        expected = plain["choices"][index]
        assert "".join(part["text"] for part in parts) == expected["text"]
        content = [e for part in parts for e in part["logprobs"]["content"]]
        assert content == [
            {
                **e,
                "logprob": pytest.approx(e["logprob"]),
                "sampling_logprob": pytest.approx(e["sampling_logprob"]),
            }
            for e in expected["logprobs"]["content"]
        ]
        assert [i for part in parts for i in part["token_ids"]] == expected["token_ids"]
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        raw = parts[-1]["raw_output"]
        assert raw["completion_token_ids"] == expected["token_ids"]
    assert plain["choices"][0]["token_ids"] != plain["choices"][1]["token_ids"]
    usages = [chunk["usage"] for chunk in chunks if "usage" in chunk]
    assert [usage["completion_tokens"] for usage in usages] == [plain["usage"]["completion_tokens"]]
    assert "prefill-queue-duration" in chunks[-1]["perf_metrics"]


def test_seeds_decide_and_other_weights_answer_otherwise(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)

    def ids(seed: int) -> list[int]:
        answer = caller.complete(max_tokens=16, seed=seed, return_token_ids=True, ignore_eos=True)
        return answer.json()["choices"][0]["token_ids"]

    first = ids(1)
    assert ids(1) == first
    assert ids(2) != first
    publisher.full("a")
    caller.load("a")
    assert ids(1) != first


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1, "top_p": 1, "top_k": 0}, None),
        ({"temperature": 0.5, "top_p": 1, "top_k": 0}, "tempered"),
        ({"temperature": 1, "top_p": 1, "top_k": 3}, "top_k"),
        ({"temperature": 1, "top_p": 0.4, "top_k": 0}, "top_p"),
        ({"temperature": 0, "top_p": 1, "top_k": 0}, "greedy"),
    ],
)
def test_logprob_is_raw_and_sampling_logprob_that_of_the_real_distribution(
    start: Start, publisher: Any, sampling: dict[str, Any], expected: str | None
) -> None:
    caller = start(replica_count=1)
    prompt = [4, 8, 15]
    answer = caller.complete(
        prompt=prompt, max_tokens=5, logprobs=True, seed=0, ignore_eos=True, **sampling
    )
    content = answer.json()["choices"][0]["logprobs"]["content"]
    weights = load_llama(publisher.base)
    ids = prompt + [entry["token_id"] for entry in content]
    logits = weights.forward(ids, weights.empty_cache(), all_positions=True)[2:-1]
    for entry, row in zip(content, logits.astype(np.float64), strict=True):
        raw, token = log_softmax(row), entry["token_id"]
        assert entry["logprob"] == pytest.approx(raw[token], abs=1e-5)
        order = np.argsort(-raw)
        if expected == "tempered":
            want = log_softmax(row / 0.5)[token]
        elif expected == "top_k":
            want = raw[token] - np.log(np.exp(raw[order[:3]]).sum())
            assert token in order[:3]
        elif expected == "top_p":
            mass = np.cumsum(np.exp(raw[order]))
            kept = order[: int((mass < 0.4).sum()) + 1]
            assert token in kept
            want = raw[token] - np.log(np.exp(raw[kept]).sum())
        elif expected == "greedy":
            assert token == order[0]
            want = 0.0
        else:
            want = raw[token]
        assert entry["sampling_logprob"] == pytest.approx(want, abs=1e-5)


def test_samples_follow_the_distribution_they_claim(caller: Any) -> None:
    answer = caller.complete(
        n=128, max_tokens=1, temperature=0.3, seed=1, logprobs=True, ignore_eos=True
    )
    drawn = [choice["logprobs"]["content"][0] for choice in answer.json()["choices"]]
    best = max(drawn, key=lambda entry: entry["sampling_logprob"])
    share = sum(entry["token_id"] == best["token_id"] for entry in drawn) / 128
    probability = np.exp(best["sampling_logprob"])
    assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / 128) + 0.01


def test_echo_returns_the_prompt_with_logprobs(caller: Any) -> None:
    ask = {"prompt": "abc", "logprobs": True, "max_tokens": 2, "ignore_eos": True, "seed": 0}
    whole = caller.complete(echo=True, **ask).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert len(content) == 5
    assert (content[0]["logprob"], content[0]["sampling_logprob"]) == (0.0, None)
    assert all(entry["logprob"] < 0 for entry in content[1:])
    assert whole["text"].startswith("abc")
    last = caller.complete(echo_last=1, **ask).json()["choices"][0]
    assert [e["token_id"] for e in last["logprobs"]["content"]] == [
        e["token_id"] for e in content[2:]
    ]
    assert last["text"].startswith("c")
    assert caller.complete(prompt=[1], max_tokens=0).status_code == 400


def test_legacy_logprobs(caller: Any) -> None:
    choice = caller.complete(logprobs=2, max_tokens=3, ignore_eos=True).json()["choices"][0]
    legacy = choice["logprobs"]
    assert {len(legacy[name]) for name in ("tokens", "token_ids", "token_logprobs")} == {3}
    assert all(len(top) <= 2 for top in legacy["top_logprobs"])
    assert legacy["text_offset"][0] == 0


def test_chat_uses_the_template(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    answer = caller.chat(raw_output=True, logprobs=True, seed=1)
    body = answer.json()
    assert (answer.status_code, body["object"]) == (200, "chat.completion")
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["raw_output"]["prompt_fragments"] == ["<s><user>hi"]
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    split = caller.chat(messages=[{"role": "user", "content": parts}], raw_output=True, seed=1)
    assert split.json()["choices"][0]["raw_output"] == choice["raw_output"] | {
        "completion_logprobs": None
    }
    deployment = caller.chat(model=caller.config.deployment)
    assert deployment.status_code == 200


def test_chat_streams(caller: Any, read_events: Events) -> None:
    chunks = read_events(caller.chat(stream=True, max_tokens=10, ignore_eos=True, seed=2))
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    plain = caller.chat(max_tokens=10, ignore_eos=True, seed=2).json()
    assert text == plain["choices"][0]["message"]["content"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_texts_end_an_answer_and_are_not_returned(
    caller: Any, read_events: Events, is_stream: bool
) -> None:
    ask = {"prompt": "x", "max_tokens": 40, "seed": 5, "ignore_eos": True, "temperature": 1}
    full = caller.complete(**ask).json()["choices"][0]["text"]
    stop = next(full[i : i + 2] for i in range(8, 30) if full[i : i + 2].isprintable())
    answer = caller.complete(**ask, stop=[stop, "never there"], stream=is_stream)
    if is_stream:
        chunks = read_events(answer)
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (full[: full.index(stop)], "stop")


@pytest.mark.parametrize("is_stream", [False, True])
def test_text_that_may_begin_a_stop_text_keeps_its_place(
    caller: Any, read_events: Events, is_stream: bool
) -> None:
    ask = {"prompt": "x", "max_tokens": 40, "seed": 5, "ignore_eos": True, "temperature": 1}
    full = caller.complete(**ask).json()["choices"][0]["text"]
    stops = [f"{full[at]}never there" for at in (2, 9, 17, 25)]
    answer = caller.complete(**ask, stop=stops, stream=is_stream, logprobs=True)
    chunks = read_events(answer) if is_stream else [answer.json()]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == full
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    offsets = [entry["text_offset"] for entry in entries]
    assert offsets == sorted(offsets)


def test_the_stop_id_ends_an_answer_and_counts_as_a_token(start: Start, publisher: Any) -> None:
    config = json.loads((publisher.base / "config.json").read_text())
    caller = start(replica_count=1)
    ask = {"max_tokens": 20, "seed": 9, "return_token_ids": True}
    ids = caller.complete(**ask, ignore_eos=True).json()["choices"][0]["token_ids"]
    at = next(i for i in range(3, 20) if ids[i] not in ids[:i])
    (publisher.base / "config.json").write_text(json.dumps(config | {"eos_token_id": [ids[at]]}))
    caller = start(replica_count=1)
    choice = caller.complete(**ask).json()["choices"][0]
    assert (choice["finish_reason"], choice["token_ids"]) == ("stop", ids[: at + 1])
    choice = caller.complete(**ask, ignore_eos=True).json()["choices"][0]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 20)


def test_omitted_sampling_takes_the_generation_config(start: Start, publisher: Any) -> None:
    (publisher.base / "generation_config.json").write_text('{"top_k": 1, "temperature": 0.7}')
    caller = start(replica_count=1)
    body = {"model": caller.config.model, "prompt": [1], "max_tokens": 2, "logprobs": True}
    answer = caller.http.post("/inference/v1/completions", json=body).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["sampling_logprob"] for entry in content] == [0.0, 0.0]
    answer = caller.http.post("/inference/v1/completions", json=body | {"top_k": 0}).json()
    assert answer["choices"][0]["logprobs"]["content"][0]["sampling_logprob"] < 0


def test_the_context_is_a_limit(caller: Any) -> None:
    prompt = [1] * 120
    ask = {"prompt": prompt, "max_tokens": 50, "ignore_eos": True}
    truncated = caller.complete(**ask)
    assert truncated.json()["usage"]["completion_tokens"] == 8
    refused = caller.complete(**ask, context_length_exceeded_behavior="error")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert caller.complete(prompt=[1] * 128).status_code == 400


def test_several_prompts_and_several_choices(caller: Any) -> None:
    answer = caller.complete(prompt=[[1, 2], [3]], n=2, max_tokens=2, ignore_eos=True).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 8
    assert caller.complete(prompt=["a", "b"]).status_code == 200


def test_without_a_tokenizer_ids_go_in_and_come_out(start: Start, publisher: Any) -> None:
    (publisher.base / "tokenizer.json").unlink()
    caller = start(replica_count=1)
    answer = caller.complete(logprobs=True, return_token_ids=True, ignore_eos=True).json()
    choice = answer["choices"][0]
    assert (choice["text"], len(choice["token_ids"])) == ("", 4)
    for refused in (caller.complete(prompt="text"), caller.chat()):
        assert refused.status_code == 400
        assert "tokenizer.json" in refused.json()["error"]["message"]


def test_text_of_cut_characters_waits_for_its_rest(caller: Any, read_events: Events) -> None:
    ask = {"max_tokens": 60, "seed": 4, "ignore_eos": True, "temperature": 2}
    text = caller.complete(**ask).json()["choices"][0]["text"]
    chunks = read_events(caller.complete(**ask, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert any(ord(character) > 127 for character in text)


def test_the_stub_engine_answers_canned_tokens(
    start: Start, publisher: Any, read_events: Events
) -> None:
    caller = start(replica_count=1, engine="stub", clock="ticks", latency_seconds=0.0)
    publisher.full("a")
    caller.load("a")
    ask = {"max_tokens": 5, "logprobs": True, "include_routing_matrix": True, "raw_output": True}
    body = caller.complete(**ask).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token_id"] for entry in content] == [5, 6, 7, 8, 9]
    assert content[0]["sampling_logprob"] == -0.5
    assert content[0]["routing_matrix"] == "AAECAwACAQM="
    assert body["model"].endswith("@a")
    chunks = read_events(caller.complete(stream=True, **ask))
    assert chunks[-1]["choices"][0]["raw_output"]["completion_token_ids"] == [5, 6, 7, 8, 9]


def test_experts_of_the_forward_that_predicted_each_token(
    start: Start, read_events: Events
) -> None:
    base, ask = (
        FIXTURES / "qwen3_moe",
        {"logprobs": True, "include_routing_matrix": True, "seed": 1},
    )
    caller, prompt = start(replica_count=1, base_model=base), [3, 61, 0, 17]
    answer = caller.complete(prompt=prompt, **ask, max_tokens=6, return_token_ids=True).json()
    content = answer["choices"][0]["logprobs"]["content"]
    weights = load_llama(base)
    cache = weights.empty_cache()
    weights.forward(prompt + answer["choices"][0]["token_ids"], cache)
    expected = [cache.routing_matrix(position) for position in range(len(prompt) + 5)]
    assert [entry["routing_matrix"] for entry in content] == expected[3:]
    # Two layers of three have experts; a token is sent to two of them.
    assert {len(base64.b64decode(each)) for each in expected} == {2 * 2}
    streamed = read_events(caller.complete(prompt=prompt, **ask, max_tokens=6, stream=True))
    entries = [each for chunk in streamed for each in chunk["choices"][0]["logprobs"]["content"]]
    assert [entry["routing_matrix"] for entry in entries] == expected[3:]
    echoed = caller.complete(prompt=prompt, **ask, max_tokens=6, echo=True).json()
    entries = echoed["choices"][0]["logprobs"]["content"]
    assert [entry["routing_matrix"] for entry in entries] == [None, *expected]
    plain = caller.complete(prompt=prompt, logprobs=True).json()
    assert "routing_matrix" not in plain["choices"][0]["logprobs"]["content"][0]


def test_weights_that_are_no_numbers_answer_an_error(start: Start, publisher: Any) -> None:
    out = publisher.full("a")
    path = out / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-64:] = b"\xff" * 64  # bf16 NaN
    path.write_bytes(data)
    caller = start(replica_count=1)
    caller.load("a")  # bytes are bytes
    answer = caller.complete()
    assert (answer.status_code, "not finite" in answer.text) == (500, True)
    echoed = caller.complete(echo=True, logprobs=True, max_tokens=0)
    assert echoed.status_code == 500
