"""The tiny inference server with the emulator's numpy engine behind it: it really samples.

It answers `/v1/completions` as vLLM does: token ids, log-probabilities of what was sampled, and the
version of the weights.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emulator.engine.engine import SamplingParameters
from emulator.engine.numpy_engine import NumpyEngine
from emulator.engine.tokens import Tokens
from hotload.rollout.trajectory import sample_seed
from tests.agent.tiny_engine import TinyEngine, digests

LENGTH = 8


class SamplingEngine(TinyEngine):
    """Samples from what it serves. `fails_at` is the version whose samples are refused, `loaded`
    has all that it ever served; `answers` keeps samples back until it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[dict[str, str]] = []
        self.sampled: list[str | None] = []
        self.fails_at: str | None = None
        self.tells_logprobs = True
        self.waiting, self._counting = 0, threading.Lock()
        self.answers = threading.Event()
        self.answers.set()

    def load(self, directory: str, version: str | None) -> None:
        super().load(directory, version)
        self.take(Path(directory))

    def restart(self, directory: Path) -> None:
        super().restart(directory)
        self.take(directory)

    def take(self, directory: Path) -> None:
        """Sample from a checkpoint from now on."""
        self.loaded.append(digests(directory))
        self.model = (NumpyEngine().load(directory), Tokens.read(directory), self.version)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path != "/v1/completions":
            return super().answer(method, path, body)
        with self._counting:
            self.waiting += 1
        self.answers.wait(60)
        with self._counting:
            self.waiting -= 1
        weights, tokens, version = self.model
        self.sampled.append(version)
        if self.fails_at is not None and version == self.fails_at:
            return 400, {"error": {"message": "no", "type": "invalid_request_error"}}
        return 200, complete(weights, tokens, version, body, tells_logprobs=self.tells_logprobs)


def complete(
    weights: Any, tokens: Tokens, version: str | None, body: Any, *, tells_logprobs: bool = True
) -> dict[str, Any]:
    """Answer a body of vLLM's completions."""
    prompt = body["prompt"]
    ids = tokens.encode(prompt) if isinstance(prompt, str) else prompt
    sampling = SamplingParameters(temperature=body["temperature"], seed=body["seed"])
    begun = NumpyEngine.prefill(weights, ids, sampling, None, echo=False)
    drawn = begun.begin(0, tokens.stop_ids).advance(weights, body["max_tokens"])
    told = [token.id for token in drawn]
    choice: dict[str, Any] = {
        "index": 0,
        "text": tokens.decode(told),
        "finish_reason": "length" if len(told) == body["max_tokens"] else "stop",
    }
    if tells_logprobs:
        choice |= {
            "prompt_token_ids": ids,
            "token_ids": told,
            "logprobs": {
                "tokens": [f"token_id:{one}" for one in told],
                "token_logprobs": [token.sampling_logprob for token in drawn],
            },
            "weight_versions": [{"version": version or "default", "start": 0, "end": len(told)}],
        }
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(told)}
    return {"model": "policy", "choices": [choice], "usage": usage}


def write_problems(path: Path, checkpoint: Path, count: int, numbers: Sequence[int] = (0,)) -> None:
    """Write problems whose answers are what a checkpoint gives a gate: a policy that is near to it
    has a high reward by `tests.agent.gate_rewards:near`."""
    weights, tokens = NumpyEngine().load(checkpoint), Tokens.read(checkpoint)
    rows = []
    for row in range(count):
        name = f"p{row}"
        asked = {"prompt": f"{row} + 1 =", "max_tokens": LENGTH, "temperature": 1}
        given = [
            complete(weights, tokens, None, asked | {"seed": sample_seed(0, name, 0, number)})
            for number in numbers
        ]
        answer = [one["choices"][0]["token_ids"] for one in given]
        rows.append({"id": name, "prompt": asked["prompt"], "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
