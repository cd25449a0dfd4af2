"""Agents behind a door: what is signalled is served by every engine, whatever happens between."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.door import seen
from agent.door.agent_fleet import AgentFleet, DoorConfig
from agent.failures import RefusedError
from agent.fleet.addresses import Addresses
from agent.fleet.report import AgentReport
from agent.fleet.state import FleetEvent, FleetState
from hotload.clients.store.store import Store
from tests.agent.conftest import HOT_LOAD, LEDGER, NAMES
from tests.agent.tiny_engine import digests
from tests.scripted_server import JSON, endless, http
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.server


def test_a_chain_reaches_every_engine(two: Any) -> None:
    publisher = two.publisher
    publisher.full("a")
    two.load("a")
    publisher.delta("b", "a")
    two.load("b", "a")
    publisher.delta("c", "b", seed=5)
    two.load("c", "b")
    two.check("c")
    assert {one.engine.version for one in two.agents} == {"c"}
    assert two.states() == [("completed", "c")] * 2
    for one in two.agents:
        assert (one.directory / "current").resolve().name == "c"
        assert [path.name for path in (one.directory / "held").iterdir()] == ["c"]
    assert two.signal("c", "b").status_code == 200  # again: nothing happens
    assert two.signal("c").status_code == 400
    entries = two.ask("GET", LEDGER).json()["entries"]
    assert [entry["identity"] for entry in entries] == ["c", "b", "a"]
    described = two.ask("GET", LEDGER.removesuffix("/ledger")).json()
    assert (described["desiredReplicaCount"], described["state"]) == (2, "READY")


@pytest.mark.parametrize("names", [{"fireworks-model": "accounts/local/models/other"}, {}])
def test_no_wrong_name_is_let_in(two: Any, names: dict[str, str]) -> None:
    two.publisher.full("a")
    if names:
        answer = two.ask("POST", HOT_LOAD, {"identity": "a"}, **names)
    else:
        answer = two.ask("GET", "/v1/accounts/local/deployments/other")
    assert answer.status_code == 404
    assert two.served() == [None, None]


def test_a_late_joiner_replays_the_chain_and_tells_its_engine_once(two: Any) -> None:
    publisher = two.publisher
    publisher.full("a")
    publisher.delta("b", "a")
    publisher.delta("c", "b", seed=5)
    two.load("a")
    two.load("b", "a")
    two.load("c", "b")
    late = two.agent("late")
    late.process.wait()
    wait_until(lambda: late.report()["current"] == "c" and late.report()["readiness"])
    two.check("c", late)
    told = [body["name"] for path, body in late.engine.calls if path == "/reload"]
    assert told == ["c"]


def kill_while_its_engine_reads(two: Any) -> Any:
    """Leave the left agent killed, and its engine held after the first shard of `b`."""
    left, _ = two.agents
    two.publisher.full("a")
    two.load("a")
    two.publisher.delta("b", "a")
    left.engine.holds.clear()
    left.engine.asked.clear()
    assert two.signal("b", "a").status_code == 200
    assert left.engine.asked.wait(60)  # merged, and the engine is at it
    left.kill()
    return left


def test_an_agent_killed_in_an_apply_goes_on_when_it_is_started_again(two: Any) -> None:
    left = kill_while_its_engine_reads(two)
    wait_until(lambda: two.served()[1] == "b")
    assert two.served()[0] == "not ready"
    left.engine.holds.set()
    left.start()
    wait_until(lambda: two.served() == ["b", "b"])
    two.check("b")
    two.publisher.delta("c", "b", seed=5)
    two.load("c", "b")
    two.check("c")


def test_an_agent_killed_while_its_engine_reads_turns_no_link_under_it(two: Any) -> None:
    left = kill_while_its_engine_reads(two)
    told = len(left.engine.calls)
    left.start()
    link = left.directory / "current"
    wait_until(lambda: left.engine.calls[told:] or link.resolve().name != "b")
    left.engine.holds.set()
    wait_until(lambda: two.served() == ["b", "b"])
    two.check("b")
    expected = {name: digests(two.publisher.checkpoint(name)) for name in ("a", "b")}
    named = [(name, serves) for name, serves in left.engine.sampled if name is not None]
    assert [name for name, serves in named if serves != expected[name]] == []
    wait_until(lambda: [path.name for path in (left.directory / "held").iterdir()] == ["b"])


def kill_before_it_hears_of_a_reload(two: Any) -> Any:
    """Leave the left agent killed, and its engine with a reload of `b` that has just ended."""
    left = kill_while_its_engine_reads(two)
    left.engine.holds.set()
    wait_until(lambda: left.engine.version == "b")
    return left


def test_a_reload_that_was_begun_and_is_refused_the_second_time_is_an_error(two: Any) -> None:
    left = kill_before_it_hears_of_a_reload(two)
    left.engine.refuses, left.engine.refusals_left = {"/reload"}, 1
    left.start()
    wait_until(lambda: two.states()[0] == ("error", "b"))
    wait_until(lambda: two.served() == ["a", "b"])
    two.check("a", left)


def test_what_was_not_sealed_before_the_machine_started_anew_is_loaded_again(two: Any) -> None:
    left = kill_before_it_hears_of_a_reload(two)
    (left.directory / "telling").write_text("another start of the machine")
    left.start()
    wait_until(lambda: two.served() == ["b", "b"])
    two.check("b")
    assert "b is torn, or was not sealed" in left.log()


def test_an_agent_killed_at_any_moment_converges(two: Any) -> None:
    left, right = two.agents
    two.publisher.full("v0")
    two.load("v0")
    for number in range(1, 5):
        identity, previous = f"v{number}", f"v{number - 1}"
        two.publisher.delta(identity, previous, seed=number)
        before = len(left.engine.calls)
        assert two.signal(identity, previous).status_code == 200
        # As soon as it has asked its engine so often since: before, in and after the load.
        wait_until(lambda: len(left.engine.calls) >= before + number - 1)  # noqa: B023
        left.kill()
        left.start()
        wait_until(lambda: two.served() == [identity] * 2)  # noqa: B023
        two.check(identity, left, right)


def test_what_was_torn_on_disk_is_found_and_mended_by_a_full(two: Any) -> None:
    left, _ = two.agents
    two.publisher.full("a")
    two.load("a")
    two.publisher.delta("b", "a")
    two.load("b", "a")
    left.kill()
    shard = next((left.directory / "held" / "b").glob("layer-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    left.start()
    wait_until(lambda: two.served() == ["b", "b"])  # from the anchor again
    two.check("b")
    assert "torn" in left.log()


def test_an_engine_that_refuses_the_reload_keeps_what_it_serves(two: Any) -> None:
    left, _ = two.agents
    two.publisher.full("a")
    two.load("a")
    two.publisher.delta("b", "a")
    left.engine.refuses, left.engine.refusals_left = {"/reload"}, 1
    assert two.signal("b", "a").status_code == 200
    wait_until(lambda: two.states() == [("error", "b"), ("completed", "b")])
    wait_until(lambda: two.served() == ["a", "b"])
    two.check("a", left)
    assert "500" in left.report()["error"]
    assert (left.directory / "current").resolve().name == "a"
    two.publisher.full("c", seed=6)
    two.load("c")
    two.check("c")


def test_an_engine_that_never_loads_again_is_not_ready(two: Any) -> None:
    left, _ = two.agents
    two.publisher.full("a")
    two.load("a")
    two.publisher.delta("b", "a")
    left.engine.refuses = {"/reload"}
    assert two.signal("b", "a").status_code == 200
    wait_until(lambda: two.served() == ["not ready", "b"])
    # It names the old version still, and half of its weights may be new.
    for _ in range(2):
        asked = len(left.engine.calls)
        wait_until(lambda: len(left.engine.calls) > asked + 3)  # noqa: B023 - it is asked at once
        assert two.served() == ["not ready", "b"]
        left.kill()
        left.start()
        wait_until(lambda: two.states()[0] == ("error", "b"))
    left.engine.refuses = set()
    two.publisher.full("c", seed=6)
    two.load("c")
    two.check("c")


def test_who_goes_back_after_a_long_trouble_is_known(two: Any) -> None:
    """Until it is well again, nobody can tell what it will go back to: the log keeps it."""
    left, _ = two.agents
    two.publisher.full("a")
    two.load("a")
    left.engine.refuses = {"/reload"}
    for seed, identity in enumerate(("b", "c", "d"), 5):
        two.publisher.full(identity, seed=seed)
        answer = two.signal(identity)
        assert answer.status_code == 200, answer.text
        expected = [("error", identity), ("completed", identity)]
        wait_until(lambda: two.states() == expected)  # noqa: B023 - it is asked at once
    asked = len(left.engine.calls)
    left.engine.refuses = {"/reload", "/info"}
    wait_until(lambda: len(left.engine.calls) > asked + 1)
    left.engine.refuses = set()
    wait_until(lambda: two.served() == ["a", "d"])
    for seed, identity in enumerate(("e", "f"), 8):
        two.publisher.full(identity, seed=seed)
        two.load(identity)
        two.check(identity)
    log = two.publisher.bucket / "_hotload" / "fleets" / "local" / "rollouts"
    assert len(list(log.iterdir())) == 2  # all were well: e, which they served, and f


def test_an_agent_that_looks_elsewhere_is_not_believed() -> None:
    """A misspelt `--deployment`: it waits for signals that nobody sends."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    state = FleetState.of([FleetEvent(event="signal", at=began, identity="a")], 1)
    remark = "no log at file:///b/_hotload/fleets/local/rollout: nothing was signalled there yet"
    lost = AgentReport(name="lost", engine="vllm", readiness=True, remark=remark)
    agents = [seen.SeenAgent("http://127.0.0.1:1", lost)]
    (new,) = seen.doubt(agents, state, {}, began + timedelta(seconds=1))
    (old,) = seen.doubt(agents, state, {}, began + timedelta(seconds=90))
    assert (new.problem, old.problem) == ("", f"looks elsewhere: {remark}")


