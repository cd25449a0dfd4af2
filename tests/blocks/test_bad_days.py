"""What the client makes of services that break, refuse, hang and tell half of it."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from hotload.options import Sampling
from hotload.rollout.trajectory import Weights
from tests.blocks.scripted_inference import (
    DONE,
    GOOD,
    IDENTITY,
    KEY,
    MODEL,
    PROBLEM,
    Naps,
    client,
    event,
    last,
    sample_once,
    sampling,
    token,
)
from tests.scripted_server import Request, ScriptedServer, http, never

OTHER = MODEL.replace("000003", "000004")


@pytest.mark.slow
async def test_streams_cut_at_every_byte_are_asked_for_again() -> None:
    # Up to the blank line after the last chunk there is no whole answer; after it, only the closing
    # event is missing, which a connection that ends properly may leave out.
    whole_at = GOOD.index(DONE)
    replies: list[bytes] = []
    for cut in range(len(GOOD)):
        replies += [http(GOOD[:cut], length=len(GOOD)), http(GOOD)]
        replies += [http(GOOD[:cut]), http(GOOD)] if cut < whole_at else [http(GOOD[:cut])]
    attempts: Counter[int] = Counter()
    async with sampling(*replies) as (sampler, script):
        for cut in range(len(GOOD)):
            for is_whole in (False, cut >= whole_at):
                sample = await sampler.sample(PROBLEM, 0)
                assert (sample.failure, sample.segments[0].token_ids_T) == (None, (1, 2)), cut
                assert sample.provenance.attempts == (1 if is_whole else 2), cut
                attempts[sample.provenance.attempts] += 1
    assert len(script.requests) == len(replies)
    assert attempts == {2: len(GOOD) + whole_at, 1: len(GOOD) - whole_at}


@pytest.mark.parametrize("newline", [b"\r\n", b"\n"])
async def test_streams_written_in_other_ways(newline: bytes) -> None:
    stream = GOOD.replace(b"\n", newline)
    for body in (stream, b": hello" + newline * 2 + stream, b"event: chunk" + newline + stream):
        sample = await sample_once(http(body))
        assert (sample.failure, sample.segments[0].token_ids_T) == (None, (1, 2)), body


async def test_a_storm_of_425_ends_with_every_sample() -> None:
    naps, storm = Naps(), 100
    async with sampling(*[http(b"{}", 425)] * storm, http(GOOD), naps=naps) as (sampler, script):
        samples = await asyncio.gather(*(sampler.sample(PROBLEM, i) for i in range(20)))
        report = sampler.end_step()
    assert [sample.failure for sample in samples] == [None] * 20
    assert sum(sample.provenance.attempts for sample in samples) == storm + 20
    assert len(script.requests) == report.requests == storm + 20
    assert all(2.5 <= nap < 7.5 for nap in naps.seconds)
    assert report.congestion_responses == report.retry_exhaustions == 0


async def test_a_drain_that_holds_requests_uses_up_the_swap_budget() -> None:
    release = asyncio.Event()

    async def held(request: Request) -> bytes:
        await release.wait()
        return http(b"{}", 425)

    async with (
        ScriptedServer(held).running() as script,
        client(script.port).session(
            Sampling(),
            identity=IDENTITY,
            policy_version=0,
            swap_timeout_seconds=0.05,
            sleep=Naps(),
        ) as sampler,
    ):
        asyncio.get_running_loop().call_later(0.1, release.set)
        sample = await sampler.sample(PROBLEM, 0)
    assert (sample.failure, sample.provenance.attempts) == ("swap_timeout", 1)


async def test_requests_that_time_out_while_weights_are_swapped_open_the_breaker() -> None:
    """A swap refuses the first attempt and holds the others; time-outs alone are no swap."""
    is_swapping = False

    async def held(request: Request) -> bytes:
        attempt = seen[request.headers["x-request-id"]] = seen[request.headers["x-request-id"]] + 1
        return http(b"", 425 if is_swapping and attempt == 1 else 504)

    seen: Counter[str] = Counter()
    async with sampling(held) as (sampler, _):
        for number in range(10):
            assert (await sampler.sample(PROBLEM, number)).failure == "timeout"
        assert not sampler.breaker.is_open
        is_swapping = True
        for number in range(10, 15):
            assert not sampler.breaker.is_open
            assert (await sampler.sample(PROBLEM, number)).failure == "timeout"
        assert sampler.breaker.is_open


async def test_refusals_with_and_without_a_time_to_wait() -> None:
    naps = Naps()
    replies = [http(b"", 429, retry_after="7")] * 3 + [http(b"", 429)] * 3
    async with sampling(*replies, http(GOOD), naps=naps) as (sampler, _):
        sample = await sampler.sample(PROBLEM, 0)
        report = sampler.end_step()
    assert (sample.failure, sample.provenance.attempts) == (None, 7)
    assert [nap >= 7 for nap in naps.seconds[:3]] == [True] * 3
    for nap, wait in zip(naps.seconds[3:], (16, 30, 30), strict=True):
        assert 0.5 * wait <= nap < 1.5 * wait
    assert (report.requests, report.congestion_responses) == (7, 6)


async def test_another_identity_than_expected_is_told() -> None:
    sample = await sample_once(http(token(1, "a", OTHER) + last([1], OTHER) + DONE))
    assert (sample.failure, sample.weights) == (None, Weights.OTHER)
    assert sample.provenance.identity == IDENTITY
    assert sample.provenance.runs == ((0, "run-000004-0badf00d"),)


CHANGING = token(1, "a") + token(2, "b", OTHER) + token(3, "c", OTHER) + last([1, 2, 3], OTHER)


@pytest.mark.parametrize(
    ("policy", "failure", "mask"),
    [
        ("accept", None, (True, True, True)),
        ("drop", "straddling", (True, True, True)),
        ("mask_from_change", None, (True, False, False)),
    ],
)
async def test_an_identity_that_changes_in_mid_stream(
    policy: str, failure: str | None, mask: tuple[bool, ...]
) -> None:
    sample = await sample_once(http(CHANGING + DONE), groups={"on_straddling": policy})
    assert (sample.failure, sample.segments[0].loss_mask_T) == (failure, mask)
    assert sample.weights is Weights.STRADDLING
    assert sample.provenance.runs == ((0, IDENTITY), (1, "run-000004-0badf00d"))
    assert sample.segments[0].token_ids_T == (1, 2, 3)


async def test_an_answer_longer_than_asked_fails_once() -> None:
    many = b"".join(token(i, "x") for i in range(9)) + last(list(range(9))) + DONE
    sample = await sample_once(http(many))
    assert (sample.failure, sample.provenance.attempts, sample.segments[0].token_ids_T) == (
        "too_long",
        1,
        (),
    )


@pytest.mark.parametrize(
    "body",
    [
        b"data: {not json\n\n",
        b"data: {}\n\ndata: {not json\n\n",
        b'data: {"choices": [\n\ndata: ]}\n\n',
        b'data: {"choices": []},{"choices": []}\n\n',
        b"data: \xff\xfe\n\n",
        b"data: null\n\n",
        b'data: {"choices": [[]]}\n\n',
        b"data: " + b"[" * 2000 + b"\n\n",
    ],
)
async def test_malformed_events_are_asked_for_again_and_then_given_up(body: bytes) -> None:
    async with sampling(http(body + GOOD)) as (sampler, script):
        sample = await sampler.sample(PROBLEM, 0)
    assert (sample.failure, sample.provenance.attempts) == ("malformed", 7)
    assert len(script.requests) == 7


@pytest.mark.parametrize("status", [200, 429, 500])
async def test_an_error_too_deep_to_be_written_out_is_one_attempt_s(status: int) -> None:
    deep = b'{"error": {"code": %b1%b, "message": "x"}}' % (b"[" * 900, b"]" * 900)
    bad = http(b"data: " + deep + b"\n\n") if status == 200 else http(deep, status)
    async with sampling(bad, http(GOOD)) as (sampler, _):
        sample = await sampler.sample(PROBLEM, 0)
    assert sample.failure is None
    assert sample.provenance.failed_attempts == ("502" if status == 200 else str(status),)


async def test_malformed_plain_bodies() -> None:
    for body in (b"", b"{", b"[]", b"3", b'{"choices": 3}'):
        sample = await sample_once(http(body, content_type="application/json"))
        assert (sample.failure, sample.provenance.attempts) == ("malformed", 7), body


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999999\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"", b""),
        (HEAD, b""),
        (HEAD + token(1, "a"), b""),
        (HEAD + token(1, "a"), b": keepalive\n\n"),
        (HEAD, b"event: ping\ndata: {}\n\n"),
    ],
)
async def test_a_replica_that_hangs_for_ever_is_a_timeout(begin: bytes, more: bytes) -> None:
    async def hanging(request: Request) -> AsyncIterator[bytes]:
        yield begin
        while more:
            yield more
        await never()

    async with (
        ScriptedServer(hanging).running() as script,
        client(script.port).session(
            Sampling(sample_timeout=0.02), identity=IDENTITY, policy_version=0, sleep=Naps()
        ) as sampler,
    ):
        sample = await sampler.sample(PROBLEM, 0)
        report = sampler.end_step()
    assert (sample.failure, sample.provenance.attempts) == ("timeout", 7)
    assert report.requests == 7


@pytest.mark.parametrize("host", ["nowhere.invalid", "127.0.0.1:1", "a..b", "[::1]:1"])
async def test_nobody_is_there(host: str) -> None:
    async with client(1, base_url=f"http://{host}").session(
        Sampling(), identity=IDENTITY, policy_version=0, sleep=Naps()
    ) as sampler:
        sample = await sampler.sample(PROBLEM, 0)
        report = sampler.end_step()
    assert (sample.failure, sample.provenance.attempts) == ("connection", 7)
    assert report.congestion_responses == 7
    assert KEY not in sample.detail


async def test_a_connection_reset_in_mid_stream_is_asked_for_again() -> None:
    async def reset(request: Request) -> AsyncIterator[bytes]:
        yield http(token(1, "a"), length=len(GOOD))
        raise ConnectionResetError

    async with (
        ScriptedServer(reset, http(GOOD)).running() as script,
        client(script.port).session(
            Sampling(), identity=IDENTITY, policy_version=3, sleep=Naps()
        ) as sampler,
    ):
        sample = await sampler.sample(PROBLEM, 0)
    assert (sample.failure, sample.segments[0].token_ids_T, sample.provenance.attempts) == (
        None,
        (1, 2),
        2,
    )


async def test_missing_ids_and_logprobs_fail_one_sample_each() -> None:
    def without(*names: str) -> bytes:
        chunks = []
        for text in GOOD.decode().split("\n\n")[:-2]:
            chunk = json.loads(text.removeprefix("data: "))
            for choice in chunk["choices"]:
                for part in (choice.get("raw_output", {}), *_entries(choice)):
                    for name in names:
                        part.pop(name, None)
            chunks.append(event(chunk))
        return b"".join(chunks) + DONE

    expected = {
        ("token_id", "completion_token_ids"): "missing_token_ids",
        ("prompt_token_ids",): "missing_token_ids",
        ("logprob", "sampling_logprob"): "missing_logprobs",
        ("token_id",): None,
        ("completion_token_ids",): None,
        ("sampling_logprob",): None,
    }
    for names, failure in expected.items():
        sample = await sample_once(http(without(*names)))
        assert (sample.failure, sample.provenance.attempts) == (failure, 1), names


def _entries(choice: dict[str, dict[str, list[dict[str, object]]]]) -> list[dict[str, object]]:
    return choice.get("logprobs", {}).get("content", [])
