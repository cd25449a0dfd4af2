"""Every fault of protocol §21, ordered at run time or by a plan."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from emulator.control.faults import FAULTS, Faults, InvalidFaultError, read_plan
from tests.waiting import PATIENCE_SECONDS

Start = Callable[..., Any]
Events = Callable[[httpx.Response], list[dict[str, Any]]]


@pytest.mark.parametrize("status", [425, 404, 409, 429, 500, 503, 401, 402])
def test_inference_answers_the_ordered_status(start: Start, status: int) -> None:
    caller = start(replica_count=1)
    caller.fault("respond", status=status, retry_after=3, count=2, after=1)
    codes = [caller.complete() for _ in range(4)]
    assert [answer.status_code for answer in codes] == [200, status, status, 200]
    assert codes[1].headers["retry-after"] == "3"
    assert codes[1].json()["error"]["type"]
    assert [r["status"] for r in caller.log()["requests"]] == [200, status, status, 200]


def test_faults_strike_only_where_they_are_told(start: Start, publisher: Any) -> None:
    caller = start(replica_count=2)
    caller.fault("respond", replica=1)
    codes = {
        session: caller.complete(headers={"x-session-affinity": session}).status_code
        for session in "abcd"
    }
    homes = {r["session"]: r["replica"] for r in caller.log()["requests"]}
    assert {codes[s]: homes[s] for s in "abcd"} == {503: "replica-1", 200: "replica-0"}
    caller.clear_faults()
    caller.fault("respond", identity="a", status=500)
    assert caller.complete().status_code == 200
    publisher.full("a")
    caller.load("a")
    assert caller.complete().status_code == 500


def test_a_signal_may_be_accepted_and_answered_with_an_error(start: Start, publisher: Any) -> None:
    caller = start()
    publisher.full("a")
    caller.fault("respond", operation="signal", status=503, accepted=True, count=1)
    assert caller.signal("a").status_code == 503
    caller.tick()
    assert caller.served() == ["a", "a"]
    caller.load("a")  # the same body again
    assert caller.applied()["replica-0"] == [("a", "applied")]


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("status", "/hot_load/v1/models/hot_load"),
        ("ledger", "/v1/accounts/local/deployments/rollouts/ledger"),
        ("deployment", "/v1/accounts/local/deployments/rollouts"),
    ],
)
def test_reads_may_fail_now_and_then(start: Start, operation: str, path: str) -> None:
    caller = start(replica_count=1)
    caller.fault("respond", operation=operation, status=502, count=1)
    caller.fault("respond", operation=operation, status=200, body="<html>login</html>", count=1)
    bad, odd, good = (caller.http.get(path) for _ in range(3))
    assert bad.status_code == 502
    assert ("code" in bad.json()) == path.startswith("/v1")
    assert (odd.status_code, odd.headers["content-type"][:9], odd.text[:6]) == (
        200,
        "text/html",
        "<html>",
    )
    assert isinstance(good.json(), dict)


def test_streams_are_truncated(start: Start, read_events: Events) -> None:
    caller = start(replica_count=1)
    ask = {"max_tokens": 40, "ignore_eos": True, "stream": True}
    caller.fault("truncate_stream", after_tokens=10, count=1)
    answer = caller.complete(**ask)
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    chunks = read_events(answer)
    assert len(chunks) > 1
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    caller.fault("truncate_stream", after_tokens=10, abrupt=True, count=1)
    with pytest.raises(httpx.RemoteProtocolError):
        caller.complete(**ask)
    assert "[DONE]" in caller.complete(**ask).text
    assert [r["status"] for r in caller.log()["requests"]] == [499, 499, 200]


@pytest.mark.parametrize("as_event", [False, True])
def test_errors_come_inside_a_stream(start: Start, read_events: Events, as_event: bool) -> None:
    caller = start(replica_count=1)
    caller.fault("stream_error", status=429, after_tokens=0, as_event=as_event)
    answer = caller.complete(stream=True)
    assert answer.status_code == 200
    assert read_events(answer)[-1]["error"]["status_code"] == 429
    assert ("event: error\n" in answer.text) == as_event


def test_connections_break_and_hang(start: Start) -> None:
    caller = start(replica_count=1)
    caller.fault("disconnect", count=1)
    with pytest.raises(httpx.RemoteProtocolError):
        caller.complete()
    assert [r["status"] for r in caller.log()["requests"]] == [499]
    caller.fault("hang", operation="status", count=1)
    broken = threading.Event()

    def ask() -> None:
        try:
            caller.replicas()
        except httpx.RemoteProtocolError:
            broken.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while not caller.http.get("/emulator/faults").json()["faults"][-1]["struck"]:
        pass
    assert thread.is_alive()
    caller.clear_faults()
    thread.join(PATIENCE_SECONDS)
    assert broken.is_set()
    assert caller.served() == [None]


def test_drain_expiry(start: Start) -> None:
    caller = start(replica_count=1)
    caller.fault("drain_expiry", count=1)
    answer = caller.complete(stream=True)
    assert (answer.status_code, "drain timeout" in answer.text) == (425, True)
    assert caller.complete().status_code == 200


def test_the_status_shows_what_is_ordered(start: Start, publisher: Any) -> None:
    caller = start()
    publisher.full("a")
    caller.load("a")
    caller.fault("empty_replicas", count=1)
    assert caller.replicas() == []
    caller.fault("odd_stage", stage="warming up", replica="replica-0", count=1)
    assert caller.stages() == ["warming up", "completed"]
    caller.fault("stale_error", target="old", count=1)
    caller.fault("stale_error", count=1)
    states = [each["loading_state"] for each in caller.replicas()]
    assert states == [{"stage": "error", "target_snapshot_identity": "old"}, {"stage": "error"}]
    assert caller.stages() == ["completed", "completed"]


def test_a_lagging_replica_and_first_ready_only(start: Start, publisher: Any) -> None:
    caller = start(replica_count=3, clock="ticks")
    publisher.full("a")
    caller.fault("lagging_replica", replica=2, seconds=50, count=1)
    caller.load("a")
    assert caller.served() == ["a", "a", None]
    caller.tick(50)
    assert caller.served() == ["a"] * 3
    caller.fault("first_ready_only", identity="b")
    caller.fault("lagging_replica", replica=1, identity="c")
    for identity, previous in (("b", "a"), ("c", "b")):
        publisher.delta(identity, previous)
        caller.load(identity, previous)
        expected = [identity, previous, previous if identity == "b" else identity]
        assert caller.served() == expected
        caller.clear_faults() if identity == "c" else caller.http.delete(
            "/emulator/faults?number=2"
        )
        caller.tick()
        assert caller.served() == [identity] * 3


def test_a_torn_apply_needs_a_full(start: Start, publisher: Any, tmp_path: Path) -> None:
    caller = start(replica_count=2)
    publisher.full("a")
    publisher.delta("b", "a")
    caller.fault("torn_apply", replica=1, identity="b", count=1)
    caller.load("a")
    caller.load("b", "a")
    assert caller.served() == ["b", "a"]
    torn = caller.replicas()[1]["loading_state"]
    assert torn == {"stage": "error", "target_snapshot_identity": "b"}
    (held,) = (tmp_path / "work").glob("emulator-*/replica-1/held/a")
    source = publisher.checkpoint("a")
    names = [path.name for path in source.glob("*.safetensors")]
    changed = [n for n in names if (held / n).read_bytes() != (source / n).read_bytes()]
    assert len(changed) == 1
    publisher.delta("c", "b")
    caller.load("c", "b")
    assert caller.served() == ["c", "a"]
    publisher.full("d", seed=5)
    caller.load("d")
    assert caller.served() == ["d", "d"]
    assert caller.applied()["replica-1"] == [
        ("a", "applied"),
        ("b", "error"),
        ("c", "error"),
        ("d", "applied"),
    ]


def test_a_corrupt_object(start: Start, publisher: Any) -> None:
    caller = start()
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    caller.fault("corrupt_object", replica=0, file="layer-*", count=1)
    caller.load("b", "a")
    assert caller.served() == ["a", "b"]
    assert caller.stages() == ["error", "completed"]
    # In a full nothing but the weights themselves tells: no checksum travels with it.
    caller.fault("corrupt_object", replica=1, file="head.safetensors", offset=-2, count=1)
    publisher.full("c", seed=9)
    caller.load("c")
    assert caller.served() == ["c", "c"]
    ask = {"prompt": [1, 2], "logprobs": 5, "max_tokens": 1, "temperature": 0}
    answers = {
        r: caller.complete(headers={"x-session-affinity": str(r)}, **ask).json() for r in range(2)
    }
    found = [answer["choices"][0]["logprobs"]["token_logprobs"] for answer in answers.values()]
    assert found[0] != found[1]


def test_missing_and_late_objects(start: Start, publisher: Any) -> None:
    caller = start()
    publisher.full("a")
    caller.fault("missing_object", file="norm.safetensors", identity="a")
    answer = caller.signal("a")
    assert (answer.status_code, "norm.safetensors" in answer.text) == (400, True)
    caller.clear_faults()
    caller.fault("late_object", file="norm.safetensors", count=2)
    caller.load("a")  # looked for three times
    assert caller.served() == ["a", "a"]
    publisher.delta("b", "a")
    caller.fault("late_object", replica=1, file="head*", count=2)
    caller.fault("missing_object", replica=0, file="head*")
    caller.load("b", "a")
    assert caller.served() == ["a", "b"]
    caller.clear_faults()
    publisher.full("c", seed=8)
    caller.load("c")
    assert caller.served() == ["c", "c"]


def test_restart_to_base(start: Start, publisher: Any) -> None:
    caller = start()
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    caller.fault("restart_to_base", replica=1, count=1)
    caller.load("b", "a")
    assert caller.served() == ["b", None]
    caller.http.post(
        "/emulator/replicas", json={"action": "restart", "replica": 0, "on_base": True}
    )
    caller.tick()
    assert caller.served() == [None, None]
    publisher.full("c", seed=4)
    caller.load("c")
    assert caller.served() == ["c", "c"]


def test_another_party_resets_the_ledger(start: Start, publisher: Any) -> None:
    caller = start()
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    caller.fault("ledger_reset", count=1)
    assert caller.signal("b", "a").status_code == 400
    assert caller.served() == [None, None]


def test_the_prompt_cache_field_may_be_unknown(start: Start, publisher: Any) -> None:
    caller = start(reject_reset_prompt_cache=True)
    publisher.full("a")
    answer = caller.signal("a", reset_prompt_cache="none")
    assert answer.status_code == 400
    assert "Extra inputs are not permitted, field: 'reset_prompt_cache'" in answer.text
    caller.load("a")
    assert caller.served() == ["a", "a"]


def test_a_plan_is_a_yaml_list(start: Start, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "- {fault: respond, status: 429, retry_after: 0.5, count: 1}\n- fault: odd_stage\n"
    )
    caller = start(replica_count=1, faults=read_plan(plan))
    assert caller.complete().status_code == 429
    assert caller.complete().status_code == 200
    assert caller.stages() == ["warming"]
    listed = caller.http.get("/emulator/faults").json()["faults"]
    assert [(f["number"], f["fault"], f["left"], f["struck"]) for f in listed] == [
        (1, "respond", 0, 1),
        (2, "odd_stage", None, 1),
    ]
    assert caller.http.delete("/emulator/faults?number=2").json() == {"cleared": 1}


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"fault": "nonsense"},
        {"fault": "respond", "stauts": 500},
        {"fault": "respond", "status": "500"},
        {"fault": "respond", "operation": "nothing"},
        {"fault": "respond", "count": -1},
        {"fault": "respond", "after": True},
        {"fault": "late_object"},
        {"faults": {"fault": "respond"}},
        {"faults": [{"fault": "odd_stage"}, {"fault": "nonsense"}]},
    ],
)
def test_unknown_faults_are_refused_whole(start: Start, order: dict[str, Any]) -> None:
    caller = start(replica_count=1)
    assert caller.http.post("/emulator/faults", json=order).status_code == 400
    assert caller.http.get("/emulator/faults").json() == {"faults": []}


@pytest.mark.parametrize("text", ["a: [", "just text", "- fault: no", "faults: 3"])
def test_an_unreadable_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InvalidFaultError):
        read_plan(path)


def test_every_fault_can_be_ordered_with_its_defaults() -> None:
    faults = Faults()
    for name in FAULTS:
        faults.add({"fault": name, "count": 1})
    assert [shown["fault"] for shown in faults.render()] == list(FAULTS)