def test_two_agents_beside_one_server_are_not_believed(two: Any) -> None:
    """A forgotten `--engine-url`: what one of them loads is lost when the other loads."""
    left, _ = two.agents
    two.agent("twin", serves=left.engine.url)
    two.open_door()
    wait_until(lambda: two.served() == ["not ready", None, "not ready"])
    two.publisher.full("a")
    answer = two.signal("a")
    assert answer.status_code == 503
    assert f"another agent stands beside the same server, {left.engine.url}" in answer.text


def test_an_engine_that_reports_another_version_is_not_believed(two: Any) -> None:
    left, _ = two.agents
    two.publisher.full("a")
    two.load("a")
    two.publisher.full("b", seed=6)
    left.engine.holds.clear()
    left.engine.asked.clear()
    assert two.signal("b").status_code == 200
    assert left.engine.asked.wait(60)
    left.engine.lies = "something"
    left.engine.holds.set()
    wait_until(lambda: two.served() == ["not ready", "b"])
    wait_until(lambda: "'something'" in left.report()["error"])
    left.engine.lies = None
    wait_until(lambda: two.served() == ["a", "b"])
    assert two.states()[0] == ("error", "b")


def test_an_engine_that_came_back_by_itself_is_told_again(two: Any) -> None:
    left, _ = two.agents
    two.publisher.full("a")
    two.load("a")
    left.engine.restart(left.directory / "current")
    wait_until(lambda: left.engine.version == "a")
    wait_until(lambda: two.served() == ["a", "a"])
    two.check("a")


