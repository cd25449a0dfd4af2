"""Trajectories of several turns, against a server that answers byte for byte as a script says."""

import asyncio
import json
import pickle
from typing import Any

import pytest

from hotload.clients.inference.conversation import Conversation, TurnFailedError
from hotload.errors import ProtocolError, ServiceRefusedError
from hotload.rollout.failures import Action, Cause, Failure
from hotload.rollout.trajectory import Problem, Segment
from tests.blocks.scripted_inference import (
    DONE,
    GOOD,
    IDENTITY,
    MODEL,
    PROBLEM,
    event,
    last,
    sampling,
    token,
)
from tests.scripted_server import ScriptedServer, http, never


def spoken(prompt: list[int], ids: list[int], text: str = "ok", model: str = MODEL) -> bytes:
    """A plain answer to a prompt of known ids."""
    content = [{"token_id": number, "sampling_logprob": -1.0} for number in ids]
    raw = {"completion_token_ids": ids, "prompt_token_ids": prompt}
    choice = {
        "delta": {"role": "assistant", "content": text},
        "logprobs": {"content": content},
        "raw_output": raw,
        "finish_reason": "stop",
    }
    return http(event({"model": model, "choices": [choice]}) + DONE)


def headers(script: ScriptedServer, name: str) -> list[str]:
    return [request.headers[name] for request in script.requests]


async def test_turns_share_a_session_and_are_named_each() -> None:
    replies = [spoken([1], [2]), http(b"", 500), http(b"", 425), spoken([1, 2, 3], [4])]
    async with sampling(*replies) as (sampler, script):
        conversation = sampler.converse(PROBLEM, 5)
        first = await conversation.sample([1])
        second = await conversation.sample([*first.prompt_token_ids, *first.token_ids, 3])
        sample = conversation.trajectory()
        alone = await sampler.sample(Problem("p1", (1, 2, 3)), 5)
    assert len(set(headers(script, "x-multi-turn-session-id"))) == 1
    assert len(set(headers(script, "x-session-affinity"))) == 1
    names = headers(script, "x-request-id")
    assert len(set(names)) == 2
    assert names[1] == names[2] == names[3] == f"{names[0]}-1"
    assert names[4] == names[0]  # the same facts, the same request
    seeds = [request.body["seed"] for request in script.requests]
    assert seeds[1:4] == [seeds[0] + 1] * 3
    assert (first.message, second.token_ids) == ({"role": "assistant", "content": "ok"}, (4,))
    assert sample.segments == (Segment((1,), (2, 3, 4), (-1.0, 0.0, -1.0), (True, False, True)),)
    assert (sample.failure, sample.turn_count, sample.provenance.attempts) == (None, 2, 4)
    assert sample.provenance.failed_attempts == ("500", "425")
    assert sample.provenance.runs == ((0, IDENTITY),)
    assert sample.provenance.request_id == names[0]
    assert sample.seed == seeds[0] == alone.seed


async def test_a_chat_is_told_and_merged_where_its_template_repeats_it() -> None:
    replies = [spoken([1, 2], [3], "hi"), spoken([1, 2, 3, 4], [5], "so"), spoken([9], [6], "end")]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
    async with sampling(*replies) as (sampler, script):
        conversation = sampler.converse(PROBLEM, 0)
        for question in ("and?", "well?", None):
            turn = await conversation.sample(messages, max_tokens=4, stop=["."])
            messages += [turn.message]
            messages += [{"role": "user", "content": question}] if question else []
    sample = conversation.trajectory()
    assert [len(segment.token_ids_T) for segment in sample.segments] == [3, 1]
    assert sample.text == "end"
    assert list(sample.transcript) == messages
    body = script.requests[1].body
    assert (body["max_tokens"], body["stop"]) == (4, ["."])
    assert body["messages"] == messages[:3]
    assert {request.path for request in script.requests} == {"/inference/v1/chat/completions"}


async def test_text_and_ids_are_told_line_by_line() -> None:
    async with sampling(spoken([1], [2], "yes")) as (sampler, _):
        conversation = sampler.converse(PROBLEM, 0)
        await conversation.sample("Is it?")
    assert list(conversation.trajectory().transcript) == [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "yes"},
    ]


async def test_a_failed_turn_marks_the_sample_and_keeps_the_turns_before() -> None:
    async with sampling(spoken([1], [2]), http(b"", 400)) as (sampler, _):
        conversation = sampler.converse(PROBLEM, 0)
        await conversation.sample([1])
        with pytest.raises(TurnFailedError) as caught:
            await conversation.sample([1, 2, 3])
        sample = conversation.trajectory()
    assert caught.value.failure.cause is Cause.REFUSED
    assert "secret" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.failure == caught.value.failure
    assert (sample.failure, sample.segments[0].token_ids_T) == ("refused", (2,))
    assert sample.detail == "HTTP 400 at attempt 1: an empty body"
    assert (sample.turn_count, sample.provenance.attempts) == (2, 2)


