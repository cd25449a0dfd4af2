"""A tiny inference server that reads real weights and answers the routes of every kind of engine.

It listens in a thread of the test, or as `python -m tests.agent.tiny_engine LINK BASE`. What it
serves is the digest of every shard behind the directory it was given; what goes wrong with it is
set on its fields.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from emulator.engine.stub import StubEngine


def digests(directory: Path) -> dict[str, str]:
    """Digest the shards of a checkpoint."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("*.safetensors"))
    }


class TinyEngine:
    """What the server serves, what it was asked, and what it answers wrongly.

    `refuses` has the paths that answer 500, `lies` is the version that it tells instead of its own,
    `holds` keeps a reload after its first shard until it is set; one is read in `shard_seconds`.
    Reloads come one after the other. One that is paused reads in place, shard by shard, and samples
    nothing meanwhile. `sampled` has every name and weights that samples could be drawn from.
    """

    def __init__(self) -> None:
        self.serves: dict[str, str] = {}
        self.version: str | None = None
        self.calls: list[tuple[str, Any]] = []
        self.is_paused = self.is_unflushed = False
        self.refuses: set[str] = set()
        self.refusals_left: int | None = None
        self.lies: str | None = None
        self.holds = threading.Event()
        self.holds.set()
        self.asked = threading.Event()
        self.url = ""
        self.sampled: list[tuple[str | None, dict[str, str]]] = []
        self.shard_seconds = 0.0
        self._pace = threading.Event()
        self._loading, self._state = threading.Lock(), threading.Lock()
        self._start, self._changes, self._version_asked = secrets.token_hex(4), 0, 0

    def load(self, directory: str, version: str | None) -> None:
        """Read every tensor, as an engine does; what samples are drawn from changes at the end."""
        path = Path(directory)
        with self._loading:
            StubEngine().load(path)
            found: dict[str, str] = {}
            for name, digest in self._read(path):
                found[name] = digest
                self.asked.set()
                self.holds.wait(60)
                if self.is_paused:
                    self._change({**self.serves, name: digest}, self.version)
            self._change(found, self.version if version is None else version)

    def restart(self, directory: Path) -> None:
        """Come back as a server that was started on a directory: it knows no version."""
        self.is_paused = False
        self._change(dict(self._read(directory)), None)

    def sample(self) -> dict[str, Any] | None:
        """Say which weights a sample of now is drawn from, and their name; None: none is drawn.

        `state` is another after each change; `version_asked`, how often the version was asked for
        since then.
        """
        with self._state:
            if self.is_paused:
                return None
            return {
                "serves": self.serves,
                "weight_version": self.version,
                "state": f"{self._start}-{self._changes}",
                "version_asked": self._version_asked,
            }

    def _read(self, path: Path) -> Iterator[tuple[str, str]]:
        """Digest shard after shard, each opened when it is its turn."""
        for shard in sorted(path.glob("*.safetensors")):
            if self.shard_seconds:
                self._pace.wait(self.shard_seconds)
            yield shard.name, hashlib.sha256(shard.read_bytes()).hexdigest()

    def _change(self, serves: dict[str, str], version: str | None) -> None:
        with self._state:
            self.serves, self.version = serves, version
            self._changes, self._version_asked = self._changes + 1, 0
            if not self.is_paused:
                self.sampled.append((version, serves))

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Answer one request."""
        self.calls.append((path, body))
        route = urlsplit(path).path
        if route in self.refuses and self.refusals_left != 0:
            if self.refusals_left is not None:
                self.refusals_left -= 1
            return 500, {"error": "CUDA error: an illegal memory access was encountered"}
        match route:
            case "/health":
                return 200, {"status": "ok"}
            case "/weight_info" | "/model_info" | "/info":
                self._version_asked += 1
                return 200, {"weight_version": self.lies or self.version}
            case "/sample":
                found = self.sample()
                return (503, {"error": "paused"}) if found is None else (200, found)
            case "/pause" | "/pause_generation":
                self.is_paused = True
            case "/resume" | "/continue_generation":
                self.is_paused = False
            case "/collective_rpc":
                assert self.is_paused
                self.load(body["kwargs"]["weights_path"], None)
                return 200, {"results": [None]}
            case "/update_weight_version":
                self._change(self.serves, body["new_version"])
                return 200, {"success": True, "new_version": self.version}
            case "/update_weights_from_disk":
                self.load(body["model_path"], body["weight_version"])
                return 200, {"success": True, "message": "", "num_paused_requests": 0}
            case "/reset_encoder_cache":
                return 200, ""
            case "/reset":
                self.serves = {}
            case "/load_model":
                self.load(body["model"], None)
                return 200, 'data: {"status": "ready"}\n\n'
            case "/reload":
                self.load(body["path"], body["name"])
            case "/reset_prefix_cache":
                return 200, {"success": not self.is_unflushed}
            case _:
                return 404, {"detail": "Not Found"}
        return 200, {}


def serve(engine: TinyEngine, port: int = 0) -> ThreadingHTTPServer:
    """Make the server of an engine; 0 takes a free port."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self, method: str) -> None:
            length = int(self.headers.get("content-length", 0))
            data = self.rfile.read(length)
            status, answer = engine.answer(method, self.path, json.loads(data) if data else None)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text.encode())))
            with suppress(ConnectionError):  # the caller has given up
                self.end_headers()
                self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self.handle_one("GET")

        def do_POST(self) -> None:
            self.handle_one("POST")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


@contextmanager
def tiny_engine(engine: TinyEngine | None = None) -> Iterator[TinyEngine]:
    """Serve an engine on a port of its own until the block ends."""
    engine = engine or TinyEngine()
    server = serve(engine)
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield engine
    finally:
        engine.holds.set()
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    """Serve what lies behind LINK, or BASE where nothing does, until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("link", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--shard-seconds", type=float, required=True)
    arguments = parser.parse_args()
    engine = TinyEngine()
    engine.shard_seconds = arguments.shard_seconds
    engine.restart(arguments.link if arguments.link.exists() else arguments.base)
    serve(engine, arguments.port).serve_forever()


if __name__ == "__main__":
    main()