def test_an_engine_without_the_route_is_told(two: Any) -> None:
    left = two.agent("odd", kind=["--engine", "vllm"])
    left.engine.refuses = {"/pause"}
    two.open_door()
    two.publisher.full("a")
    assert two.signal("a").status_code == 200
    wait_until(lambda: two.states()[2] == ("error", "a"))
    assert "POST /pause" in left.report()["error"]


def test_a_full_disk_is_an_error_and_what_was_held_stays(place: Any) -> None:
    # No file above 12 kB: the base's largest has 16.
    small = place.agent("small", shell="ulimit -f 12")
    place.open_door()
    place.publisher.full("a")
    assert place.signal("a").status_code == 200
    wait_until(lambda: place.states() == [("error", "a")])
    assert "File too large" in small.report()["error"]
    assert place.served() == [None]
    place.check(None)
    assert not list((small.directory / "arriving").glob("*"))


def test_a_bucket_emptied_under_a_chain_stops_who_joins_late(two: Any) -> None:
    two.publisher.full("a")
    two.load("a")
    two.publisher.delta("b", "a")
    two.load("b", "a")
    shutil.rmtree(two.publisher.bucket / "a")
    late = two.agent("late")
    two.open_door()
    wait_until(lambda: two.states()[2] == ("error", "b"))
    wait_until(lambda: two.served() == ["b", "b", None])
    two.check("b", *two.agents[:2])
    two.publisher.full("c", seed=6)
    two.load("c")
    assert late.engine.version == "c"


