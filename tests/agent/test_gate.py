"""The gate by samples in front of engines that really sample; what a gate's "no" holds for."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from agent.door.canary import CanaryRule, CanarySnapshot, judge
from agent.door.gate_file import read_gate
from agent.door.seen import SeenAgent
from agent.fleet.report import AgentReport
from agent.fleet.state import FleetEvent
from hotload.clock import utc_now
from hotload.publish.fireworks_api import parse_status
from tests.agent.conftest import HOT_LOAD, LEDGER, NAMES
from tests.agent.sampling_engine import LENGTH, SamplingEngine, write_problems
from tests.emulator.conftest import Tensors
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.server


def nudged(weights: Tensors, seed: int) -> Tensors:
    """Weights that say almost the same: a few elements moved by one ulp."""
    random = np.random.default_rng(seed)
    return {
        name: (bits ^ (random.random(bits.shape) < 0.0001)).astype("<u2")
        for name, bits in weights.items()
    }


def with_head(weights: Tensors, factor: float) -> Tensors:
    """Weights whose logits are so many times as large; 0 forgets everything."""
    head = (weights["lm_head.weight"].astype("<u4") << 16).view("<f4") * np.float32(factor)
    return weights | {"lm_head.weight": (head.view("<u4") >> 16).astype("<u2")}


def declared(place: Any, **changes: Any) -> dict[str, Any]:
    """What a gate's file says; problems whose answers are those of the base weights."""
    dataset = place.root / "gate.jsonl"
    if not dataset.exists():
        write_problems(dataset, place.publisher.base, 24)
    return {
        "engine": "vllm",
        "model": "policy",
        "problems": {"dataset": str(dataset)},
        "sampling": {"completions_per_prompt": 1, "max_completion_tokens": LENGTH},
        "reward": {"name": "tests.agent.gate_rewards:near"},
    } | changes


def open_gate(place: Any, *options: str, share: str = "0.25", **changes: Any) -> None:
    """Open a door with a gate by samples in front of the place's agents."""
    file = place.root / "gate.yaml"
    file.write_text(yaml.safe_dump(declared(place, **changes)))
    place.open_door("--canary", share, "--gate-samples", str(file), *options)


@pytest.fixture
def three(place: Any) -> Any:
    """Three agents beside engines that sample, of which `one` goes first."""
    for name in ("one", "three", "two"):
        place.agent(name, engine=SamplingEngine())
    return place


def entry_of(place: Any, identity: str) -> dict[str, Any]:
    entries = place.ask("GET", LEDGER).json()["entries"]
    return next(one for one in entries if one["identity"] == identity)


def reason_of(place: Any, identity: str) -> str:
    """Why a snapshot was withdrawn, as the ledger has it."""
    wait_until(lambda: entry_of(place, identity)["replicas"])
    return entry_of(place, identity)["replicas"][0]["error"]


def try_snapshot(place: Any, identity: str, weights: Tensors) -> None:
    place.publisher.full(identity, weights=weights)
    place.record(identity)
    assert place.signal(identity).status_code == 200


def test_a_reward_decides_who_goes_on_and_bytes_stay_refused(three: Any) -> None:
    open_gate(three)
    base = three.publisher.weights[None]
    good, ruined = nudged(base, 1), with_head(base, 0)
    try_snapshot(three, "a", good)
    wait_until(lambda: three.served() == ["a"] * 3)
    three.check("a")
    passed = entry_of(three, "a")["gate"]
    assert "over 24 problems; 0 of 24 samples failed; divergence" in passed
    assert f"canary a released: {passed}" in three.door.log.read_text()

    try_snapshot(three, "b", ruined)
    wait_until(lambda: set(three.states()) == {("error", "b")})
    wait_until(lambda: three.served() == ["a"] * 3)
    reason = reason_of(three, "b")
    assert "below that of the rest, more than max_reward_drop 0" in reason
    assert f"canary b withdrawn: {reason}" in three.door.log.read_text()
    for one in three.agents[1:]:
        assert not [body for _, body in one.engine.calls if body and body.get("name") == "b"]
    # Every sample was by the weights it was asked of, and both sides were asked the same.
    assert three.agents[0].engine.sampled.count("b") == 24
    assert sum(one.engine.sampled.count("a") for one in three.agents[1:]) == 24

    # The status tells the reason, and that no other name helps.
    status = parse_status(three.ask("GET", HOT_LOAD).json())
    assert status.refused == {"b": f"withdrawn as b: {reason}"}
    assert reason in "; ".join(status.by_replica)
    three.publisher.full("c", weights=ruined)
    three.record("c")
    answer = three.signal("c")
    assert answer.status_code == 400
    assert reason in answer.text
    assert "--judge-again" in answer.text

    # Another snapshot passes; the judgement stays.
    try_snapshot(three, "d", nudged(good, 2))
    wait_until(lambda: three.served() == ["d"] * 3)
    assert three.signal("c").status_code == 400

    # A person may have it judged anew, and let it in without a gate.
    open_gate(three, "--judge-again")
    wait_until(lambda: three.served() == ["d"] * 3)
    assert three.signal("c").status_code == 200
    wait_until(lambda: set(three.states()) == {("error", "c")})
    assert parse_status(three.ask("GET", HOT_LOAD).json()).refused == {}
    three.open_door("--canary", "0.25")
    wait_until(lambda: three.served() == ["d"] * 3)
    three.publisher.full("e", weights=ruined)
    three.record("e")
    three.load("e")


