"""Agents of one site: every object is read from the store once, whatever a peer does or says."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from agent.door.canary import CanarySnapshot
from benchmarks.counting_proxy import counting_proxy
from tests.agent.conftest import Place
from tests.servers import BUCKET, StoreServer
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
KEY = "the-key-of-this-site"


def is_released(snapshot: CanarySnapshot) -> bool:
    """Wait, in a door's process, for the test's word."""
    wait_until(Path(os.environ["GATE"]).exists)
    return True


class Site:
    """A place whose agents read a bucket through a proxy that counts; its door goes by itself."""

    def __init__(self, place: Place, store: StoreServer, proxy: str, calls: list[str]) -> None:
        self.place, self._calls = place, calls
        self._prefix = uuid.uuid4().hex
        self._endpoint = str(store.options["endpoint_url"])
        place.has_peers = True
        place.agents_bucket = self._words(proxy)

    def _words(self, endpoint: str) -> list[str]:
        url = f"s3://{BUCKET}/{self._prefix}"
        return ["--bucket", url, "--bucket-option", f"endpoint_url={endpoint}"]

    def start(self, *names: str, **shells: str) -> None:
        """Start agents that know each other, and a door over them."""
        place = self.place
        for name in names:
            place.agent(name, is_started=False, shell=shells.get(name, ""))
        for one in place.agents:
            one.start()
        self.open_door()

    def open_door(self, *options: str) -> None:
        """Open a door over the agents; its option for the bucket is the last and counts."""
        self.place.open_door(*self._words(self._endpoint), *options)
        wait_until(lambda: "not ready" not in self.place.served())

    def publish(
        self, identity: str, previous: str | None = None, *, is_recorded: bool = True
    ) -> None:
        """Make a snapshot and put it into the bucket."""
        publisher = self.place.publisher
        if previous:
            publisher.delta(identity, previous)
        else:
            publisher.full(identity)
        if is_recorded:
            self.place.record(identity, previous)
        client = boto3.client("s3", endpoint_url=self._endpoint)
        records = (publisher.bucket / "_hotload").rglob(f"{identity}.json")
        for path in [*(publisher.bucket / identity).iterdir(), *records]:
            name = path.relative_to(publisher.bucket)
            client.upload_file(str(path), BUCKET, f"{self._prefix}/{name}")
        client.close()

    def reads(self, identity: str) -> list[int]:
        """How often each object of a snapshot was read by agents, in the order of their names."""
        start = f"GET /{BUCKET}/{self._prefix}/{identity}/"
        counts = Counter(call for call in self._calls if call.startswith(start))
        files = sorted(path.name for path in (self.place.publisher.bucket / identity).iterdir())
        assert sum(counts.values()) == sum(counts[f"{start}{file}"] for file in files), counts
        return [counts[f"{start}{file}"] for file in files]


@pytest.fixture
def site(place: Place, s3_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("HOTLOAD_PEER_KEY", KEY)
    with counting_proxy(str(s3_server.options["endpoint_url"])) as (proxy, calls):
        yield Site(place, s3_server, proxy, calls)
        place.stack.close()  # nobody is connected to the proxy any more


def test_each_object_is_read_once_from_the_store(site: Site) -> None:
    place = site.place
    site.start("one", "two", "three", "four")
    site.publish("a")
    place.load("a")
    place.check("a")
    assert set(site.reads("a")) == {1}
    site.publish("b", "a")
    place.load("b", "a")
    place.check("b")
    assert set(site.reads("b")) == {1}
    for one in place.agents:
        assert [path.name for path in (one.directory / "arriving").iterdir()] == ["b"]

    # Who joins late has the delta from peers; the full is held by none of them any more.
    late = place.agent("late")
    late.process.wait()
    wait_until(lambda: late.report()["current"] == "b" and late.report()["readiness"])
    place.check("b")
    assert (set(site.reads("a")), set(site.reads("b"))) == ({2}, {1})


def test_who_joins_late_has_a_full_that_is_held(site: Site) -> None:
    site.start("one", "two")
    site.publish("a")
    site.place.load("a")
    late = site.place.agent("late")
    late.process.wait()
    wait_until(lambda: late.report()["current"] == "a" and late.report()["readiness"])
    site.place.check("a")
    assert set(site.reads("a")) == {1}


def test_a_peer_that_is_gone_is_done_without(site: Site) -> None:
    site.start("one", "two", "three")
    site.open_door("--quorum", "0.5")
    gone = site.place.agents[1]
    gone.kill()
    site.publish("a")
    assert site.place.signal("a").status_code == 200
    wait_until(lambda: site.place.served() == ["a", "not ready", "a"])
    assert set(site.reads("a")) == {1}
    gone.start()
    wait_until(lambda: site.place.served() == ["a"] * 3)
    site.place.check("a")
    assert set(site.reads("a")) == {1}


def test_what_nobody_recorded_comes_from_the_store(site: Site) -> None:
    site.start("one", "two")
    site.publish("a", is_recorded=False)
    site.place.load("a")
    site.place.check("a")
    assert set(site.reads("a")) == {2}


def test_an_agent_with_another_key_reads_for_itself(site: Site) -> None:
    site.start("one", "two", "three", two="export HOTLOAD_PEER_KEY=another-key")
    site.publish("a")
    site.place.load("a")
    site.place.check("a")
    assert set(site.reads("a")) <= {1, 2}
    assert "answers 401" in site.place.agents[1].log()
    logs = "".join(one.log() for one in site.place.agents)
    assert (KEY in logs, "another-key" in logs) == (False, False)


Answering = Callable[[BaseHTTPRequestHandler, bytes], None]


def dies(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def lies(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(bytes([data[0] ^ 1]) + data[1:])


def never_ends(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(data)


def promises(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(202)
    handler.send_header("content-length", "0")
    handler.end_headers()


def leads_away(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(302)
    handler.send_header("location", f"http://127.0.0.9:{handler.server.server_address[1]}/away")
    handler.send_header("content-length", "0")
    handler.end_headers()


def is_silent(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.server.ended.wait(PATIENCE_SECONDS)  # type: ignore[attr-defined]
    handler.close_connection = True


@contextlib.contextmanager
def bad_peer(bucket: Path, answering: Answering) -> Iterator[tuple[list[str], list[str]]]:
    """A peer at three addresses, so that it comes before an agent for some file; what it was
    asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            *_, identity, file = self.path.split("/")
            path = bucket / identity / file
            answering(self, path.read_bytes() if path.is_file() else b"x")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        server.ended = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        port = server.server_address[1]
        try:
            yield [f"http://127.0.0.{number}:{port}" for number in (2, 3, 4)], asked
        finally:
            server.ended.set()  # type: ignore[attr-defined]
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "answering",
    [dies, lies, never_ends, promises, leads_away, is_silent],
    ids=lambda one: one.__name__,
)
def test_a_bad_peer_costs_time_and_no_truth(site: Site, answering: Answering) -> None:
    place = site.place
    with bad_peer(place.publisher.bucket, answering) as (urls, asked):
        place.other_peers = urls
        site.start("one", "two")
        site.publish("a")
        place.load("a")
        place.check("a")
        site.publish("b", "a")
        place.load("b", "a")
        place.check("b")
        place.stack.close()
    assert {path.split("/")[3] for path in asked} <= {"a", "b"}
    assert asked
    if answering is not promises:  # whom two wait for in vain, both read for themselves
        assert set(site.reads("a")) == {1}


