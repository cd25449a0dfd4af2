"""Event streams cut anywhere, answers put together, metrics in either spelling, faults by code."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.options import Sampling
from hotload.rollout.completions_api import Answer, EventStream
from hotload.rollout.failures import (
    Action,
    Cause,
    error_names,
    failure_in_stream,
    failure_of_status,
)

STREAM = (
    b": comment\n\nevent: ping\ndata: 1\n\ndata:{}\n\r\n"
    b"data: a\ndata: b\r\n\r\nid: 7\nretry: 1\ndata: last\n\nevent: lost\n\ndata: cut"
)
EVENTS = [("ping", b"1"), ("", b"{}"), ("", b"a\nb"), ("", b"last")]


def read(*pieces: bytes) -> list[tuple[str, bytes]]:
    stream = EventStream()
    return [event for piece in pieces for event in stream.feed(piece)]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(edges)]
    assert read(*pieces) == EVENTS


def test_byte_by_byte() -> None:
    assert read(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


def answer(*chunks: Any, **sampling: Any) -> Answer:
    whole = Answer(Sampling(**sampling), None)
    whole.prompt_token_ids = (7,)
    for chunk in chunks:
        assert whole.add(chunk) is None
    whole.is_done = True
    return whole


def chunk(**choice: Any) -> dict[str, Any]:
    return {"choices": [choice]}


LOGPROBS = {"content": [{"token_id": 1, "sampling_logprob": -1.0}]}


@pytest.mark.parametrize("prefix", ["", "fireworks-"])
@pytest.mark.parametrize("value", [0.5, "0.5"])
def test_metrics_in_either_spelling(prefix: str, value: object) -> None:
    metrics = {
        f"{prefix}prefill-queue-duration": value,
        f"{prefix}cached-prompt-tokens": "7",
        f"{prefix}backend-host": "host-1",
    }
    by_chunk = answer({"choices": [], "perf_metrics": metrics})
    by_header = answer()
    by_header.add_metrics({**metrics, "content-type": "x"})
    for each in (by_chunk, by_header):
        assert each.prefill_queue_seconds == 0.5
        assert each.cached_prompt_token_count == 7
        assert each.replica == "host-1"


def test_a_queue_time_that_is_no_time_is_not_used() -> None:
    for value in (-1, "nan", "inf", None):
        metrics = {"prefill-queue-duration": value}
        assert answer({"perf_metrics": metrics}).prefill_queue_seconds is None


def test_raw_ids_in_pieces_or_at_once() -> None:
    logprobs = {"content": [{"sampling_logprob": -1.0}]}
    pieces = [
        chunk(text="a", logprobs=logprobs, raw_output={"completion_token_ids": [number]})
        for number in (4, 5, 6)
    ]
    whole = answer(*pieces, chunk(finish_reason="stop"))
    assert whole.finish() is None
    assert whole.token_ids == (4, 5, 6)
    grown = [
        chunk(text="a", logprobs=logprobs, token_ids=list(range(count))) for count in (1, 2, 3)
    ]
    whole = answer(*grown, chunk(finish_reason="stop"))
    assert whole.finish() is None
    assert whole.token_ids == (0, 1, 2)


def ended(count: int, reason: str, stated: object = None, **choice: Any) -> list[dict[str, Any]]:
    """An answer of `count` tokens that its usage says are `stated`."""
    content = [{"token_id": number, "sampling_logprob": -1.0} for number in range(count)]
    said = chunk(text="a" * count, logprobs={"content": content}, finish_reason=reason, **choice)
    return [said, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": stated}}]


@pytest.mark.parametrize(
    ("count", "reason", "stated"),
    [
        (2, "stop", 3),
        (2, "length", 3),  # llama.cpp drops an entry
        (2, "length", 1),
        (2, "tool_calls", 1),
        (0, "stop", 1),
        (0, "length", 8),  # transformers: none but bytes that are no text
        (0, "length", 0),
        (0, "length", None),
        (0, "tool_calls", None),
    ],
)
def test_an_answer_that_is_not_all_there_is_malformed(count: int, reason: str, stated: int) -> None:
    fault = answer(*ended(count, reason, stated)).finish()
    assert fault is not None
    assert (fault.cause, fault.action) == (Cause.MALFORMED, Action.FAIL_SAMPLE)
    assert f"{count} tokens" in fault.detail
    assert (f"{stated} by its usage" if stated else f"by {reason}") in fault.detail
    cut = answer(*ended(count, reason, stated))
    cut.is_done = False
    fault = cut.finish()
    assert fault is not None
    assert fault.action is Action.RETRY


@pytest.mark.parametrize(
    ("count", "reason", "stated"),
    [
        (2, "stop", 2),
        (2, "length", "2"),
        (2, "length", 2.0),
        (2, "length", None),
        (2, "length", "many"),
        (0, "stop", 0),
        (0, "stop", None),
    ],
)
def test_an_answer_that_is_all_there(count: int, reason: str, stated: object) -> None:
    assert answer(*ended(count, reason, stated)).finish() is None


def test_a_stop_token_in_the_raw_output_alone_may_be_counted() -> None:
    raw = {"raw_output": {"completion_token_ids": [0, 1, 9]}}
    for stated, cause in ((2, None), (3, None), (4, Cause.MALFORMED)):
        fault = answer(*ended(2, "stop", stated, **raw)).finish()
        assert (fault and fault.cause) == cause, stated
    # One that was cut by its length has none.
    for stated in (2, 3, None):
        fault = answer(*ended(2, "length", stated, **raw)).finish()
        assert (fault and fault.cause) == Cause.MISSING_TOKEN_IDS, stated


def test_usage_along_the_way_is_of_what_there_was_by_then() -> None:
    first, second = named("m", 0), named("m", 1)
    first["usage"] = {"prompt_tokens": 1, "completion_tokens": 0}
    assert answer(first, second, STOP).finish() is None
    second["usage"] = {"prompt_tokens": 1, "completion_tokens": 2}
    assert answer(first, second, STOP).finish() is None
    last = {**STOP, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert answer(first, second, last).finish() is not None


def test_a_prompt_whose_ids_are_not_told_cannot_be_trained_on() -> None:
    whole = Answer(Sampling(), None)
    assert whole.add(chunk(text="a", finish_reason="stop", logprobs=LOGPROBS)) is None
    whole.is_done = True
    fault = whole.finish()
    assert fault is not None
    assert (fault.cause, fault.action) == (Cause.MISSING_TOKEN_IDS, Action.FAIL_SAMPLE)


def named(model: str | None, *numbers: int) -> dict[str, Any]:
    content = [{"token_id": number, "sampling_logprob": -1.0} for number in numbers]
    choice = {"text": "a" * len(numbers), "logprobs": {"content": content}}
    return {"model": model, "choices": [choice]}


STOP = chunk(finish_reason="stop")


@pytest.mark.parametrize(
    ("chunks", "runs"),
    [
        ([named("m@a", 1, 2), named("m@a", 3)], [(0, "a")]),
        ([named("m@a", 1, 2), named("m@b", 3), named("m@b", 4)], [(0, "a"), (2, "b")]),
        ([named("m@a", 1), named("m@b", 2), named("m@a", 3)], [(0, "a"), (1, "b"), (2, "a")]),
        ([named("m@a"), named("m@b", 1), named("m@c")], [(0, "b")]),
        ([named("m", 1), named("m@a", 2)], [(1, "a")]),
        ([named("m@a", 1), named("m", 2)], [(0, "a"), (1, "")]),
        ([named("m@a", 1), named("m@b"), named("m@a", 2)], [(0, "a")]),
        ([named("m", 1)], []),
        ([named("m@a")], []),
    ],
)
def test_which_tokens_each_identity_made(chunks: list[Any], runs: list[Any]) -> None:
    whole = answer(*chunks, {**STOP, "model": chunks[-1]["model"]})
    assert whole.finish() is None
    assert whole.runs == runs


def test_routes_of_all_tokens_or_none() -> None:
    def routed(*texts: object) -> Answer:
        content = [
            {"token_id": 1, "sampling_logprob": -1.0, "routing_matrix": text} for text in texts
        ]
        return answer(
            chunk(text="a", finish_reason="stop", logprobs={"content": content}),
            include_routing_matrix=True,
        )

    whole = routed("AQI=", "AwQ=")
    assert whole.finish() is None
    assert whole.routes == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    for nothing in (None, ""):
        lacking = routed("AQI=", nothing)
        assert lacking.finish() is None
        assert lacking.routes is None
    for odd in (("AQI=", "AQ=="), ("AQI=", "%"), (3, 4)):
        fault = routed(*odd).finish()
        assert fault is not None
        assert fault.cause is Cause.MALFORMED


def test_a_null_or_absent_logprob_is_missing() -> None:
    for entry in ({"token_id": 1}, {"token_id": 1, "sampling_logprob": None}):
        whole = answer(chunk(text="a", finish_reason="stop", logprobs={"content": [entry]}))
        fault = whole.finish()
        assert fault is not None
        assert fault.cause is Cause.MISSING_LOGPROBS


GOOD_CHOICE = {"text": "a", "finish_reason": "stop", "logprobs": LOGPROBS}


@pytest.mark.parametrize(
    "odd",
    [
        *(
            {"logprobs": {"content": [{"token_id": 1, "sampling_logprob": value}]}}
            for value in ("-1", [1], 10**400, -(10**400), 0.5, -1e300, True, False)
        ),
        {"finish_reason": {"a": 1}},
        {"text": 3},
        {"raw_output": {"completion_token_ids": 3}},
        {"raw_output": {"prompt_token_ids": ["a"]}},
        {"raw_output": {"prompt_token_ids": [-1]}},
        {"index": 1},
    ],
    ids=str,
)
def test_values_of_another_kind_are_malformed(odd: dict[str, Any]) -> None:
    whole = Answer(Sampling(), None)
    fault = whole.add(chunk(**{**GOOD_CHOICE, **odd})) or whole.finish()
    assert fault is not None
    assert fault.cause is Cause.MALFORMED


def test_statistics_of_another_kind_were_not_told() -> None:
    for value in (-1, 1e300, 10**400, "many", [1], None):
        usage = {"prompt_tokens": value, "prompt_tokens_details": {"cached_tokens": value}}
        whole = answer({"usage": usage, "perf_metrics": {"prefill-queue-duration": value}})
        assert (whole.prompt_token_count, whole.cached_prompt_token_count) == (0, 0)
        assert whole.prefill_queue_seconds is None


def test_lacking_before_done_is_a_cut_and_is_asked_again() -> None:
    whole = Answer(Sampling(), None)
    assert whole.add(chunk(text="a", finish_reason="stop")) is None
    fault = whole.finish()
    assert fault is not None
    assert fault.action is Action.RETRY


@pytest.mark.parametrize(
    ("finish", "action"),
    [
        ("error", Action.RETRY),
        ("abort", Action.RETRY),
        ("content_filter", Action.FAIL_SAMPLE),
        (3, Action.FAIL_SAMPLE),
    ],
)
def test_odd_finish_reasons_are_failed_attempts(finish: object, action: Action) -> None:
    fault = answer(chunk(text="a", finish_reason=finish, logprobs=LOGPROBS)).finish()
    assert fault is not None
    assert fault.action is action
    assert repr(finish) in fault.detail


def test_calls_are_bounded() -> None:
    calls = [{"index": number, "function": {}} for number in range(300)]
    read = Answer(Sampling(), None)
    assert read.add({"choices": [{"delta": {"tool_calls": calls}}]}) is not None


def test_a_client_that_was_told_many_identities_keeps_few() -> None:
    chunks = [{"model": f"m@run-{i:06d}", "choices": []} for i in range(100)]
    whole = answer(*chunks)
    assert len(whole.observed) == 64
    assert whole.last_identity == "run-000099"


@pytest.mark.parametrize(
    ("code", "action", "cause"),
    [
        (400, Action.FAIL_SAMPLE, Cause.REFUSED),
        (413, Action.FAIL_SAMPLE, Cause.REFUSED),
        (422, Action.FAIL_SAMPLE, Cause.REFUSED),
        (401, Action.STOP_RUN, Cause.REFUSED),
        (402, Action.STOP_RUN, Cause.REFUSED),
        (403, Action.STOP_RUN, Cause.REFUSED),
        (412, Action.STOP_RUN, Cause.REFUSED),
        (302, Action.STOP_RUN, Cause.REFUSED),
        (404, Action.WAIT_FOR_SWAP, Cause.SWAP_TIMEOUT),
        (425, Action.WAIT_FOR_SWAP, Cause.SWAP_TIMEOUT),
        (408, Action.RETRY, Cause.TIMEOUT),
        (504, Action.RETRY, Cause.TIMEOUT),
        (429, Action.RETRY, Cause.OVERLOADED),
        (503, Action.RETRY, Cause.OVERLOADED),
        (500, Action.RETRY, Cause.SERVER_ERROR),
        (502, Action.RETRY, Cause.SERVER_ERROR),
        (599, Action.RETRY, Cause.SERVER_ERROR),
    ],
)
def test_what_a_status_asks_for(code: int, action: Action, cause: Cause) -> None:
    for fault in (
        failure_of_status(code, "", ""),
        failure_in_stream({"error": {"status_code": code}}) if code >= 400 else None,
        failure_in_stream({"error": "x", "status": code}) if code >= 400 else None,
    ):
        assert fault is None or (fault.action, fault.cause) == (action, cause)


def test_a_503_that_scales_up_is_a_swap() -> None:
    for text in ("DEPLOYMENT_SCALING_UP", "Model not found", "model is hot loading"):
        assert failure_of_status(503, text, "").action is Action.WAIT_FOR_SWAP


def test_an_error_in_a_stream_without_a_code_is_a_502() -> None:
    for error in ("boom", {"message": "x"}, {"status_code": "429"}, {"status": 12}):
        assert failure_in_stream({"error": error}).status_code == 502


def test_messages_of_errors_are_never_shown() -> None:
    body = {"error": {"message": "the prompt was: secret", "code": "C", "type": "T"}}
    assert error_names(body) == "C T"
    assert "secret" not in failure_in_stream(body).detail
    assert error_names({"code": 5, "message": "secret"}) == "5"
    for odd in (None, [], "secret", {"error": "secret"}, {"error": {"message": "secret"}}):
        assert "secret" not in error_names(json.loads(json.dumps(odd)))