def test_a_reset_forgets_what_was_refused(three: Any) -> None:
    open_gate(three)
    ruined = with_head(three.publisher.weights[None], 0)
    try_snapshot(three, "a", ruined)
    wait_until(lambda: three.states() == [("error", "a")] * 3)
    wait_until(lambda: three.served() == [None] * 3)
    three.publisher.full("b", weights=ruined)
    three.record("b")
    assert three.signal("b").status_code == 400
    assert three.ask("DELETE", LEDGER).status_code == 200
    wait_until(lambda: three.served() == [None] * 3)
    assert three.signal("b").status_code == 200


def test_a_divergence_that_is_too_large_is_refused(three: Any) -> None:
    sampling = {"completions_per_prompt": 4, "max_completion_tokens": LENGTH}
    limits = {"max_divergence": 0.0005}
    reward = {"name": "tests.agent.gate_rewards:one"}
    open_gate(three, sampling=sampling, reward=reward, limits=limits)
    base = three.publisher.weights[None]
    try_snapshot(three, "a", nudged(base, 1))
    wait_until(lambda: three.served() == ["a"] * 3)
    try_snapshot(three, "b", with_head(base, 1.05))
    reason = reason_of(three, "b")
    assert reason.startswith("divergence 0.")
    assert "max_divergence is 0.0005; reward 1, of the rest 1" in reason
    wait_until(lambda: three.served() == ["a"] * 3)


def test_servers_that_tell_no_logprobs_are_judged_by_reward_alone(three: Any) -> None:
    for one in three.agents:
        one.engine.tells_logprobs = False
    reward = {"name": "tests.agent.gate_rewards:one"}
    open_gate(three, reward=reward)
    base = three.publisher.weights[None]
    try_snapshot(three, "a", nudged(base, 1))
    wait_until(lambda: three.served() == ["a"] * 3)
    words = "divergence is not known, 0 tokens were the same: the servers tell no log-prob"
    assert words in entry_of(three, "a")["gate"]
    open_gate(three, reward=reward, limits={"max_divergence": 1.0})
    wait_until(lambda: three.served() == ["a"] * 3)
    try_snapshot(three, "b", nudged(base, 2))
    assert reason_of(three, "b").startswith(words)


def test_canaries_whose_samples_fail_go_back(three: Any) -> None:
    first = three.agents[0].engine
    first.fails_at = "a"
    open_gate(three)
    try_snapshot(three, "a", nudged(three.publisher.weights[None], 1))
    found = r"(\d+) of 24 samples \(\1 refused\) failed; max_failure_rate is 2\.00%"
    assert re.fullmatch(found, reason_of(three, "a"))  # 1, and those in flight beside it
    wait_until(lambda: three.served() == [None] * 3)


