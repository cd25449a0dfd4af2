"""A tiny inference server that reads real weights and answers the routes of every kind of engine.

It listens in a thread of the test. What it serves is the digest of every shard behind the directory
it was given; what goes wrong with it is set on its fields.
"""

from __future__ import annotations

import hashlib
import json
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
    `holds` keeps a reload until it is set.
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

    def load(self, directory: str, version: str | None) -> None:
        """Read every tensor, as an engine does; what is served changes at the end."""
        path = Path(directory)
        self.asked.set()
        self.holds.wait(60)
        StubEngine().load(path)
        self.serves = digests(path)
        if version is not None:
            self.version = version

    def restart(self, directory: Path) -> None:
        """Come back as a server that was started on a directory: it knows no version."""
        self.serves, self.version, self.is_paused = digests(directory), None, False

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
                return 200, {"weight_version": self.lies or self.version}
            case "/pause" | "/pause_generation":
                self.is_paused = True
            case "/resume" | "/continue_generation":
                self.is_paused = False
            case "/collective_rpc":
                assert self.is_paused
                self.load(body["kwargs"]["weights_path"], None)
                return 200, {"results": [None]}
            case "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True, "new_version": self.version}
            case "/update_weights_from_disk":
                self.load(body["model_path"], body["weight_version"])
                return 200, {"success": True, "message": "", "num_paused_requests": 0}
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


@contextmanager
def tiny_engine(engine: TinyEngine | None = None) -> Iterator[TinyEngine]:
    """Serve an engine on a port of its own until the block ends."""
    engine = engine or TinyEngine()

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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
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