def test_who_waits_for_a_canary_says_that_its_snapshot_is_not_there(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = site.place.root / "gate"
    monkeypatch.setenv("GATE", str(verdict))
    site.start("a", "b", "c", "d")  # by whose order canaries are chosen
    site.open_door("--canary", "0.5", "--gate", f"{__name__}:is_released")
    site.publish("a")
    assert site.place.signal("a").status_code == 200
    wait_until(lambda: site.place.served()[:2] == ["a", "a"])
    for one in site.place.agents[2:]:
        headers = {"authorization": f"Bearer {KEY}"}
        url = f"{one.process.address}/agent/files/a/config.json"
        answer = httpx.get(url, headers=headers, timeout=PATIENCE_SECONDS)
        assert answer.status_code == 410
    assert set(site.reads("a")) == {1}
    verdict.touch()
    wait_until(lambda: site.place.served() == ["a"] * 4)
    assert set(site.reads("a")) == {1}


def test_only_files_of_a_snapshot_are_given_and_only_for_the_key(site: Site) -> None:
    site.start("one", "two")
    site.publish("a")
    site.place.load("a")
    site.publish("b", "a")
    site.place.load("b", "a")
    one = site.place.agents[0]
    (one.directory / "arriving" / "b" / ".secret").write_text("x")

    def ask(path: str, authorization: str = f"Bearer {KEY}") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", one.process.port, timeout=60)
        connection.request("GET", f"/agent/files/{path}", headers={"authorization": authorization})
        answer = connection.getresponse()
        read = answer.read()
        connection.close()
        return answer.status, read

    shard = next((site.place.publisher.bucket / "b").glob("layer-*.safetensors"))
    assert ask(f"b/{shard.name}") == (200, shard.read_bytes())  # the delta, not what became of it
    for other in ("", "Bearer", f"Bearer {KEY}x", f"bearer {KEY}", f"Basic {KEY}", "Bearer \xff"):
        assert ask(f"b/{shard.name}", other) == (401, b"{}")
    hostile = [
        *("b/..", "b/%2e%2e", "b/..%2f..%2fcurrent%2fconfig.json", "..%2fheld%2fb/config.json"),
        *("../b/config.json", "b/.secret", "b/.hotload.json", "held/b", "%2e%2e/.lock", "b//etc"),
        *("%2fetc/passwd", "b/%2fetc%2fpasswd", "b/config.json%00", "b/", f"{'b' * 200}/x", "c/x"),
        *("_hotload/snapshots", "b/_x", "latest/config.json", f"b/{'x' * 300}"),
    ]
    for path in hostile:
        assert ask(path)[0] in (404, 410), path
    assert ask(f"a/{shard.name}")[0] == 410
    answer = httpx.get(f"{one.process.address}/agent", timeout=PATIENCE_SECONDS)
    assert answer.status_code == 200
    assert KEY not in json.dumps(answer.json())