def test_a_reward_that_raises_costs_samples(three: Any) -> None:
    open_gate(three, reward={"name": "tests.agent.gate_rewards:raises_where_far"})
    base = three.publisher.weights[None]
    try_snapshot(three, "a", with_head(base, 0))
    reason = reason_of(three, "a")
    assert "reward_raised" in reason
    wait_until(lambda: three.served() == [None] * 3)
    # Where it raises for the rest, too, nothing is known of the bytes.
    open_gate(three, reward={"name": "tests.agent.gate_rewards:raises"})
    wait_until(lambda: three.served() == [None] * 3)
    three.ask("DELETE", LEDGER)
    wait_until(lambda: three.served() == [None] * 3)
    try_snapshot(three, "b", nudged(base, 1))
    assert "; of the rest" in reason_of(three, "b")
    assert parse_status(three.ask("GET", HOT_LOAD).json()).refused == {}


def test_a_gate_without_a_server_to_compare_with_says_so(three: Any) -> None:
    open_gate(three, "--quorum", "0.3")
    for one in three.agents[1:]:
        one.engine.refuses = {"/info"}
    wait_until(lambda: three.served() == [None, "not ready", "not ready"])
    try_snapshot(three, "a", nudged(three.publisher.weights[None], 1))
    assert "no other agent is ready" in reason_of(three, "a")


def test_a_canary_that_was_away_is_judged_again(three: Any) -> None:
    first = three.agents[0].engine
    open_gate(three)
    first.answers.clear()
    first.fails_at = "a"
    try_snapshot(three, "a", nudged(three.publisher.weights[None], 1))
    wait_until(lambda: first.waiting)
    first.refuses = {"/info"}
    wait_until(lambda: three.served()[0] == "not ready")
    first.answers.set()
    wait_until(lambda: "not ready all the time" in three.door.log.read_text())
    first.refuses, first.fails_at = set(), None
    wait_until(lambda: three.served() == ["a"] * 3)


def test_agents_that_name_one_server_are_not_compared(place: Any) -> None:
    for name in ("one", "two"):
        place.agent(name, engine=SamplingEngine(), serves="http://127.0.0.1:9")
    # On two machines: of two on one, the door would believe neither.
    elsewhere = place.agents.pop().process.address.replace("127.0.0.1", "localhost")
    open_gate(place, "--agent", elsewhere)
    try_snapshot(place, "a", nudged(place.publisher.weights[None], 1))
    assert "http://127.0.0.1:9 is said to answer for canaries and others" in reason_of(place, "a")
    assert parse_status(place.ask("GET", HOT_LOAD).json()).refused == {}


def test_of_two_doors_that_judge_one_writes(three: Any) -> None:
    open_gate(three)
    first, three.door = three.door, None
    open_gate(three)
    ruined = with_head(three.publisher.weights[None], 0)
    for one in three.agents:
        one.engine.answers.clear()
    try_snapshot(three, "a", ruined)
    wait_until(lambda: three.agents[0].engine.waiting == 16)  # both are at it, 8 in flight each
    for one in three.agents:
        one.engine.answers.set()
    wait_until(lambda: three.served() == [None] * 3 and set(three.states()) == {("error", "a")})
    (log,) = (three.publisher.bucket / "_hotload" / "fleets").rglob("rollouts")
    events = [json.loads(path.read_text())["event"] for path in sorted(log.glob("*.json"))]
    assert events == ["signal", "withdraw"]
    headers = {"authorization": "Bearer key", **NAMES}
    shown = httpx.get(f"{first.address}{HOT_LOAD}", headers=headers, timeout=PATIENCE_SECONDS)
    assert shown.json() == three.ask("GET", HOT_LOAD).json()


def seen(name: str, current: str | None) -> SeenAgent:
    address = f"http://127.0.0.1:1/{name}"
    return SeenAgent(address, AgentReport(name=name, engine="x", readiness=True, current=current))


HANGING: dict[str, Callable[[CanarySnapshot], Any]] = {
    "a thread": lambda _: threading.Event().wait(),
    "an event loop": lambda _: asyncio.Event().wait(),
}


