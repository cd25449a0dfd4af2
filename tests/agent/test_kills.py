"""Agents, their engines and the door killed with SIGKILL at random moments of a version.

Three kills; ten in `make long`. HOTLOAD_KILLS=100 for more, HOTLOAD_KILL_SEED for other moments.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.agent.conftest import DECLARED, HOT_LOAD, NAMES
from tests.agent.tiny_engine import digests
from tests.servers import LoopbackServer
from tests.waiting import PATIENCE_SECONDS, wait_until

KILLS = int(os.environ.get("HOTLOAD_KILLS", "3"))
SEED = int(os.environ.get("HOTLOAD_KILL_SEED", "7"))
FULL_EVERY = 4
# Reloads take a moment, so that kills strike within them.
SHARD_SECONDS = 0.03
# What the door says is held to the engine once the agent has asked that for its version so often
# since its weights changed: two questions may be under way when they do.
NOTICED = 3
BETWEEN_LOOKS_SECONDS = 0.005

pytestmark = pytest.mark.server


class Sampler:
    """Asks every engine what a sample is drawn from, and the door what is ready, all the time.

    A name and the weights that are served under it belong together; weights without a name are
    nobody's. What the door shows as ready under a name is served under it.
    """

    def __init__(self, place: Any) -> None:
        self._place, self._stop = place, threading.Event()
        headers = {"authorization": "Bearer key", **NAMES}
        self._client = httpx.Client(timeout=PATIENCE_SECONDS, headers=headers)
        self._threads = [
            threading.Thread(target=self._run, args=[look], daemon=True)
            for look in (self._sample_all, self._compare_with_door)
        ]
        self.named: dict[str, dict[str, str]] = {}
        self.samples = self.comparisons = 0
        self.complaints: list[str] = []

    def __enter__(self) -> Sampler:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _run(self, look: Callable[[], None]) -> None:
        while not self._stop.wait(BETWEEN_LOOKS_SECONDS):
            try:
                look()
            except Exception as error:  # noqa: BLE001 - a thread would hide it from the test
                self._complain(f"the sampler: {type(error).__name__}: {error}")

    def _sample_all(self) -> None:
        for one in self._place.agents:
            if (sample := one.engine.sample()) is not None:
                self.samples += 1
                name = sample["weight_version"]
                if name is not None and sample["serves"] != self.named[name]:
                    self._complain(f"{one.name} samples from other weights as {name}")

    def _compare_with_door(self) -> None:
        agents = self._place.agents
        before = [one.engine.sample() for one in agents]
        try:
            answer = self._client.get(f"{self._place.door.address}{HOT_LOAD}")
        except httpx.TransportError:
            return  # no door
        replicas = answer.raise_for_status().json()["replicas"]
        after = [one.engine.sample() for one in agents]
        for one, first, replica, last in zip(agents, before, replicas, after, strict=True):
            if not (first and last and replica["readiness"] and first["state"] == last["state"]):
                continue
            if first["version_asked"] >= NOTICED:
                self.comparisons += 1
                said, name = replica["current_snapshot_identity"], first["weight_version"]
                if said != name:
                    self._complain(f"{one.name} is ready with {said}, its engine serves {name}")

    def _complain(self, text: str) -> None:
        if text not in self.complaints:
            print(f"    ! {text}")
            self.complaints.append(text)


class Versions:
    """A publisher of one version after the other: a delta, or a full after any doubt."""

    def __init__(self, place: Any, sampler: Sampler) -> None:
        self._place, self._sampler = place, sampler
        self._number, self._served = -1, ""
        self.identity, self._previous = "", ""
        self._is_signalled = False

    def begin(self) -> None:
        """Put the next version into the bucket."""
        self._number += 1
        is_full = self._number % FULL_EVERY == 0
        self._put(f"v{self._number}", "" if is_full else self._served)

    def go_on(self) -> bool:
        """Do what is next for this version; True once every agent serves it."""
        try:
            if not self._is_signalled:
                self._signal()
                return False
            replicas = self._place.replicas()
        except httpx.TransportError:
            return False  # no door
        states = [one["loading_state"] for one in replicas]
        if any(
            one["stage"] == "error" and one.get("target_snapshot_identity") == self.identity
            for one in states
        ):
            self._fall_back()
            return False
        is_served = all(
            one["readiness"] and one["current_snapshot_identity"] == self.identity
            for one in replicas
        )
        if is_served:
            self._served = self.identity
        return is_served

    def _signal(self) -> None:
        answer = self._place.signal(self.identity, self._previous or None)
        if answer.status_code == 400 and "is being loaded" not in answer.text:
            self._fall_back()
        self._is_signalled = answer.status_code == 200
        assert answer.status_code in (200, 400, 503), answer.text

    def _fall_back(self) -> None:
        print(f"    {self.identity} cannot be loaded everywhere: a full follows")
        assert self.identity.count("-full") < 3, "it never loads"
        self._put(f"{self.identity}-full", "")

    def _put(self, identity: str, previous: str) -> None:
        publisher, seed = self._place.publisher, len(self._place.publisher.weights)
        if previous:
            publisher.delta(identity, previous, seed=seed)
        else:
            publisher.full(identity, seed=seed)
        self._sampler.named[identity] = digests(publisher.checkpoint(identity))
        self.identity, self._previous, self._is_signalled = identity, previous, False


def rivals(place: Any) -> Iterator[tuple[str, LoopbackServer]]:
    """Every process that may be killed, by its name."""
    yield "the door", place.door
    for one in place.agents:
        yield f"agent {one.name}", one.process
        yield f"engine {one.name}", one.engine.process


@pytest.mark.timeout(120 + 30 * KILLS)
def test_killed_at_random_moments(place: Any) -> None:
    rng = random.Random(SEED)
    place.agent("vllm", kind=["--engine", "vllm"], shard_seconds=SHARD_SECONDS)
    place.agent("sglang", kind=["--engine", "sglang"], shard_seconds=SHARD_SECONDS)
    place.agent("declared", kind=DECLARED, shard_seconds=SHARD_SECONDS)
    for one in place.agents:
        one.engine.process.wait()
    place.open_door()
    wait_until(lambda: place.served() == [None] * 3)
    with Sampler(place) as sampler:
        versions = Versions(place, sampler)
        lives = []
        for _ in range(2):  # a full and a delta, undisturbed: how long is a life?
            begun = time.monotonic()
            versions.begin()
            wait_until(versions.go_on)
            lives.append(time.monotonic() - begun)
        print(f"\nseed {SEED}; undisturbed: full {lives[0]:.2f} s, delta {lives[1]:.2f} s")
        # One moment from every n-th of a life, in random order.
        moments = [max(lives) * (n + rng.random()) / KILLS for n in range(KILLS)]
        rng.shuffle(moments)
        for number, moment in enumerate(moments, 1):
            name, victim = rng.choice([*rivals(place)])
            back = moment + rng.random() * max(lives)
            versions.begin()
            begun = time.monotonic()
            reached = [False]
            wait_until(lambda: _look(versions, reached, begun, moment))  # noqa: B023
            victim.stop()
            where = [state[0] for state in place.states()] if name != "the door" else "–"
            print(f"  kill {number}: {name}, {versions.identity}, {moment:.2f} s: {where}")
            wait_until(lambda: _look(versions, reached, begun, back))  # noqa: B023
            victim.start()
            victim.wait()
            wait_until(lambda: versions.go_on() and _is_named(place, versions.identity))
            place.check(versions.identity)
        looks = sampler.comparisons
        wait_until(lambda: sampler.comparisons > looks)  # in peace, too
    print(f"{sampler.samples} samples, {sampler.comparisons} compared with what the door says")
    assert sampler.complaints == []


def _is_named(place: Any, identity: str) -> bool:
    """Whether a sample of each engine is of that name now; a door hears of an engine that is gone
    only when its agent has."""
    samples = [one.engine.sample() for one in place.agents]
    return all(one is not None and one["weight_version"] == identity for one in samples)


def _look(versions: Versions, reached: list[bool], begun: float, seconds: float) -> bool:
    """Go on with a version until so many seconds after it began."""
    reached[0] = reached[0] or versions.go_on()
    return time.monotonic() > begun + seconds