def test_a_hostile_object_changes_nothing(two: Any) -> None:
    two.publisher.full("a")
    two.load("a")
    out = two.publisher.delta("b", "a")
    shard = next(out.glob("layer-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[:8] = (2**62).to_bytes(8, "little")
    shard.write_bytes(data)
    assert two.signal("b", "a").status_code == 200
    wait_until(lambda: two.states() == [("error", "b")] * 2)
    assert two.served() == ["a", "a"]
    two.check("a")


@pytest.mark.parametrize("field", ["identity", "previous"])
def test_a_path_in_the_log_leads_an_agent_nowhere(place: Any, field: str) -> None:
    others = place.root / "others"
    others.mkdir()
    (others / "file").write_text("not the agent's")
    event = {"event": "signal", "at": "2026-01-01T00:00:00Z", "identity": "a", field: str(others)}
    log = place.publisher.bucket / "_hotload" / "fleets" / "local" / "rollouts"
    log.mkdir(parents=True)
    (log / "0000000001.json").write_text(json.dumps(event))
    one = place.agent("one")
    one.process.wait()
    wait_until(lambda: "0000000001.json: not a fleet event" in one.report()["error"])
    assert one.report()["error"].endswith("remove it where it is none of ours")
    assert (others / "file").exists()


def test_a_log_without_a_next_number_is_told(place: Any) -> None:
    """An entry of the greatest number would hide all that came after it."""
    log = place.publisher.bucket / "_hotload" / "fleets" / "local" / "rollouts"
    log.mkdir(parents=True)
    event = {"event": "signal", "at": "2026-01-01T00:00:00Z", "identity": "a"}
    (log / "9999999999.json").write_text(json.dumps(event))
    place.open_door("--agent", "http://127.0.0.1:9")
    for _ in range(2):
        answer = place.ask("DELETE", LEDGER)
        assert answer.status_code == 503
        assert "9999999999.json: no entry can follow it" in answer.text
    assert [path.name for path in log.iterdir()] == ["9999999999.json"]


HALF = "half-\ud800.safetensors"


def spoil_index(place: Any, identity: str) -> None:
    """Let an index name a file as no file can be called."""
    index = place.publisher.bucket / identity / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["more.weight"] = HALF
    index.write_text(json.dumps(found))


def test_half_a_character_in_an_index_is_told(two: Any) -> None:
    two.publisher.full("a")
    two.load("a")
    two.publisher.full("x")
    spoil_index(two, "x")
    answer = two.signal("x")
    assert (answer.status_code, "half-?" in answer.text) == (400, True), answer.text
    two.publisher.delta("b", "a")
    spoil_index(two, "b")
    assert two.signal("b", "a").status_code == 200
    wait_until(lambda: two.states() == [("error", "b")] * 2)
    assert "half-?" in two.agents[0].report()["error"]
    two.publisher.full("c", seed=6)
    two.load("c")


def test_of_two_identities_signalled_at_once_one_is_let_in(two: Any) -> None:
    two.publisher.full("a")
    two.publisher.full("b", seed=6)
    for one in two.agents:
        one.engine.holds.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = [*pool.map(two.signal, ["a", "b"])]
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) == [200, 400], [answer.text for answer in answers]
    assert "is being loaded" in answers[codes.index(400)].text
    for one in two.agents:
        one.engine.holds.set()
    accepted = "ab"[codes.index(200)]
    wait_until(lambda: two.served() == [accepted] * 2)
    two.check(accepted)


def test_of_two_doors_one_lets_a_signal_in(two: Any) -> None:
    first, two.door = two.door, None
    two.open_door()
    doors = [first.address, two.door.address]
    two.publisher.full("a")
    two.publisher.full("b", seed=6)

    for one in two.agents:  # or the first is served before the second is read
        one.engine.holds.clear()

    def signal(number: int) -> httpx.Response:
        headers = {"authorization": "Bearer key", **NAMES}
        body = {"identity": "ab"[number]}
        return httpx.post(f"{doors[number]}{HOT_LOAD}", json=body, headers=headers, timeout=60)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = [*pool.map(signal, (0, 1))]
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) == [200, 400], [answer.text for answer in answers]
    for one in two.agents:
        one.engine.holds.set()
    accepted = "ab"[codes.index(200)]
    wait_until(lambda: two.served() == [accepted] * 2)
    two.check(accepted)