@pytest.mark.parametrize("where", [*HANGING])
async def test_a_gate_that_hangs_ends(where: str) -> None:
    at = utc_now() - timedelta(seconds=5)
    event = FleetEvent(event="signal", at=at, identity="a", canaries=("one",))
    rule = CanaryRule(0.5, HANGING[where], timeout_seconds=0.1)
    verdict = await judge(rule, event, [seen("one", "a"), seen("two", None)], None, 5.0)
    assert verdict is not None
    assert (verdict.is_good, verdict.is_about_bytes) == (False, False)
    assert verdict.reason == "the gate failed: no verdict within 0.1 s"


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
async def test_what_a_gate_raises_is_told_without_keys(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "abcdefgh-secret")

    def gate(snapshot: CanarySnapshot) -> bool:
        raise kind("no entry for abcdefgh-secret")

    event = FleetEvent(event="signal", at=utc_now(), identity="a", canaries=("one",))
    verdict = await judge(CanaryRule(0.5, gate), event, [seen("one", "a")], None, 5.0)
    assert verdict is not None
    assert "secret" not in verdict.reason
    assert verdict.reason.startswith(f"the gate failed: {kind.__name__}: no entry for")


class Told:
    """What a gate may return by mistake: its text has a key, or cannot be had."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        if not self.text:
            raise RuntimeError("no text")
        return self.text


async def leave_later(_: CanarySnapshot) -> Any:
    sys.exit("no judge")


ODD: dict[str, tuple[Callable[[CanarySnapshot], Any], str]] = {
    "a key": (lambda _: Told("abcdefgh-secret"), "the gate said "),
    "no text": (lambda _: Told(""), "the gate failed: RuntimeError: no text"),
    "half a character": (lambda _: Told("\ud800"), "the gate said ?"),
    "a later exit": (leave_later, "the gate failed: SystemExit: no judge"),
}


@pytest.mark.parametrize("odd", [*ODD])
async def test_what_a_gate_says_by_mistake_is_a_no(
    monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "abcdefgh-secret")
    gate, words = ODD[odd]
    event = FleetEvent(event="signal", at=utc_now(), identity="a", canaries=("one",))
    verdict = await judge(CanaryRule(0.5, gate), event, [seen("one", "a")], None, 5.0)
    assert verdict is not None
    assert (verdict.is_good, verdict.is_about_bytes) == (False, False)
    assert verdict.reason.startswith(words)
    assert "secret" not in verdict.reason
    FleetEvent(event="withdraw", at=utc_now(), identity="a", reason=verdict.reason)


WRONG = {
    "a misspelt limit": ({"limits": {"max_failures": 0.1}}, "limits.max_failures: Extra inputs"),
    "and what it may mean": ({"limits": {"min_rewards": 1}}, "did you mean `min_reward`?"),
    "a limit that is no number": ({"limits": {"max_reward_drop": float("nan")}}, "max_reward_drop"),
    "a negative one": ({"limits": {"max_reward_drop": -1}}, "limits.max_reward_drop: Input should"),
    "another engine": ({"engine": "fireworks"}, "engine: Value error, no agent stands beside"),
    "too few problems": (
        {"problems": {"dataset": "/x", "max_rows": 3}},
        "max_rows: expected 20 to",
    ),
    "a relative path": ({"problems": {"dataset": "x.jsonl"}}, "expected an absolute path"),
    "a setting of a rollout": ({"sampling": {"processes": 4}}, "sampling.processes has no meaning"),
    "its nodes": ({"sampling": {"nodes": ["a"]}}, "sampling.nodes has no meaning"),
    "no model": ({"model": ""}, "model: String should have at least 1"),
}


@pytest.mark.parametrize("wrong", [*WRONG])
def test_what_is_wrong_in_a_gates_file_is_told_by_its_name(tmp_path: Path, wrong: str) -> None:
    changes, words = WRONG[wrong]
    good = {"engine": "vllm", "model": "policy", "problems": {"dataset": "/x"}}
    file = tmp_path / "gate.yaml"
    file.write_text(yaml.safe_dump(good))
    assert read_gate(file).problems.max_rows == 200
    file.write_text(yaml.safe_dump(good | changes))
    with pytest.raises(ValueError, match=r"gate\.yaml: ") as told:
        read_gate(file)
    assert words in str(told.value)


HOSTILE = {
    "no YAML": b"engine: [",
    "an object": b"!!python/object/apply:os.system ['true']",
    "no text": b"\xff\xfe\x00",
    "nothing": b"",
    "a list": b"- 1",
    "large": b"#" * (2 << 20),
    "deep": b"[" * 50_000,
}


@pytest.mark.parametrize("kind", [*HOSTILE])
def test_a_file_that_is_no_gate_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "gate.yaml"
    file.write_bytes(HOSTILE[kind])
    with pytest.raises(ValueError, match=r"gate\.yaml"):
        read_gate(file)
