"""Chunks and bodies of answers: choices, log-probabilities, usage, metrics (protocol §12)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from emulator.api.generation import Generation, Piece
from emulator.api.inference_request import InferenceRequest
from emulator.control.settings import EmulatorConfig
from emulator.engine.engine import Token
from emulator.engine.tokens import Tokens


@dataclass(slots=True)
class Written:
    """What was written of one choice so far."""

    prompt: list[int]
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    contents: list[dict[str, Any]] = field(default_factory=list)
    echoed: list[Token] = field(default_factory=list)
    echoed_text: str = ""
    finish_reason: str | None = None


class AnswerWriter:
    """Turns the pieces of one request into what goes over the wire."""

    def __init__(
        self,
        config: EmulatorConfig,
        tokens: Tokens,
        request: InferenceRequest,
        generation: Generation,
        response_id: str,
    ) -> None:
        self._config, self._tokens, self._request = config, tokens, request
        self._generation, self._id = generation, response_id
        self._created = int(time.time())
        self.choices: dict[int, Written] = {}
        self.left = len(request.prompts) * request.n

    def take(self, piece: Piece) -> Written:
        """Add a piece to what its choice has."""
        written = self.choices.get(piece.index)
        if written is None:
            written = self.choices[piece.index] = Written(piece.prompt or [])
            written.echoed, written.echoed_text = piece.echoed, piece.text
        else:
            written.text += piece.text
        written.tokens += piece.tokens
        written.offsets += piece.offsets
        if self._request.logprobs == "content":
            shift = len(written.echoed_text)
            written.contents += [
                self._content(token, offset + shift)
                for token, offset in zip(piece.tokens, piece.offsets, strict=True)
            ]
        if piece.finish_reason is not None:
            written.finish_reason = piece.finish_reason
            self.left -= 1
        return written

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Write a chunk of a stream; the last one carries usage and metrics."""
        written, request = self.take(piece), self._request
        choice: dict[str, Any] = {"index": piece.index}
        if request.is_chat:
            delta: dict[str, Any] = {"content": piece.text}
            choice["delta"] = {"role": "assistant", **delta} if piece.prompt is not None else delta
        else:
            choice["text"] = piece.text
        since = len(written.tokens) - len(piece.tokens)
        choice["logprobs"] = self._logprobs(written, since, piece.echoed)
        choice["finish_reason"] = piece.finish_reason
        body = self._body("chunk", piece.served, [choice])
        if request.wants_ids:
            choice["token_ids"] = [token.id for token in piece.tokens]
            if piece.prompt is not None:
                choice["prompt_token_ids"] = piece.prompt
        if piece.finish_reason is not None and request.wants_raw:
            choice["raw_output"] = self._raw(written)
        if not self.left:
            body["usage"] = self.usage()
            if request.wants_metrics:
                body["perf_metrics"] = self.metrics()
        return body

    def whole(self) -> dict[str, Any]:
        """Write the body of an answer that is not streamed; all pieces were taken before."""
        request = self._request
        choices = []
        for index, written in sorted(self.choices.items()):
            choice: dict[str, Any] = {"index": index}
            text = written.echoed_text + written.text
            if request.is_chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choice["logprobs"] = self._logprobs(written, 0, written.echoed)
            choice["finish_reason"] = written.finish_reason
            if request.wants_ids:
                choice["token_ids"] = [token.id for token in written.tokens]
                choice["prompt_token_ids"] = written.prompt
            if request.wants_raw:
                choice["raw_output"] = self._raw(written)
            choices.append(choice)
        served = self._generation.identities[-1:] or [self._generation.replica.served.identity]
        body = self._body("", served[0], choices)
        body["usage"] = self.usage()
        if request.wants_metrics:
            body["perf_metrics"] = self.metrics()
        return body

    def usage(self) -> dict[str, Any]:
        """Count the tokens."""
        generation = self._generation
        prompt, completion = generation.prompt_count, generation.completion_count
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": generation.cached_count},
        }

    def metrics(self) -> dict[str, Any]:
        """Performance metrics, seconds; the names headers carry after `fireworks-`."""
        generation = self._generation
        first = generation.first_seconds or generation.total_seconds
        return {
            "prompt-tokens": generation.prompt_count,
            "cached-prompt-tokens": generation.cached_count,
            "server-time-to-first-token": round(first, 6),
            "server-processing-time": round(generation.total_seconds, 6),
            "prefill-queue-duration": round(generation.queued_seconds, 6),
            "prefill-duration": round(generation.prefill_seconds, 6),
            "generation-queue-duration": 0.0,
            "generation-duration": round(max(0.0, generation.total_seconds - first), 6),
            "num-concurrent-requests": generation.replica.in_flight + 1,
            "deployment": self._config.deployment,
            "backend-host": generation.replica.name,
        }

    def model(self, served: str | None) -> str:
        """`accounts/…/models/<m>@<identity>`; base weights have no suffix."""
        return f"{self._config.model}@{served}" if served else self._config.model

    def _body(self, form: str, served: str | None, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion"
        if self._request.is_chat:
            kind = "chat.completion.chunk" if form else "chat.completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model(served),
            "choices": choices,
        }

    def _raw(self, written: Written) -> dict[str, Any]:
        """What the model gave, after what was echoed: the vendor's SDK counts on both (§12)."""
        return {
            "completion": written.echoed_text + written.text,
            "prompt_fragments": [self._tokens.decode(written.prompt, skip_special=False)],
            "prompt_token_ids": written.prompt,
            "completion_token_ids": [token.id for token in written.echoed + written.tokens],
            "completion_logprobs": self._logprobs(written, 0, written.echoed),
        }

    def _logprobs(self, written: Written, since: int, echoed: list[Token]) -> object:
        """Echoed tokens, then the choice's from number `since` on, in the form asked for."""
        form = self._request.logprobs
        if form is None:
            return None
        if form == "content":
            return {"content": [self._content(t, 0) for t in echoed] + written.contents[since:]}
        tokens, shift = echoed + written.tokens[since:], len(written.echoed_text)
        offsets = [0] * len(echoed) + [at + shift for at in written.offsets[since:]]
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_ids": [token.id for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._name(i): value for i, value in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _content(self, token: Token, offset: int) -> dict[str, Any]:
        name, data = self._tokens.name(token.id)
        entry: dict[str, Any] = {
            "token": name,
            "bytes": data,
            "token_id": token.id,
            "logprob": token.logprob,
            "sampling_logprob": token.sampling_logprob,
            "text_offset": offset,
            "top_logprobs": [self._alternative(i, value) for i, value in token.top],
        }
        if self._request.wants_routing:
            entry["routing_matrix"] = token.routing
        return entry

    def _alternative(self, token: int, logprob: float) -> dict[str, Any]:
        name, data = self._tokens.name(token)
        return {"token": name, "bytes": data, "token_id": token, "logprob": logprob}

    def _name(self, token: int) -> str:
        return self._tokens.name(token)[0]