def test_a_door_without_agents_takes_no_signal(place: Any) -> None:
    gone = place.agent("gone")
    place.open_door()
    gone.kill()
    place.publisher.full("a")
    answer = place.signal("a")
    assert answer.status_code == 503
    assert "0 of 1 agents" in answer.text
    assert place.served() == ["not ready"]
    assert place.ask("GET", LEDGER).json() == {"entries": []}


def test_a_bucket_where_nothing_was_signalled_is_told(two: Any) -> None:
    """As it is when the bucket's address is misspelt: all look ready, on base weights."""
    where = f"no log at {two.publisher.bucket.as_uri()}/_hotload/fleets/local/rollouts: nothing"

    def remarks() -> list[str]:
        shown = two.ask("GET", "/door/agents").json()
        return [shown["remark"], *(one["remark"] for one in shown["agents"])]

    assert [one.startswith(where) for one in remarks()] == [True] * 3, remarks()
    logs = [two.door.log, *(one.process.log for one in two.agents)]
    wait_until(lambda: all(log.read_text().count(where) == 1 for log in logs))
    two.publisher.full("a")
    two.load("a")
    wait_until(lambda: remarks() == ["", "", ""])


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/inference/v1/completions", 400, "a door carries no requests"),
        ("POST", "/v1/chat/completions", 400, "a door carries no requests"),
        ("GET", "/inference/v1/models", 400, "a door carries no requests"),
        ("POST", "/v1/accounts/local/deployedModels", 400, "adapters are not loaded"),
        ("DELETE", "/v1/accounts/local/deployedModels/one", 400, "adapters are not loaded"),
        ("POST", f"{HOT_LOAD}/hint", 404, "hints are not taken here"),
    ],
)
def test_what_a_door_cannot_do_is_refused_in_words(
    place: Any, method: str, path: str, status: int, words: str
) -> None:
    place.open_door("--agent", "http://127.0.0.1:9")
    answer = place.ask(method, path, {} if method == "POST" else None)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text


def test_two_agents_of_one_name_are_not_believed(place: Any) -> None:
    place.agent("same")
    place.agent("same")
    place.open_door()
    place.publisher.full("a")
    answer = place.signal("a")
    assert (answer.status_code, "called same, too" in answer.text) == (503, True)
    assert place.served() == ["not ready", "not ready"]


LIES = {
    "a name that was never signalled": {"current": "x"},
    "other bytes": {"content_sha256": "0" * 64},
    "no name": {"name": "../left"},
    "no truth value": {"readiness": "yes"},
    "more than it may": {"extra": 1},
    "no address": {"serves": "file:///etc/passwd"},
}