async def test_a_function_may_go_on_after_a_failed_turn() -> None:
    async with sampling(http(b"", 413), spoken([1], [2])) as (sampler, _):
        conversation = sampler.converse(PROBLEM, 0)
        with pytest.raises(TurnFailedError):
            await conversation.sample([1, 2, 3])
        await conversation.sample([1])
    assert conversation.trajectory().failure is None


async def test_what_stops_the_run_cannot_be_swallowed() -> None:
    for reply, error in (
        (http(b"", 401), ServiceRefusedError),
        (http(b"<html>", content_type="text/html"), ProtocolError),
    ):
        async with sampling(reply) as (sampler, _):
            conversation = sampler.converse(PROBLEM, 0)
            with pytest.raises(error):
                await conversation.sample([1])
            with pytest.raises(error):
                conversation.trajectory()


async def test_a_turn_has_its_time() -> None:
    async with sampling(never) as (sampler, script):
        conversation = sampler.converse(PROBLEM, 0, turn_timeout_seconds=0.05)
        with pytest.raises(TurnFailedError) as caught:
            await conversation.sample([1])
        report = sampler.end_step()
    assert caught.value.failure.cause is Cause.TURN_TIMEOUT
    assert sampler.in_flight == 0
    sample = conversation.trajectory()
    assert (sample.failure, sample.provenance.attempts) == ("turn_timeout", 1)
    assert sample.provenance.failed_attempts == ("cancelled",)
    assert sample.detail == "no answer at attempt 1: turn 1 took more than 0.05 s"
    assert report.requests == 0
    assert len(script.requests) <= 1  # a busy machine may not even have read it


async def test_an_ended_conversation_sends_nothing() -> None:
    async with sampling(spoken([1], [2]), concurrency={"max_concurrency": 1}) as (sampler, script):
        ended, waiting = sampler.converse(PROBLEM, 0), sampler.converse(PROBLEM, 1)
        await ended.sample([1])
        ended.close()
        with pytest.raises(RuntimeError, match="has ended"):
            await ended.sample([1, 2, 3])
        assert ended.trajectory().failure is None
        await sampler._slots.acquire()
        turn = asyncio.create_task(waiting.sample([1]))
        await asyncio.sleep(0)
        waiting.close()
        sampler._slots.abandon()
        with pytest.raises(RuntimeError, match="has ended"):
            await turn
        assert sampler.in_flight == 0
    assert len(script.requests) == ended.attempts == 1
    assert waiting.attempts == 0


async def test_a_deadline_outside_is_not_taken_for_the_turns() -> None:
    deadline = asyncio.timeout(None)

    async def nap(seconds: float) -> None:
        deadline.reschedule(asyncio.get_running_loop().time())
        await never()

    async with sampling(http(b"", 425), naps=nap) as (sampler, _):
        conversation = sampler.converse(PROBLEM, 0, turn_timeout_seconds=60)
        with pytest.raises(TimeoutError):
            async with deadline:
                await conversation.sample([1])
    fault = Failure(Action.FAIL_SAMPLE, Cause.TRAJECTORY_TIMEOUT, None, "too slow")
    sample = conversation.trajectory(fault)
    assert (sample.failure, sample.detail, sample.provenance.attempts) == (
        "trajectory_timeout",
        "too slow",
        1,
    )
    assert sample.provenance.failed_attempts == ("425",)  # it waited, and nothing was under way


async def test_segments_of_the_functions_own() -> None:
    own = [Segment((1,), (2,), (-0.5,), (True,)), Segment((3,), (4,), (-0.25,), (False,))]
    async with sampling(spoken([1], [2])) as (sampler, _):
        conversation = sampler.converse(PROBLEM, 0)
        await conversation.sample([1])
    sample = conversation.trajectory(segments=own)
    assert list(sample.segments) == own
    assert sample.provenance.observed == (IDENTITY,)
    assert sample.provenance.runs == ()


async def test_turns_by_two_versions_straddle() -> None:
    other = MODEL.replace("000003", "000004")
    replies = [spoken([1], [2]), spoken([1, 2, 3], [4], model=other)]
    masks = {"accept": (True, False, True), "mask_from_change": (True, False, False)}
    for policy, mask in masks.items():
        async with sampling(*replies, groups={"on_straddling": policy}) as (sampler, _):
            conversation = sampler.converse(PROBLEM, 0)
            await conversation.sample([1])
            await conversation.sample([1, 2, 3])
        assert conversation.trajectory().segments[0].loss_mask_T == mask


@pytest.mark.parametrize(
    "asked", ["", [], [1, "a"], [-1], [True], [{"content": "x"}], [{"role": "user"}, 3]]
)
async def test_what_cannot_be_asked(asked: Any) -> None:
    async with sampling(http(GOOD)) as (sampler, script):
        with pytest.raises(ValueError, match="expected text"):
            await sampler.converse(PROBLEM, 0).sample(asked)
    assert script.requests == []


