"""Agents and doors as processes of their own, over a bucket in a directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from hotload.publish.fireworks_api import delta_metadata
from tests.agent.tiny_engine import TinyEngine, digests, tiny_engine
from tests.emulator.conftest import Publisher
from tests.factories import recorded_manifest
from tests.servers import LoopbackServer
from tests.waiting import PATIENCE_SECONDS, wait_until

NAMES = {
    "fireworks-model": "accounts/local/models/policy",
    "fireworks-deployment": "accounts/local/deployments/rollouts",
}
HOT_LOAD = "/hot_load/v1/models/hot_load"
LEDGER = "/v1/accounts/local/deployments/rollouts/ledger"
DECLARED = [
    *("--engine", "command", "--version", "GET /info weight_version"),
    *("--reload", 'POST /reload {"path": "{directory}", "name": "{identity}"}'),
]


class EngineProcess:
    """A tiny engine as a process beside an agent; it begins with what the agent's link leads to."""

    def __init__(self, root: Path, directory: Path, base: Path, shard_seconds: float) -> None:
        def command(port: int) -> list[str]:
            words = [sys.executable, "-m", "tests.agent.tiny_engine", "--port", str(port)]
            words += ["--shard-seconds", str(shard_seconds), str(directory / "current")]
            return [*words, str(base)]

        self.process = LoopbackServer(f"engine-{directory.name}", root, command)
        self.url = self.process.address
        self.client = httpx.Client(timeout=PATIENCE_SECONDS)

    def sample(self) -> dict[str, Any] | None:
        """What a sample of now is drawn from; None where none is, or nobody answers."""
        try:
            answer = self.client.get(f"{self.url}/sample")
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    @property
    def serves(self) -> dict[str, str] | None:
        """Digests of its weights; None where nothing can be sampled from it."""
        found = self.sample()
        return None if found is None else found["serves"]


@dataclass
class RunningAgent:
    """An agent's process, and the engine beside it."""

    name: str
    engine: TinyEngine | EngineProcess
    directory: Path
    process: LoopbackServer
    is_killed: bool = False

    def report(self) -> dict[str, Any]:
        """What it says of itself."""
        answer = httpx.get(f"{self.process.address}/agent", timeout=PATIENCE_SECONDS)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.stop()
        self.is_killed = True

    def start(self) -> None:
        """Start it again, where it was."""
        self.process.start()
        self.process.wait()
        self.is_killed = False

    def log(self) -> str:
        """What it has written."""
        return self.process.log.read_text()