@pytest.mark.parametrize("lie", [*LIES])
async def test_an_agent_that_lies_is_not_ready(two: Any, lie: str) -> None:
    two.publisher.full("a")
    two.load("a")
    report = two.agents[0].report() | {"name": "liar", "serves": ""} | LIES[lie]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(json.dumps(report).encode(), content_type=JSON))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as liar:
        port = liar.sockets[0].getsockname()[1]
        await asyncio.to_thread(two.open_door, "--agent", f"http://127.0.0.1:{port}")
        served = await asyncio.to_thread(two.served)
        assert served[2] == "not ready"
        if lie != "other bytes":  # who of them lies nobody can tell
            assert served[:2] == ["a", "a"]
        two.publisher.full("b", seed=6)
        answer = await asyncio.to_thread(two.signal, "b")
        assert answer.status_code == 503, answer.text


async def test_an_agent_whose_report_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seen, "ANSWER_SECONDS", 0.5)

    async with endless(b" ", 0.01) as url, asyncio.timeout(PATIENCE_SECONDS):
        (found,) = await seen.ask_all([url])
        await seen.nudge([url])
    assert found.problem == "no whole report within 0.5 s"


def test_a_door_that_was_killed_knows_everything_again(two: Any) -> None:
    two.publisher.full("a")
    two.load("a")
    two.open_door()
    assert two.served() == ["a", "a"]
    two.publisher.delta("b", "a")
    two.load("b", "a")
    two.check("b")


def test_a_damaged_record_stops_no_door(two: Any) -> None:
    two.publisher.full("a")
    two.record("a")
    two.load("a")
    (record,) = (two.publisher.bucket / "_hotload" / "snapshots").iterdir()
    record.write_bytes(record.read_bytes()[:-40])
    two.open_door()
    assert two.served() == ["a", "a"]
    assert two.ask("DELETE", LEDGER).status_code == 200
    wait_until(lambda: two.served() == [None, None])


def test_a_quorum_goes_on_without_the_rest(two: Any) -> None:
    _, right = two.agents
    two.open_door("--quorum", "0.5")
    right.kill()
    two.publisher.full("a")
    assert two.signal("a").status_code == 200
    wait_until(lambda: two.served() == ["a", "not ready"])
    two.publisher.delta("b", "a")
    assert two.signal("b", "a").status_code == 200
    wait_until(lambda: two.served() == ["b", "not ready"])
    right.start()
    wait_until(lambda: two.served() == ["b", "b"])
    two.check("b")


def test_a_reset_brings_base_weights_back(two: Any) -> None:
    two.publisher.full("a")
    two.load("a")
    assert two.ask("DELETE", LEDGER).status_code == 200
    wait_until(lambda: two.served() == [None, None])
    two.check(None)
    two.publisher.delta("b", "a")
    assert two.signal("b", "a").status_code == 400
    two.publisher.full("c", seed=6)
    two.load("c")
    two.check("c")


