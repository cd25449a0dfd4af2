"""The rollout client against a server that answers byte for byte as a script says."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hotload.clients.inference.attempt import Chunks
from hotload.errors import ProtocolError, ServiceRefusedError, ServiceUnavailableError
from hotload.options import Sampling
from hotload.rollout.completions_api import Answer
from hotload.rollout.failures import Cause, failure_of_status, is_recoverable
from hotload.rollout.trajectory import Problem, Weights
from tests.blocks.scripted_inference import (
    DONE,
    GOOD,
    IDENTITY,
    KEY,
    MODEL,
    PROBLEM,
    Naps,
    block,
    client,
    event,
    last,
    sample_once,
    sampling,
    token,
)
from tests.scripted_server import Request, ScriptedServer, http, never

CHAT = Problem("p1", messages=({"role": "user", "content": "hi"},))


async def test_a_good_answer_carries_tokens_and_provenance() -> None:
    async with sampling(http(GOOD, x_request_id="srv-9")) as (sampler, _):
        sample = await sampler.sample(PROBLEM, 2)
    assert sample.failure is None
    assert sample.text == "ab"
    assert sample.segments[0].token_ids_T == (1, 2)
    assert sample.segments[0].sampling_logprobs_T == (-1.5, -2.5)
    assert sample.segments[0].loss_mask_T == (True, True)
    assert sample.segments[0].prompt_token_ids == (7, 8)
    assert sample.cached_prompt_token_count == 1
    assert sample.weights is Weights.EXPECTED
    assert sample.provenance.replica == "replica-2"
    assert sample.provenance.response_id == "srv-9"
    assert sample.provenance.attempts == 1


async def test_defaults_are_sent_and_ids_stay_over_retries() -> None:
    async with sampling(http(b"", 500), http(b"", 425), http(GOOD)) as (sampler, script):
        sample = await sampler.sample(PROBLEM, 0)
        other = await sampler.sample(PROBLEM, 1)
    body = script.requests[0].body
    assert body == {
        "model": "accounts/a/models/m",
        "prompt": "the secret prompt",
        "n": 1,
        "max_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "logprobs": True,
        "stream": True,
        "perf_metrics_in_response": True,
        "raw_output": True,
        "context_length_exceeded_behavior": "error",
        "seed": sample.seed,
    }
    headers = [request.headers for request in script.requests]
    assert headers[0]["authorization"] == f"Bearer {KEY}"
    assert headers[0]["fireworks-model"] == "accounts/a/models/m"
    assert headers[0]["fireworks-deployment"] == "accounts/a/deployments/d"
    for name in ("x-request-id", "x-multi-turn-session-id", "x-session-affinity"):
        assert len({each[name] for each in headers[:3]}) == 1
        assert headers[3][name] != headers[0][name]
    assert headers[0]["x-session-affinity"] == headers[0]["x-multi-turn-session-id"]
    assert sample.provenance.attempts == 3
    assert sample.seed != other.seed
    assert script.requests[0].path == "/inference/v1/completions"


async def test_a_chat_goes_to_the_chat_endpoint() -> None:
    logprobs = {"content": [{"token_id": 1, "sampling_logprob": -1.0}]}
    chunk = {
        "model": MODEL,
        "choices": [{"delta": {"role": "assistant", "content": "a"}, "logprobs": logprobs}],
    }
    problem = Problem("p", messages=({"role": "user", "content": "hi"},))
    async with sampling(http(event(chunk) + last([1]) + DONE)) as (sampler, script):
        sample = await sampler.sample(problem, 0)
    assert (sample.failure, sample.text) == (None, "a")
    assert [request.path for request in script.requests] == ["/inference/v1/chat/completions"]
    assert script.requests[0].body["messages"] == [{"role": "user", "content": "hi"}]


async def test_numbers_of_any_size_in_messages() -> None:
    problem = Problem("p", messages=({"role": "user", "content": "hi", "n": 2**70},))
    async with sampling(http(GOOD)) as (sampler, script):
        await sampler.sample(problem, 0)
    assert script.requests[0].body["messages"][0]["n"] == 2**70


async def test_an_empty_answer_is_an_answer() -> None:
    empty = event({"model": MODEL, "choices": [{"text": "", "finish_reason": "stop"}]})
    sample = await sample_once(http(empty + DONE))
    assert (sample.failure, sample.segments[0].token_ids_T) == (None, ())
    assert sample.weights is Weights.EXPECTED


async def test_an_answer_that_lacks_tokens_is_no_empty_sample() -> None:
    """As transformers streams a chat of bytes that are no text, and llama.cpp a dropped entry."""
    stated = {"usage": {"prompt_tokens": 2, "completion_tokens": 8}}
    empty = http(last([], finish="length", **stated) + DONE)
    for asked in (PROBLEM, CHAT):
        sample = await sample_once(empty, problem=asked)
        assert (sample.failure, sample.provenance.attempts) == ("malformed", 1)
        assert sample.provenance.failed_attempts == ("malformed",)
        assert "0 tokens" in sample.detail
        assert "8 by its usage" in sample.detail
    dropped = http(token(1, "a") + token(3, "c") + last([], finish="length", **stated) + DONE)
    assert (await sample_once(dropped)).failure == "malformed"


async def test_a_plain_response_is_read_too() -> None:
    content = [{"token_id": 4, "sampling_logprob": -1.0}]
    choice = {
        "message": {"content": "x"},
        "logprobs": {"content": content},
        "token_ids": [4],
        "prompt_token_ids": [7],
        "finish_reason": "length",
    }
    body = json.dumps({"model": MODEL, "choices": [choice]}).encode()
    sample = await sample_once(http(body, content_type="application/json; charset=utf-8"))
    assert (sample.segments[0].token_ids_T, sample.finish_reason) == ((4,), "length")


async def test_swap_codes_wait_on_a_budget_of_their_own() -> None:
    naps = Naps()
    scaling = json.dumps({"error": {"code": "DEPLOYMENT_SCALING_UP"}}).encode()
    replies = [http(b"{}", 425, "application/json")] * 10
    replies += [http(b"", 404), http(scaling, 503, "application/json")]
    sample = await sample_once(*replies, http(GOOD), naps=naps)
    assert sample.failure is None
    assert sample.provenance.attempts == 13
    assert all(2.5 <= nap < 7.5 for nap in naps.seconds)

    naps = Naps()
    sample = await sample_once(http(b"", 425), naps=naps, swap=60)
    assert sample.failure == "swap_timeout"
    assert 59 <= sum(naps.seconds) < 67.5


async def test_seven_attempts_and_no_more() -> None:
    naps = Naps()
    async with sampling(http(b"", 500), naps=naps) as (sampler, script):
        sample = await sampler.sample(PROBLEM, 0)
        report = sampler.end_step()
    assert sample.failure == "server_error"
    assert sample.detail == "HTTP 500 at attempt 7: an empty body"
    assert len(script.requests) == 7
    assert report.retry_exhaustions == 1
    for nap, wait in zip(naps.seconds, (2, 4, 8, 16, 30, 30), strict=True):
        assert 0.5 * wait <= nap < 1.5 * wait


async def test_every_attempt_that_failed_is_told_by_what_it_met() -> None:
    broken = http(token(1, "a"), length=999)
    in_stream = http(token(1, "a") + event({"error": {"message": "x", "status_code": 503}}))
    refusals = [http(b"", 429), http(b"", 503), http(b"", 425), http(b"", 404)]
    replies = [*refusals, broken, http(token(1, "a") + DONE), in_stream, http(GOOD)]
    async with sampling(*replies) as (sampler, script):
        sample = await sampler.sample(PROBLEM, 0)
    told = ("429", "503", "425", "404", "connection", "truncated", "503")
    assert (sample.failure, sample.provenance.failed_attempts) == (None, told)
    assert sample.provenance.attempts == len(script.requests) == len(told) + 1


async def test_the_last_attempt_of_a_failed_sample_is_told_too() -> None:
    refused = (await sample_once(http(b"", 429), http(b"", 400))).provenance
    assert (refused.attempts, refused.failed_attempts) == (2, ("429", "400"))
    garbled = (await sample_once(http(b"data: {not json\n\n"))).provenance
    assert (garbled.attempts, garbled.failed_attempts) == (7, ("malformed",) * 7)
    long = (await sample_once(http(GOOD), problem=Problem("p", (7, 8)), max_seq_len=2)).provenance
    assert (long.attempts, long.failed_attempts) == (0, ())  # it was never sent


def test_what_an_attempt_met_is_one_of_few_names() -> None:
    statuses = {failure_of_status(status, "", "").label for status in range(100, 1000)}
    assert statuses <= {str(status) for status in range(400, 600)} | set(Cause)
    assert {each for each in ("400", "404", *statuses, *Cause) if is_recoverable(each)} == (
        {"408", "425", "429", "timeout", "connection", "truncated", "server_error"}
        | {str(status) for status in range(500, 600)}
    )


@pytest.mark.parametrize("problem", [PROBLEM, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("finish", ["content_filter", "repetition", "function_call", "eos", "x"])
async def test_an_end_that_would_come_again_is_final_and_named(
    finish: str, problem: Problem
) -> None:
    async with sampling(http(token(1, "a") + last([1], finish=finish) + DONE)) as (sampler, script):
        sample = await sampler.sample(problem, 0)
    assert len(script.requests) == 1
    assert (sample.failure, finish in sample.detail) == ("unusable_end", True)
    assert sample.provenance.failed_attempts == (f"unusable_end:{finish}",)


@pytest.mark.parametrize("finish", ["", "a word", "x" * 41, 7.5])
async def test_an_end_that_is_no_word_is_counted_without_it(finish: Any) -> None:
    sample = await sample_once(http(token(1, "a") + last([1], finish=finish) + DONE))
    met = {"truncated"} if not finish else {"unusable_end"}
    assert set(sample.provenance.failed_attempts) == met


@pytest.mark.parametrize("finish", ["abort", "error"])
async def test_the_services_own_trouble_is_asked_again(finish: str) -> None:
    broken = http(token(1, "a") + last([1], finish=finish) + DONE)
    async with sampling(broken, http(GOOD)) as (sampler, script):
        sample = await sampler.sample(PROBLEM, 0)
    assert (len(script.requests), sample.failure, sample.text) == (2, None, "ab")
    assert sample.provenance.failed_attempts == ("server_error",)


async def test_retry_after_is_a_floor_capped_at_thirty_seconds() -> None:
    naps = Naps()
    date = "Sat, 21 Nov 2026 10:00:00 GMT"
    later = "Sat, 21 Nov 2026 10:00:09 GMT"
    await sample_once(
        http(b"", 429, retry_after="20"),
        http(b"", 429, retry_after="3600"),
        http(b"", 429, retry_after=later, date=date),
        http(b"", 429, retry_after="soon"),
        http(GOOD),
        naps=naps,
    )
    assert naps.seconds[0] == 20
    assert naps.seconds[1] == 30
    assert 9 <= naps.seconds[2] < 12
    assert 8 <= naps.seconds[3] < 24


@pytest.mark.parametrize("status", [401, 402, 403, 412, 405])
async def test_codes_that_stop_the_run(status: int) -> None:
    body = json.dumps({"error": {"code": "NO", "message": f"bad key {KEY}"}}).encode()
    with pytest.raises(ServiceRefusedError) as caught:
        await sample_once(http(body, status, "application/json"))
    assert caught.value.status_code == status
    assert KEY not in str(caught.value) + repr(caught.value)
    assert "NO" in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_codes_that_fail_one_sample(status: int) -> None:
    body = json.dumps({"error": {"code": "x", "message": "the secret prompt"}}).encode()
    async with sampling(http(body, status, "application/json")) as (sampler, script):
        sample = await sampler.sample(PROBLEM, 0)
    assert sample.failure == "refused"
    assert len(script.requests) == 1
    assert "secret" not in sample.detail


async def test_errors_inside_a_200() -> None:
    coded = event({"error": {"message": "x", "status_code": 429}})
    named = b'event: error\ndata: {"message": "boom"}\n\n'
    in_chunk = event({"error": {"message": "y"}, "status": 400})
    async with sampling(
        http(token(1, "a") + coded), http(token(1, "a") + named), http(in_chunk)
    ) as (sampler, script):
        sample = await sampler.sample(PROBLEM, 0)
    assert (sample.failure, len(script.requests)) == ("refused", 3)


async def test_heartbeats_are_no_error_and_bad_json_is() -> None:
    beats = b": comment\n\nevent: ping\ndata: {not json\n\n"
    assert (await sample_once(http(beats + GOOD))).failure is None
    sample = await sample_once(http(b"data: {not json\n\n" + GOOD))
    assert (sample.failure, sample.provenance.attempts) == ("malformed", 7)
    for chunk in ([], 3, {"choices": [3]}, {"choices": [{"logprobs": 4}]}, {"usage": "x"}):
        sample = await sample_once(http(event(chunk) + GOOD))
        assert sample.failure == "malformed", chunk


async def test_lines_that_end_in_crlf() -> None:
    stream = GOOD.replace(b"\n", b"\r\n")
    sample = await sample_once(http(stream))
    assert (sample.failure, sample.text, sample.provenance.attempts) == (None, "ab", 1)
    # Each event counts as progress when it comes, wherever the stream is cut.
    for cut in range(1, 4):
        answer = Answer(Sampling(), None)
        chunks, received = Chunks(answer), [0]
        for event_bytes in stream.split(b"\r\n\r\n")[:3]:
            whole = event_bytes + b"\r\n\r\n"
            assert chunks.feed(whole[:-cut]) is None
            assert chunks.feed(whole[-cut:]) is None
            received.append(answer.received)
        assert received == sorted(set(received))


async def test_html_with_200_stops_the_run() -> None:
    with pytest.raises(ProtocolError, match="text/html"):
        await sample_once(http(b"<html>", content_type="text/html"))


async def test_nobody_listens_and_garbage_answers() -> None:
    garbage = await sample_once(b"\x00\x01 this is no HTTP\r\n\r\n")
    assert garbage.failure == "connection"
    nothing = await sample_once(b"")
    assert (nothing.failure, nothing.provenance.attempts) == ("connection", 7)
    async with client(1).session(
        Sampling(), identity=IDENTITY, policy_version=0, sleep=Naps()
    ) as sampler:
        refused = await sampler.sample(PROBLEM, 0)
    assert refused.failure == "connection"
    assert KEY not in refused.detail


async def test_a_server_that_hangs_is_a_timeout() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n"

    async def hanging(request: Request) -> AsyncIterator[bytes]:
        yield head
        await never()

    async with (
        ScriptedServer(hanging).running() as script,
        client(script.port).session(
            Sampling(sample_timeout=0.01), identity=IDENTITY, policy_version=0, sleep=Naps()
        ) as sampler,
    ):
        sample = await sampler.sample(PROBLEM, 0)
    assert (sample.failure, sample.provenance.attempts) == ("timeout", 7)


async def test_ids_and_logprobs_are_never_made_up() -> None:
    bare = event(
        {
            "model": MODEL,
            "choices": [
                {
                    "text": "a",
                    "finish_reason": "stop",
                    "prompt_token_ids": [7],
                    "logprobs": {"content": [{"logprob": -1.0}]},
                }
            ],
        }
    )
    sample = await sample_once(http(bare + DONE))
    assert sample.failure == "missing_token_ids"
    with_stop_token = token(1, "a") + last([1, 9]) + DONE
    assert (await sample_once(http(with_stop_token))).segments[0].token_ids_T == (1,)
    for ids in ([2], [2, 1], []):
        wrong = await sample_once(http(token(1, "a") + last(ids) + DONE))
        assert (wrong.failure is None) == (not ids), ids
    raw_only = bare.replace(
        b'"finish_reason"', b'"raw_output": {"completion_token_ids": [5]}, "finish_reason"'
    )
    assert (await sample_once(http(raw_only + DONE))).segments[0].token_ids_T == (5,)
    for bad in (b"[5.0]", b"[true]", b"[-1]", b'["5"]', b"[5, 6]"):
        sample = await sample_once(http(raw_only.replace(b"[5]", bad) + DONE))
        assert sample.failure == "missing_token_ids", bad
    none = event({"choices": [{"text": "a", "finish_reason": "stop"}]})
    assert (await sample_once(http(none + DONE))).failure == "missing_logprobs"


async def test_a_raw_logprob_stands_in_only_for_plain_sampling() -> None:
    chunk = token(1, "a", sampling_logprob=None) + last([1]) + DONE
    plain = await sample_once(http(chunk))
    assert plain.segments[0].sampling_logprobs_T == (-0.25,)
    tempered = await sample_once(http(chunk), temperature=0.7)
    assert tempered.failure == "missing_logprobs"


async def test_longer_than_asked_or_than_the_sequence() -> None:
    many = b"".join(token(i, "x") for i in range(9)) + last(list(range(9))) + DONE
    assert (await sample_once(http(many))).failure == "too_long"
    kept = await sample_once(http(GOOD), max_seq_len=3)
    assert (kept.failure, kept.segments[0].token_ids_T) == ("too_long", (1, 2))
    async with sampling(http(GOOD), max_seq_len=2) as (sampler, script):
        unsent = await sampler.sample(Problem("p", prompt=(7, 8)), 0)
    assert (unsent.failure, script.requests) == ("too_long", [])


async def test_an_endless_answer_is_cut_off() -> None:
    sample = await sample_once(http(b": x\n" * (400 << 10)))
    assert sample.failure == "too_long"


async def test_prompt_ids_must_come_back_as_sent() -> None:
    assert (await sample_once(http(GOOD), problem=Problem("p", (7, 8)))).failure is None
    changed = await sample_once(http(GOOD), problem=Problem("p", (7, 9)))
    assert (changed.failure, changed.provenance.attempts) == ("malformed", 1)


async def test_weights_are_told_from_the_stream() -> None:
    other = MODEL.replace("000003", "000002")
    straddling = token(1, "a", other) + token(2, "b") + last([1, 2]) + DONE
    sample = await sample_once(http(straddling))
    assert sample.weights is Weights.STRADDLING
    assert sample.provenance.first == "run-000002-0badf00d"
    assert sample.provenance.last == IDENTITY
    stale = token(1, "a", other) + last([1], other) + DONE
    assert (await sample_once(http(stale))).weights is Weights.OTHER
    silent = token(1, "a", "m") + last([1], "m") + DONE
    assert (await sample_once(http(silent))).weights is Weights.ASSUMED


async def test_an_answer_without_weights_fails_once_another_has_named_them() -> None:
    """Base weights have no name: a replica that fell back to them says nothing."""
    silent = http(token(1, "a", "m") + last([1], "m") + DONE)
    async with sampling(silent, http(GOOD), silent, http(GOOD)) as (sampler, _):
        samples = [await sampler.sample(PROBLEM, number) for number in range(4)]
        assert sampler.failed_attempts == {"other_weights": 1}
    assert [sample.failure for sample in samples] == [None, None, "other_weights", None]
    assert samples[0].weights is Weights.ASSUMED
    assert samples[2].provenance.attempts == 1
    assert "base weights" in samples[2].detail


async def test_attempts_hold_a_slot_and_waits_do_not() -> None:
    in_flight: list[int] = []

    async def counted(request: Request) -> bytes:
        in_flight.append(sampler.in_flight)
        return http(b"", 500) if request.number == 0 else http(GOOD)

    waiting, second_done = asyncio.Event(), asyncio.Event()

    async def nap(seconds: float) -> None:
        waiting.set()
        await second_done.wait()

    one_slot = {"mode": "fixed", "initial_window": 1}
    async with sampling(counted, naps=nap, concurrency=one_slot) as (sampler, _):
        first = asyncio.create_task(sampler.sample(PROBLEM, 0))
        await waiting.wait()
        assert (await sampler.sample(PROBLEM, 1)).failure is None  # its slot is free meanwhile
        second_done.set()
        assert (await first).failure is None
        assert in_flight == [1, 1, 1]


async def test_a_cancelled_sample_gives_its_slot_back() -> None:
    entered = asyncio.Event()

    async def good(request: Request) -> bytes:
        entered.set()
        return http(GOOD)

    async with sampling(good, concurrency={"mode": "fixed", "initial_window": 1}) as (sampler, _):
        first = asyncio.create_task(sampler.sample(PROBLEM, 0))
        queued = asyncio.create_task(sampler.sample(PROBLEM, 1))
        await entered.wait()
        queued.cancel()
        first.cancel()
        await asyncio.gather(first, queued, return_exceptions=True)
        assert (await sampler.sample(PROBLEM, 2)).failure is None
        assert sampler.in_flight == 0


async def test_the_probe_of_check_and_warm_up() -> None:
    naps = Naps()
    async with ScriptedServer(
        http(b"", 503), http(b"{}", 200, "application/json")
    ).running() as script:
        assert await client(script.port).warm_up(retries=10, sleep=naps)
        assert naps.seconds == [10.0]
        assert script.requests[0].body == {
            "model": "accounts/a/models/m",
            "prompt": [1, 2],
            "max_tokens": 4,
            "temperature": 0,
        }
        [line] = await client(script.port).check()
        assert line.ok
    async with ScriptedServer(http(b"", 503)).running() as script:
        assert not await client(script.port).warm_up(retries=3, sleep=Naps())
        assert len(script.requests) == 3
    async with ScriptedServer(http(b"", 404), http(b"", 401)).running() as script:
        assert not await client(script.port).warm_up(retries=9, sleep=Naps())
        assert len(script.requests) == 2
    for status in (401, 404):
        async with ScriptedServer(http(b"<html>", status, "text/html")).running() as script:
            [line] = await client(script.port).check()
            assert not line.ok
            assert str(status) in line.found


async def test_the_preflight_asks_for_one_token_and_once() -> None:
    for status, error in ((404, ServiceRefusedError), (503, ServiceUnavailableError)):
        async with ScriptedServer(http(b"{}", status, "application/json")).running() as script:
            with pytest.raises(error, match=f"HTTP {status}"):
                await client(script.port).ask_first(Sampling())
        [request] = script.requests
        body = {"model": "accounts/a/models/m", "prompt": [1, 2], "max_tokens": 1, "temperature": 0}
        assert request.body == body
        assert "x-multi-turn-session-id" not in request.headers


async def test_a_sample_that_is_refused_says_the_remedy_of_the_check() -> None:
    for status in (401, 402, 403, 412):
        refused = http(b"{}", status, "application/json")
        async with sampling(refused, refused) as (sampler, script):
            with pytest.raises(ServiceRefusedError) as caught:
                await sampler.sample(PROBLEM, 0)
            [line] = await client(script.port).check()
        assert line.advice
        assert str(caught.value).endswith(f". {line.advice}")


async def test_no_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    [line] = await client(1, api_key="").check()
    assert "FIREWORKS_API_KEY" in line.advice
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    [line] = await client(1, api_key="").check()
    assert KEY not in str(line)


def test_secrets_and_addresses() -> None:
    saved = block(1)
    assert KEY not in repr(saved) + str(saved) + repr(saved.open())
    assert client(1, model_addressing="deployment").model == "accounts/a/deployments/d"
    for url in ("ftp://x", "http://user:pw@x", "x", "http://"):
        with pytest.raises(ValueError, match="expected an"):
            client(1, base_url=url)
