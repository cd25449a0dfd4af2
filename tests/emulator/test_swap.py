"""What a request meets while weights are swapped underneath it (protocol §9)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.waiting import PATIENCE_SECONDS

Start = Callable[..., Any]
Events = Callable[[httpx.Response], list[dict[str, Any]]]
SESSION = "x-multi-turn-session-id"


class Asking(threading.Thread):
    """A request under way in a thread of its own."""

    def __init__(self, ask: Callable[[], httpx.Response]) -> None:
        super().__init__(daemon=True)
        self._ask = ask
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = self._ask()

    def result(self) -> httpx.Response:
        self.join(PATIENCE_SECONDS)
        assert self.answer is not None, "no answer"
        return self.answer


@contextmanager
def asking(caller: Any, ask: Callable[[], httpx.Response]) -> Iterator[Asking]:
    """A request that the emulator has taken up when the body begins."""
    before = len(caller.log()["requests"])
    thread = Asking(ask)
    # It is in the log before its body has come, and at a replica after that.
    while not any(one["replica"] for one in caller.log()["requests"][before:]):
        assert thread.is_alive() or thread.answer is not None
    caller.tick()
    yield thread


def identities(chunks: list[dict[str, Any]]) -> list[str | None]:
    """The identity of every chunk, repetitions left out."""
    found: list[str | None] = []
    for chunk in chunks:
        identity = chunk["model"].partition("@")[2] or None
        if identity not in found[-1:]:
            found.append(identity)
    return found


def test_async_pauses_a_stream_and_resumes_it_on_new_weights(
    start: Start, publisher: Any, read_events: Events
) -> None:
    caller = start(replica_count=1, clock="ticks", seconds_per_state=1.0, seconds_per_token=1.0)
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    caller.tick(3)
    ask = {"max_tokens": 12, "stream": True, "logprobs": True, "seed": 1, "ignore_eos": True}
    with asking(caller, lambda: caller.complete(**ask)) as stream:
        caller.load("b", "a")
        caller.tick(2.5)  # pending and downloading are over, the swap has begun
        assert caller.served() == ["not ready"]
        caller.tick(100)
        answer = stream.result()
    chunks = read_events(answer)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert identities(chunks) == ["a", "b"]
    tokens = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert len(tokens) == 12
    entry = caller.log()["requests"][-1]
    assert (entry["identity_first"], entry["identity_last"]) == ("a", "b")


def test_async_holds_a_new_request_until_the_swap_is_over(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1, clock="ticks", seconds_per_state=1.0)
    publisher.full("a")
    caller.load("a")
    caller.tick(2)
    assert caller.served() == ["not ready"]
    with asking(caller, caller.complete) as held:
        assert held.answer is None
        caller.tick(1)
        answer = held.result()
    assert answer.status_code == 200
    assert answer.json()["model"].endswith("@a")


def test_the_drain_timeout_ends_a_hold_with_425(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1, clock="ticks", seconds_per_state=1.0)
    publisher.full("a")
    caller.fault("slow_swap", seconds=1000.0)
    caller.load("a")
    caller.tick(2)
    header = {"x-fireworks-hot-load-drain-timeout": "20"}
    with (
        asking(caller, lambda: caller.complete(headers=header)) as short,
        asking(caller, caller.complete) as long,
    ):
        caller.tick(30)
        assert short.result().status_code == 425
        assert long.answer is None
        caller.tick(70)  # 90 s by default
        assert long.result().status_code == 425
    caller.tick(1000)
    assert caller.complete().status_code == 200


def test_a_paused_stream_gets_425_inside(start: Start, publisher: Any, read_events: Events) -> None:
    caller = start(replica_count=1, clock="ticks", seconds_per_state=1.0, seconds_per_token=1.0)
    publisher.full("a")
    caller.fault("slow_swap", seconds=1000.0)
    with asking(
        caller, lambda: caller.complete(max_tokens=50, stream=True, ignore_eos=True)
    ) as stream:
        caller.load("a")
        caller.tick(500)
        chunks = read_events(stream.result())
    assert chunks[-1]["error"]["status_code"] == 425
    assert "[DONE]" not in stream.result().text


def test_sync_finishes_requests_on_old_weights_and_refuses_new_ones(
    start: Start, publisher: Any, read_events: Events
) -> None:
    settings = {"clock": "ticks", "seconds_per_state": 1.0, "seconds_per_token": 1.0}
    caller = start(replica_count=1, transition="SYNC", **settings)
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    caller.tick(3)
    ask = {"max_tokens": 10, "stream": True, "ignore_eos": True}
    with asking(caller, lambda: caller.complete(**ask)) as stream:
        caller.load("b", "a")
        caller.tick(5)
        assert caller.served() == ["not ready"]
        assert caller.complete().status_code == 425
        caller.tick(5)
        assert identities(read_events(stream.result())) == ["a"]
    caller.tick(1)
    assert caller.served() == ["b"]


def test_sync_may_queue_new_requests(start: Start, publisher: Any) -> None:
    caller = start(
        replica_count=1,
        transition="SYNC",
        sync_new_requests="queue",
        clock="ticks",
        seconds_per_state=1.0,
    )
    publisher.full("a")
    caller.load("a")
    caller.tick(2)
    header = {"x-fireworks-hot-load-drain-timeout": "0"}  # means nothing under SYNC
    with asking(caller, lambda: caller.complete(headers=header)) as queued:
        assert queued.answer is None
        caller.tick(1)
        assert queued.result().json()["model"].endswith("@a")


def test_a_restart_ends_requests_that_run_there(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1, clock="ticks", seconds_per_state=1.0, seconds_per_token=1.0)
    with asking(caller, lambda: caller.complete(max_tokens=50, ignore_eos=True)) as request:
        caller.http.post("/emulator/replicas", json={"action": "restart", "replica": 0})
        assert caller.complete().status_code == 404  # not routable until it is back
        caller.tick(2)
        assert request.result().status_code == 502
    with asking(caller, lambda: caller.complete(max_tokens=1)) as request:
        caller.tick(1)
        assert request.result().status_code == 200


PROMPT = list(range(40))
TURN = [*PROMPT, 50, 51, 52]


@pytest.mark.parametrize(
    ("policy", "reused"),
    [(None, 0), ("all", 0), (True, 0), ("new_session", 0), ("none", 40), (False, 40)],
)
def test_a_new_session_after_a_swap(
    start: Start, publisher: Any, policy: object, reused: int
) -> None:
    caller = start(replica_count=1)
    publisher.full("a")

    def cached(session: str | None, prompt: list[int]) -> int:
        headers = {SESSION: session} if session else {}
        answer = caller.complete(prompt=prompt, max_tokens=1, ignore_eos=True, headers=headers)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("s", PROMPT) == 0
    assert cached("s", TURN) == 40  # without a swap a prefix is reused, by everybody
    assert cached("t", TURN) == 42
    assert cached("u", [99, *PROMPT]) == 0
    caller.load("a", **({} if policy is None else {"reset_prompt_cache": policy}))
    assert cached("v", [*PROMPT, 60]) == reused


@pytest.mark.parametrize(("policy", "reused"), [("all", 0), ("new_session", 42), ("none", 42)])
def test_an_existing_session_after_a_swap(
    start: Start, publisher: Any, policy: str, reused: int
) -> None:
    caller = start(replica_count=1)
    publisher.full("a")
    headers = {SESSION: "s"}
    caller.complete(prompt=TURN, max_tokens=1, headers=headers)
    caller.load("a", reset_prompt_cache=policy)
    answer = caller.complete(prompt=TURN, max_tokens=1, headers=headers)
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == reused


def test_sessions_stay_on_their_replica(start: Start) -> None:
    caller = start(replica_count=3)
    for _ in range(3):
        for session in "abcdef":
            caller.complete(headers={SESSION: session})
    requests = caller.log()["requests"]
    homes = {
        session: {r["replica"] for r in requests if r["session"] == session} for session in "abcdef"
    }
    assert all(len(replicas) == 1 for replicas in homes.values())
    assert set.union(*homes.values()) == {"replica-0", "replica-1", "replica-2"}