def test_a_base_model_keeps_its_directories(two: Any) -> None:
    left, _ = two.agents
    kept = [two.publisher.base / "original" / "params.json", left.directory / "other" / "x" / "y"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    two.publisher.full("a")
    two.load("a")
    assert two.ask("DELETE", LEDGER).status_code == 200
    wait_until(lambda: two.served() == [None, None])
    left.kill()
    left.start()
    wait_until(lambda: two.served() == [None, None])
    assert [path.exists() for path in kept] == [True, True]


def gate(snapshot: Any) -> bool:
    """What a test's door asks: the file GATE has what it is to say."""
    assert snapshot.agents
    reports = [
        httpx.get(f"{url}/agent", timeout=PATIENCE_SECONDS).json() for url in snapshot.agents
    ]
    assert {one["current"] for one in reports} == {snapshot.identity}
    return json.loads(Path(os.environ["GATE"]).read_text())


def test_a_canary_that_fails_its_gate_never_reaches_the_rest(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = place.root / "gate"
    monkeypatch.setenv("GATE", str(verdict))
    for name in ("one", "two", "three"):
        place.agent(name)
    place.open_door("--canary", "0.25", "--gate", "tests.agent.test_fleet:gate")
    verdict.write_text("true")
    place.publisher.full("a")
    place.load("a")
    place.check("a")
    verdict.write_text("false")
    place.publisher.delta("b", "a")
    assert place.signal("b", "a").status_code == 200
    wait_until(lambda: set(place.states()) == {("error", "b")})
    wait_until(lambda: place.served() == ["a"] * 3)
    place.check("a")
    (entry,) = (one for one in place.ask("GET", LEDGER).json()["entries"] if one["identity"] == "b")
    assert [one["error"] for one in entry["replicas"]] == ["the gate said False"]
    on_b = [one for one in place.agents if ("b" in str(one.engine.calls))]
    assert [one.name for one in on_b] == ["one"]
    verdict.write_text("true")
    place.publisher.full("c", seed=6)
    place.load("c")
    place.check("c")
    entries = place.ask("GET", LEDGER).json()["entries"]
    assert {one["identity"]: one.get("gate") for one in entries}["c"] == "the gate said True"


def test_one_directory_has_one_agent(place: Any) -> None:
    first, second = place.agent("first"), place.agent("second")
    first.process.wait()
    second.kill()
    shutil.rmtree(second.directory, ignore_errors=True)
    second.directory.symlink_to(first.directory)
    with pytest.raises(RuntimeError, match="another agent has"):
        second.start()


def test_what_differs_from_the_publishers_record_is_not_served(two: Any) -> None:
    two.publisher.full("a")
    two.record("a")
    two.load("a")
    two.publisher.delta("b", "a")
    two.record("b", "a")
    two.load("b", "a")
    wait_until(lambda: all(one.report()["content_sha256"] for one in two.agents))
    assert two.served() == ["b", "b"]
    for kind, previous in (("full", None), ("delta", "b")):
        if previous:
            two.publisher.delta(kind, previous, seed=7)
        else:
            two.publisher.full(kind, seed=8)
        two.record(kind, previous, spoilt="config.json")
        assert two.signal(kind, previous).status_code == 200
        wait_until(lambda: two.states() == [("error", kind)] * 2)  # noqa: B023
        wait_until(lambda: two.served() == ["b", "b"])
        two.check("b")


async def test_a_name_without_addresses_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path.as_uri())
    addresses = Addresses((), "agents.invalid:8700")
    fleet = AgentFleet(DoorConfig(bucket=store.url, addresses=addresses), store)
    with pytest.raises(RefusedError, match=r"0 of 0 agents .* agents\.invalid:8700 has no address"):
        await fleet.signal({"identity": "a"})


def test_who_keeps_the_others_waiting_is_told(place: Any) -> None:
    """An agent answers, its engine does not: no signal is let in before it does."""
    place.agent("lonely", **{"engine-url": "http://127.0.0.1:9"})
    place.open_door()
    place.publisher.full("a")
    place.publisher.full("b", seed=6)
    assert place.signal("a").status_code == 200
    wait_until(lambda: "connection" in place.agents[0].report()["error"])
    answer = place.signal("b")
    assert answer.status_code == 400
    words = "'a' is being loaded. lonely: a: EngineAwayError: GET /info: All connection"
    assert words in answer.text


def test_a_canary_that_this_door_does_not_judge_is_told(two: Any) -> None:
    two.open_door("--canary", "0.5", "--gate", "tests.agent.test_fleet:never")
    two.publisher.full("a")
    assert two.signal("a").status_code == 200
    two.open_door()
    two.publisher.full("b", seed=6)
    answer = two.signal("b")
    assert (answer.status_code, "a door with --canary" in answer.text) == (400, True), answer.text
    assert two.ask("DELETE", LEDGER).status_code == 200
    wait_until(lambda: two.served() == [None, None])
    two.load("b")


async def never(_: Any) -> None:
    """Judge nothing."""
    await asyncio.Event().wait()