@dataclass
class Place:
    """A bucket with a publisher, and the agents and doors that a test has started."""

    publisher: Publisher
    root: Path
    stack: ExitStack
    agents: list[RunningAgent] = field(default_factory=list)
    door: LoopbackServer | None = None
    agents_bucket: list[str] = field(default_factory=list)
    has_peers: bool = False
    other_peers: list[str] = field(default_factory=list)

    def agent(
        self,
        name: str,
        *,
        kind: list[str] = DECLARED,
        shell: str = "",
        is_started: bool = True,
        engine: TinyEngine | None = None,
        shard_seconds: float | None = None,
        **options: str,
    ) -> RunningAgent:
        """Start an agent with an engine of its own; `shell` comes before the command. Its
        peers are the agents there are when it starts. With `shard_seconds` the engine is a
        process, too."""
        directory = self.root / f"{name}-{len(self.agents)}"
        base = self.publisher.base
        beside: TinyEngine | EngineProcess
        if shard_seconds is None:
            beside = self.stack.enter_context(tiny_engine(engine))
            beside.restart(base)
        else:
            beside = EngineProcess(self.root, directory, base, shard_seconds)
            self.stack.callback(beside.client.close)
            self.stack.callback(beside.process.stop)
            beside.process.start()
        more = [word for key, value in options.items() for word in (f"--{key}", value)]

        def command(port: int) -> list[str]:
            peers = [*self.other_peers, *(one.process.address for one in self.agents)]
            peer = [word for url in peers if self.has_peers for word in ("--peer", url)]
            words = [
                *(sys.executable, "-m", "agent"),
                *(self.agents_bucket or ["--bucket", str(self.publisher.bucket)]),
                *("--engine-url", beside.url, "--model-dir", str(directory), "--name", name),
                *("--base-model", str(base), "--port", str(port)),
                *("--poll-seconds", "0.2", "--workers", "1", *kind, *peer, *more),
            ]
            return ["sh", "-c", f'{shell}\nexec "$@"', "sh", *words] if shell else words

        process = LoopbackServer(f"{name}-{len(self.agents)}", self.root, command)
        self.stack.callback(process.stop)
        running = RunningAgent(name, beside, directory, process)
        self.agents.append(running)
        if is_started:
            process.start()  # nobody waits for it: doors and tests look until it answers
        return running

    def open_door(self, *options: str, agents: list[RunningAgent] | None = None) -> None:
        """Start a door over the agents; one that is open is killed before."""
        if self.door is not None:
            self.door.stop()
        asked = self.agents if agents is None else agents
        listed = [word for one in asked for word in ("--agent", one.process.address)]

        def command(port: int) -> list[str]:
            bucket = ("--bucket", str(self.publisher.bucket), "--port", str(port))
            return [sys.executable, "-m", "agent.door", *bucket, *listed, *options]

        self.door = LoopbackServer("door", self.root, command)
        self.stack.callback(self.door.stop)
        self.door.start()
        self.door.wait()
        for one in asked:
            if not one.is_killed:
                one.process.wait()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """Ask the door, with a key and the right names."""
        assert self.door is not None
        sent = {"authorization": "Bearer key", **NAMES, **headers}
        url = f"{self.door.address}{path}"
        return httpx.request(method, url, json=body, headers=sent, timeout=PATIENCE_SECONDS)

    def signal(self, identity: str, previous: str | None = None, **fields: Any) -> httpx.Response:
        body: dict[str, Any] = {"identity": identity, **fields}
        if previous is not None:
            body |= delta_metadata(previous)
        return self.ask("POST", HOT_LOAD, body)

    def replicas(self) -> list[dict[str, Any]]:
        answer = self.ask("GET", HOT_LOAD)
        assert answer.status_code == 200, answer.text
        return answer.json()["replicas"]

    def served(self) -> list[str | None]:
        """Current identity by replica, with a mark where it is not ready."""
        return [
            one["current_snapshot_identity"] if one["readiness"] else "not ready"
            for one in self.replicas()
        ]

    def states(self) -> list[tuple[str, str | None]]:
        """Stage and target by replica."""
        states = [one["loading_state"] for one in self.replicas()]
        return [(one["stage"], one.get("target_snapshot_identity")) for one in states]

    def load(self, identity: str, previous: str | None = None) -> None:
        """Signal, and wait until every agent serves it."""
        answer = self.signal(identity, previous)
        assert answer.status_code == 200, answer.text
        wait_until(lambda: set(self.served()) == {identity})

    def record(self, identity: str, previous: str | None = None, spoilt: str = "") -> None:
        """Write the publisher's record of a snapshot; `spoilt` is a file with another digest."""

        publisher = self.publisher
        manifest = recorded_manifest(
            publisher.bucket / identity, publisher.checkpoint(identity), previous, spoilt
        )
        directory = publisher.bucket / "_hotload" / "snapshots"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{identity}.json").write_bytes(manifest.render())

    def check(self, identity: str | None, *agents: RunningAgent) -> None:
        """The engines serve exactly the bytes that an identity stands for."""
        expected = digests(self.publisher.checkpoint(identity))
        assert [one.engine.serves for one in agents or self.agents] == [expected] * len(
            agents or self.agents
        )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(Publisher(tmp_path), tmp_path, stack)


@pytest.fixture
def two(place: Place) -> Place:
    """Two agents behind a door, on base weights."""
    place.agent("left")
    place.agent("right")
    place.open_door()
    wait_until(lambda: place.served() == [None, None])
    return place