async def test_limits_of_a_turn_are_checked() -> None:
    async with sampling(http(GOOD)) as (sampler, script):
        conversation: Conversation = sampler.converse(PROBLEM, 0)
        with pytest.raises(ValueError, match="max_completion_tokens"):
            await conversation.sample("x", max_tokens=0)
        with pytest.raises(ValueError, match="stop"):
            await conversation.sample("x", stop=["a"] * 5)
    assert script.requests == []


async def test_a_turn_that_fills_the_sequence_fails_but_keeps_its_tokens() -> None:
    async with sampling(spoken([1], [2]), spoken([1, 2, 3], [4]), max_seq_len=4) as (sampler, _):
        conversation = sampler.converse(PROBLEM, 0)
        await conversation.sample([1])
        await conversation.sample([1, 2, 3])
        with pytest.raises(TurnFailedError):
            await conversation.sample([1, 2, 3, 4])
    sample = conversation.trajectory()
    assert (sample.failure, sample.segments[0].token_ids_T) == ("too_long", (2, 3, 4))
    assert sample.provenance.attempts == 2


async def test_a_hedge_is_another_request_with_the_same_seed() -> None:
    async with sampling(http(token(1, "a") + last([1]) + DONE)) as (sampler, script):
        first = await sampler.sample(PROBLEM, 0)
        second = await sampler.sample(PROBLEM, 0, is_hedge=True)
    assert (first.is_hedge, second.is_hedge) == (False, True)
    for name in ("x-request-id", "x-session-affinity"):
        assert len(set(headers(script, name))) == 2
    assert script.requests[0].body == script.requests[1].body


async def test_a_trajectory_has_a_segment() -> None:
    async with sampling(spoken([1], [2])) as (sampler, _):
        conversation = sampler.converse(PROBLEM, 0)
        await conversation.sample([1])
        with pytest.raises(ValueError, match="one segment or more"):
            conversation.trajectory(segments=[])


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def said(number: int, **delta: Any) -> bytes:
    """One token of a chat's stream."""
    content = [{"token_id": number, "sampling_logprob": -1.0}]
    choice = {"index": 0, "delta": delta, "logprobs": {"content": content}}
    return event({"model": MODEL, "choices": [choice]})


def call(arguments: str, **first: str) -> dict[str, Any]:
    name = {"name": first.pop("name")} if "name" in first else {}
    return {"index": 0, **first, "function": {**name, "arguments": arguments}}


CALLS = http(
    said(1, reasoning_content="I should ")
    + said(2, reasoning="add.")
    + said(3, tool_calls=[call("", id="c1", type="function", name="add")])
    + said(4, tool_calls=[call('{"a": ')])
    + said(5, tool_calls=[call("1}"), {**call("{}", id="c2", name="add"), "index": 1}])
    + last([1, 2, 3, 4, 5], finish="tool_calls")
    + DONE
)
MESSAGE = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "I should add.",
    "tool_calls": [
        {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"type": "function", "id": "c2", "function": {"name": "add", "arguments": "{}"}},
    ],
}
QUESTION = {"role": "user", "content": "?"}
CHAT = Problem("p1", messages=(QUESTION,), extra={"tools": [TOOL]})


async def test_calls_and_thoughts_are_kept_and_tools_are_offered() -> None:
    asked = [QUESTION]
    async with sampling(CALLS, http(said(9, content="3") + last([9]) + DONE)) as (sampler, script):
        conversation = sampler.converse(CHAT, 0)
        turn = await conversation.sample(asked)
        answered = [*asked, turn.message, {"role": "tool", "tool_call_id": "c1", "content": "3"}]
        await conversation.sample(answered)
        sample = conversation.trajectory()
    assert turn.message == MESSAGE
    assert (turn.text, turn.reasoning, turn.finish_reason) == ("", "I should add.", "tool_calls")
    assert [request.body["tools"] for request in script.requests] == [[TOOL]] * 2
    assert script.requests[1].body["messages"][1] == MESSAGE
    assert sample.transcript[1] == MESSAGE


async def test_one_turn_that_says_more_than_its_text_has_a_transcript() -> None:
    body: Any = {"choices": [{"message": MESSAGE, "finish_reason": "tool_calls", "index": 0}]}
    body["choices"][0]["logprobs"] = {"content": [{"token_id": 1, "sampling_logprob": -1.0}]}
    body["choices"][0]["raw_output"] = {"completion_token_ids": [1], "prompt_token_ids": [7]}
    plain = http(json.dumps(body).encode(), content_type="application/json")
    async with sampling(plain, spoken([1], [2])) as (sampler, _):
        sample = await sampler.sample(CHAT, 0)
        text_alone = await sampler.sample(CHAT, 1)
    assert sample.failure is None
    assert sample.transcript == (QUESTION, MESSAGE)
    assert text_alone.transcript == ()


async def test_a_prompt_of_text_offers_no_tools() -> None:
    async with sampling(spoken([1], [2])) as (sampler, script):
        await sampler.converse(Problem("p", "x", extra={"tools": [TOOL]}), 0).sample("x")
    assert "tools" not in script.requests[0].body
