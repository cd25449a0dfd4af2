"""An inference server of which an agent reloads the weights, asked as vLLM is; needs nothing.

It listens on port 8000. POST /reload {"path", "name"} reads every shard behind the path.
"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ToyEngine(BaseHTTPRequestHandler):
    """What it serves is the same for all requests."""

    version: str | None = None
    digests: dict[str, str]

    def do_GET(self) -> None:
        self.answer(json.dumps({"weight_version": ToyEngine.version, "digests": self.digests}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/reload":
            load(Path(body["path"]), body["name"])
            self.answer("{}")
        else:
            self.answer(f"data: {json.dumps(self.completion())}\n\n", "text/event-stream")

    def completion(self) -> dict[str, object]:
        span = {"version": ToyEngine.version, "start": 0, "end": 1}
        choice = {
            "index": 0,
            "text": "a",
            "logprobs": {"tokens": ["token_id:5"], "token_logprobs": [0.0]},
            "finish_reason": "stop",
            "prompt_token_ids": [1, 2],
            "token_ids": [5],
            "weight_versions": [span] if ToyEngine.version else None,
        }
        usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
        return {"id": "1", "model": "policy", "choices": [choice], "usage": usage}

    def answer(self, text: str, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def digests(directory: Path) -> dict[str, str]:
    """Digest the shards of a checkpoint."""
    shards = sorted(directory.glob("*.safetensors"))
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in shards}


def load(directory: Path, version: str | None) -> None:
    """Read a checkpoint; from then on it is what is served."""
    ToyEngine.digests, ToyEngine.version = digests(directory), version


if __name__ == "__main__":
    load(Path("/var/lib/hotload/replica/current"), None)
    ThreadingHTTPServer(("0.0.0.0", 8000), ToyEngine).serve_forever()
