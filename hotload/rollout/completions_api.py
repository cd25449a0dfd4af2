"""Inference on the wire: server-sent events, answers, probes (protocol §11, §12).

The vendor's rules stand above the lines that obey them, and the answers of other servers are spelt
as the vendor's before they are taken in (hotload.rollout.engines). JSON is decoded by the caller;
this module reads values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hotload.errors import ProtocolError, shorten
from hotload.options import Sampling
from hotload.quantities import plural
from hotload.rollout.failures import VENDOR, Action, Cause, Failure, FailureRules, failure_in_stream
from hotload.rollout.routing import routes_of_array, routes_of_matrices
from hotload.rollout.trajectory import LOGPROB_RANGE, TOKEN_ID_LIMIT

DONE = b"[DONE]"
HEARTBEAT_EVENTS = frozenset({"ping", "heartbeat", "keepalive"})
FINISH_REASONS = frozenset({"stop", "length", "tool_calls"})
WARM_UP_BODY = {"prompt": [1, 2], "max_tokens": 4, "temperature": 0}
ONE_TOKEN_BODY = {**WARM_UP_BODY, "max_tokens": 1}
COUNT_LIMIT = 1 << 31
IDENTITY_LIMIT = 64
"""Distinct identities kept of one answer."""
TOOL_CALL_LIMIT = 256
NUMBERS = frozenset({float, int})  # and not bool, which is an int to a comparison
UNLABELLED = (None, "", "default")
"""What vLLM and SGLang call weights that nobody has labelled."""


class Logprobs(Enum):
    """Of which distribution a server's log-probabilities are: each name lets some settings sample
    from that very one.
    """

    RAW = "the model's own: temperature 1, top_p 1, top_k 0"
    TEMPERED = "with the temperature and without filters: temperature above 0, top_p 1, top_k 0"
    SAMPLED = "the one sampled from: temperature above 0"

    def are_sampled(self, sampling: Sampling) -> bool:
        """Tell whether they are of the distribution that these settings sample from."""
        is_whole = (sampling.top_p, sampling.top_k) == (1, 0)
        match self:
            case Logprobs.RAW:
                return is_whole and sampling.temperature == 1
            case Logprobs.TEMPERED:
                return is_whole and sampling.temperature > 0
            case Logprobs.SAMPLED:
                return sampling.temperature > 0


@dataclass(frozen=True, slots=True)
class Reading:
    """How answers are read. `spell` spells a decoded chunk as the vendor does; None where it is."""

    spell: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    logprobs: Logprobs = Logprobs.RAW
    rules: FailureRules = VENDOR


AS_THE_VENDOR = Reading()


def probe_body(token_ids: Sequence[int], model: str) -> dict[str, Any]:
    """Return the body that asks for the log-probabilities of its own prompt (protocol §11)."""
    return {
        "model": model,
        "prompt": list(token_ids),
        "n": 1,
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "echo": True,
        "logprobs": True,
        "stream": False,
        "perf_metrics_in_response": True,
        "context_length_exceeded_behavior": "error",
    }


def parse_probe(
    data: bytes, token_ids: Sequence[int]
) -> tuple[str | None, str | None, tuple[float, ...]]:
    """Read a probe's answer: replica and identity, where named, and the raw log-probabilities of
    all tokens but the first.

    Raises:
        ProtocolError: it has other tokens, or no log-probabilities.
    """
    try:
        body = json.loads(data)
        served = served_identity(body["model"])
        content = body["choices"][0]["logprobs"]["content"][: len(token_ids)]
        echoed = [entry["token_id"] for entry in content]
        logprobs = tuple(float(entry["logprob"]) for entry in content[1:])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ProtocolError("probe", 200, "expected the log-probabilities of the prompt") from None
    if echoed != list(token_ids):
        raise ProtocolError("probe", 200, "expected the tokens of the prompt, found others")
    metrics = body.get("perf_metrics")
    names = ("backend-host", "fireworks-backend-host")
    hosts = [metrics.get(name) for name in names] if isinstance(metrics, Mapping) else []
    host = next(filter(None, hosts), None)
    return None if host is None else str(host)[:256], served, logprobs


def served_identity(model: object) -> str | None:
    """Read the identity a response's `model` names: the text after its last `@` (protocol §12);
    None without one.
    """
    if not isinstance(model, str) or "@" not in model:
        return None
    return model.rpartition("@")[2] or None


class EventStream:
    """Server-sent events out of pieces cut anywhere: `data:` lines, comments, an optional event
    name.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._data: list[bytes] = []
        self._name = ""

    def feed(self, piece: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield the (event name, data) pairs that `piece` completes; the name is empty where none
        was given.
        """
        if b"\n" not in piece:
            self._pieces.append(piece)
            return
        if self._pieces:
            piece = b"".join((*self._pieces, piece))
        lines = piece.split(b"\n")
        self._pieces = [lines.pop()]
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if not line:
                if self._data:
                    yield self._name, b"\n".join(self._data)
                    self._data = []
                self._name = ""
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif line.startswith(b"event:"):
                self._name = line[6:].strip().decode("utf-8", "replace")


class Answer:
    """One answer, put together from its chunks (or from the one body of a plain response).

    Args:
        sampling: what was asked for.
        prompt: the token ids that were sent, where ids were sent.
        reading: how the server that is asked spells and means things.
    """

    def __init__(
        self, sampling: Sampling, prompt: tuple[int, ...] | None, reading: Reading = AS_THE_VENDOR
    ) -> None:
        self._max_tokens = sampling.max_completion_tokens
        self.reading = reading
        # protocol §12: `logprob` may stand in only where it is of what was really sampled.
        self._is_sampled = reading.logprobs.are_sampled(sampling)
        self._sent_prompt = prompt
        self._wants_routes = sampling.include_routing_matrix
        self._model: object = None
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._arguments: dict[int, list[str]] = {}
        self._content_ids: list[Any] = []
        self._raw_ids: list[Any] = []
        self._last_raw_ids: list[Any] = []
        self._matrices: list[Any] = []
        self._routed_experts: Any = None
        self._lacks_logprobs = False
        self._stated_count: int | None = None
        self._labelled_count: int | None = None
        self.is_done = False
        """Whether the closing `[DONE]` was seen; a plain response is done by itself."""
        self.observed: list[str] = []
        self.last_identity: str | None = None
        self.runs: list[tuple[int, str]] = []
        """Which tokens each identity made: (number of the first token, identity); an empty identity
        is one that was not named."""
        self.finish_reason: Any = None
        self.text = ""
        self.reasoning = ""
        """What a server that parses chats took for thought; its tokens are among the others."""
        self.tool_calls: tuple[dict[str, Any], ...] = ()
        """What such a server took for calls, as messages have them."""
        self.token_ids: tuple[int, ...] = ()
        self.sampling_logprobs: list[Any] = []
        self.prompt_token_ids: tuple[int, ...] = prompt or ()
        self.routes: bytes | None = None
        """Of prompt and answer (hotload.rollout.routing), where they were asked for and every token
        of the answer has one."""
        self.prompt_token_count = self.cached_prompt_token_count = 0
        self.prefill_queue_seconds: float | None = None
        self.replica: str | None = None
        self.response_id: str | None = None

    @property
    def received(self) -> int:
        """How much has come so far, in pieces of text and tokens: grows while the server answers,
        whatever else it sends meanwhile."""
        said = len(self._texts) + len(self._reasoning) + sum(map(len, self._arguments.values()))
        return said + len(self.sampling_logprobs) + len(self._raw_ids) + bool(self.finish_reason)

    def add(self, *chunks: Any) -> Failure | None:
        """Take decoded chunks in; the failure, if one of them is or carries an error."""
        spell = self.reading.spell
        try:
            for chunk in chunks if spell is None else map(spell, chunks):
                if chunk.get("error"):
                    return failure_in_stream(chunk, self.reading.rules)
                model = chunk.get("model")
                if model != self._model:
                    self._model = model
                    self._observe(served_identity(model), len(self.sampling_logprobs))
                for choice in chunk.get("choices") or ():
                    self._add(choice)
                if usage := chunk.get("usage"):
                    self._add_usage(usage)
                if metrics := chunk.get("perf_metrics"):
                    self.add_metrics(metrics)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return malformed("a chunk is not of the documented form")
        return None

    def _add(self, choice: Mapping[str, Any]) -> None:
        if choice.get("index"):
            raise ValueError("one answer was asked for")
        text = choice.get("text")
        if text is None:
            said = choice.get("delta") or choice.get("message") or {}
            text = said.get("content")
            if reasoning := said.get("reasoning_content") or said.get("reasoning"):
                self._reasoning.append(reasoning)
            for number, call in enumerate(said.get("tool_calls") or ()):
                self._add_call(call.get("index", number), call)
        if text:
            self._texts.append(text)
        logprobs = choice.get("logprobs")
        if logprobs:
            for entry in logprobs.get("content") or ():
                self._content_ids.append(entry.get("token_id"))
                value = entry.get("sampling_logprob")
                if value is None:
                    value = entry.get("logprob") if self._is_sampled else None
                    self._lacks_logprobs |= value is None
                self.sampling_logprobs.append(value)
                if self._wants_routes:
                    self._matrices.append(entry.get("routing_matrix"))
        if self._wants_routes and choice.get("routed_experts"):
            self._routed_experts = choice["routed_experts"]
        raw = choice.get("raw_output")
        if raw or "token_ids" in choice:
            self._add_raw(raw or {}, choice)
        for span in choice.get("weight_versions") or ():
            self._label(span["version"], span["start"], span["end"])
        reason = choice.get("finish_reason")
        if reason:
            self.finish_reason = reason

    def _add_call(self, number: int, piece: Mapping[str, Any]) -> None:
        """Put a call together: its arguments come in pieces."""
        if number not in self._calls and len(self._calls) == TOOL_CALL_LIMIT:
            raise ValueError(f"more than {TOOL_CALL_LIMIT} tool calls")
        call = self._calls.setdefault(number, {"type": "function", "function": {}})
        call |= {name: piece[name] for name in ("id", "type") if piece.get(name)}
        function = piece.get("function") or {}
        if function.get("name"):
            call["function"]["name"] = function["name"]
        self._arguments.setdefault(number, []).append(function.get("arguments") or "")

    def _add_usage(self, usage: Mapping[str, Any]) -> None:
        self.prompt_token_count = int(_number(usage.get("prompt_tokens")) or 0)
        details = usage.get("prompt_tokens_details") or {}
        self.cached_prompt_token_count = int(_number(details.get("cached_tokens")) or 0)
        stated = _number(usage.get("completion_tokens"))
        if stated is not None and self.finish_reason:  # before, it is of what there was by then
            self._stated_count = int(stated)

    def _label(self, version: object, start: int, end: int) -> None:
        """Note the weights of the tokens from `start` to before `end`, as labels name them."""
        if start != (self._labelled_count or 0):
            raise ValueError("labels of weights with a gap")
        self._labelled_count = end
        self._observe(None if version in UNLABELLED else str(version), start)

    def _observe(self, identity: str | None, count: int) -> None:
        """Note what made the tokens after the first `count`; None where no name was told."""
        if self.runs and self.runs[-1][0] == count:
            self.runs.pop()  # it made no token
        name = "" if identity is None else identity[:256]
        is_new = name != self.runs[-1][1] if self.runs else name != ""
        if is_new and len(self.runs) < IDENTITY_LIMIT:
            self.runs.append((count, name))
        if identity is None:
            return
        self.last_identity = name
        if name not in self.observed and len(self.observed) < IDENTITY_LIMIT:
            self.observed.append(name)

    def _add_raw(self, raw: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        ids = raw.get("completion_token_ids") or choice.get("token_ids")
        if ids:
            self._last_raw_ids = list(ids)
            self._raw_ids += ids
        prompt = raw.get("prompt_token_ids") or choice.get("prompt_token_ids")
        if prompt:
            self.prompt_token_ids = tuple(prompt)

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Take performance metrics in, from the last chunk or from headers, in either spelling
        (protocol §12).
        """

        def find(name: str) -> Any:
            for spelling in (name, f"fireworks-{name}"):
                value = metrics.get(spelling)
                if value is not None:
                    return value
            return None

        self.prefill_queue_seconds = _number(find("prefill-queue-duration"))
        if not self.cached_prompt_token_count:
            self.cached_prompt_token_count = int(_number(find("cached-prompt-tokens")) or 0)
        host = find("backend-host")
        if host is not None:
            self.replica = str(host)[:256]

    def finish(self) -> Failure | None:
        """Close the answer and settle its text and tokens; the failure, if it cannot be trained on.

        An answer cut short before its `[DONE]` may be asked for again; one that was whole and lacks
        something is a failed sample: ids are never made by tokenizing again (protocol §12).
        """
        try:
            return self._settle()
        except (TypeError, ValueError, OverflowError):
            return malformed("a value is not of the documented type")

    def _settle(self) -> Failure | None:
        if failure := self._unusable_end():
            return failure
        self._join_pieces()
        lacking = Action.FAIL_SAMPLE if self.is_done else Action.RETRY
        values = self.sampling_logprobs
        count = len(values)
        has_said = self.text or self.reasoning or self.tool_calls
        if self._lacks_logprobs or (count == 0 and (self._raw_ids or has_said)):
            return Failure(lacking, Cause.MISSING_LOGPROBS, 200, "tokens without log-probability")
        if not NUMBERS.issuperset(map(type, values)):
            return malformed("a log-probability is not a number")
        if values and not LOGPROB_RANGE[0] <= min(values) <= max(values) <= LOGPROB_RANGE[1]:
            return malformed("a log-probability out of range")
        ids = self._ids(count)
        if ids is None:
            detail = f"{count} log-probabilities, {len(self._last_raw_ids)} token ids"
            return Failure(lacking, Cause.MISSING_TOKEN_IDS, 200, detail)
        if not _are_ids(ids):
            detail = f"a token id that is none: expected numbers from 0 to {TOKEN_ID_LIMIT - 1}"
            return Failure(lacking, Cause.MISSING_TOKEN_IDS, 200, detail)
        self.token_ids = tuple(ids)
        if miscounted := self._miscount():
            return malformed(miscounted, lacking)
        if self._labelled_count not in (None, count):
            detail = f"weights named of {self._labelled_count} tokens, {count} found"
            return malformed(detail, lacking)
        while self.runs and self.runs[-1][0] >= count:
            self.runs.pop()  # it made no token
        if not _are_ids(self.prompt_token_ids):
            return malformed("the prompt's token ids are not ids")
        if count and not self.prompt_token_ids:
            detail = "the prompt's token ids are missing"
            return Failure(lacking, Cause.MISSING_TOKEN_IDS, 200, detail)
        if self._sent_prompt is not None and self.prompt_token_ids != self._sent_prompt:
            return malformed("the prompt's token ids came back changed", Action.FAIL_SAMPLE)
        if count and self._routed_experts is not None:
            length = len(self.prompt_token_ids) + count
            self.routes = routes_of_array(self._routed_experts, length)
        elif self._matrices and all(self._matrices):
            self.routes = routes_of_matrices(self._matrices, len(self.prompt_token_ids))
        if count > self._max_tokens:
            detail = f"{count} tokens, {self._max_tokens} asked for"
            return Failure(Action.FAIL_SAMPLE, Cause.TOO_LONG, 200, detail)
        return None

    def _unusable_end(self) -> Failure | None:
        """Say how the answer ended, where that was neither by itself nor at its limit."""
        if self.finish_reason is None:
            detail = "the stream ended without a finish reason"
            return Failure(Action.RETRY, Cause.TRUNCATED, 200, detail)
        if self.finish_reason in FINISH_REASONS:
            return None
        detail = f"the answer ended by {shorten(self.finish_reason)}"
        # The service's own trouble. An end by anything else (`content_filter`, `repetition`, a
        # word nobody has documented) would come again for the same seed.
        if self.finish_reason == "abort":
            return Failure(*self.reading.rules.abort, 200, detail)
        if self.finish_reason == "error":
            return Failure(Action.RETRY, Cause.SERVER_ERROR, 200, detail)
        end = str(self.finish_reason)
        return Failure(Action.FAIL_SAMPLE, Cause.UNUSABLE_END, 200, detail, end=end)

    def _join_pieces(self) -> None:
        self.text = "".join(self._texts)
        self.reasoning = "".join(self._reasoning)
        for number, pieces in self._arguments.items():
            self._calls[number]["function"]["arguments"] = "".join(pieces)
        self.tool_calls = tuple(self._calls[number] for number in sorted(self._calls))

    def _ids(self, count: int) -> list[Any] | None:
        """What was told as the ids of `count` tokens: those beside the log-probabilities, or else
        the raw output's.

        The raw output comes in pieces. The vendor's may come at once, and may end with the stop
        token, if one ended the answer.
        """
        is_vendors = self.reading.spell is None
        longest = COUNT_LIMIT if is_vendors and self.finish_reason != "length" else count
        told = (self._last_raw_ids, self._raw_ids) if is_vendors else (self._raw_ids,)
        raws = [raw for raw in told if count <= len(raw) <= longest]
        if None not in self._content_ids:
            ids = self._content_ids
            if self._raw_ids and all(raw[:count] != ids for raw in raws):
                return None
        elif raws and len(raws[0]) == count:
            ids = raws[0]
        elif len(self._raw_ids) == count:
            ids = self._raw_ids
        else:
            return None
        return ids

    def _miscount(self) -> str:
        """Say how the answer has other than its number of tokens; nothing where it has them all.

        A stop token that the raw output alone ends with may be counted in the usage.
        """
        count, stated = len(self.token_ids), self._stated_count
        found = f"found {plural(count, 'token')} with a log-probability"
        with_stop = [
            len(raw)
            for raw in (self._last_raw_ids, self._raw_ids)
            if tuple(raw[:count]) == self.token_ids
        ]
        if stated is not None and stated not in (count, *with_stop):
            return f"{found}, expected {stated} by its usage"
        if not count and self.finish_reason != "stop":
            return f"{found}, expected at least one before an end by {self.finish_reason}"
        return ""


def _are_ids(tokens: Collection[Any]) -> bool:
    if not tokens:
        return True
    return set(map(type, tokens)) == {int} and 0 <= min(tokens) <= max(tokens) < TOKEN_ID_LIMIT


def _number(value: Any) -> float | None:
    """A statistic as text or number; what cannot be one was not sent."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < COUNT_LIMIT else None


def malformed(detail: str, action: Action = Action.RETRY) -> Failure:
    """Report an answer that is not of the documented form."""
    return Failure(action, Cause.MALFORMED, 200, detail)
