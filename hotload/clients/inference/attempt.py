"""One attempt: a request, and its answer read to the end (protocol §11-§13)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from hotload.clients.inference.transport import NO_ANSWER, HttpTransport, head_of, names_in
from hotload.clock import monotonic
from hotload.errors import ProtocolError
from hotload.options import Sampling
from hotload.publish import fireworks_names
from hotload.rollout import completions_api
from hotload.rollout.engines.kind import ServerKind, form_of
from hotload.rollout.failures import Action, Cause, Failure, FailureRules, failure_of_status
from hotload.rollout.request import Request
from hotload.rollout.retry_after import retry_after_seconds

EVENT_STREAM = "text/event-stream"
# The objects of a larger piece, decoded at once, would be so many that Python's collector goes over
# the whole heap while they are made: four times the cost, 0.2 ms of a sample.
PIECE_BYTES = 16 << 10
PLAIN_LIMIT_BYTES = 64 << 10
ANSWER_LIMIT_BYTES = 1 << 20
ANSWER_LIMIT_BYTES_PER_TOKEN = 16 << 10


def body_bytes(body: dict[str, Any]) -> bytes:
    """Write a body as JSON."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:  # an integer of more than 64 bits in a chat's messages
        return json.dumps(body).encode()


async def send_once(
    transport: HttpTransport,
    kind: ServerKind,
    request: Request,
    body: bytes,
    answer: completions_api.Answer,
) -> Failure | None:
    """Send `request` once and read its answer into `answer`; return the failure if it is of no use.

    Raises:
        ProtocolError: 200 with something else than an answer.
    """
    path = kind.endpoints[form_of(request.problem)].path
    headers = {
        kind.request_id_header: request.request_id,
        **dict.fromkeys(kind.session_headers, request.session_id),
    }
    try:
        async with await transport.post(path, body, headers) as response:
            return await _read(response, request.sampling, answer)
    except aiohttp.ConnectionTimeoutError as error:
        return _no_answer(Cause.CONNECTION, error)
    except TimeoutError as error:
        return _no_answer(Cause.TIMEOUT, error)
    except NO_ANSWER as error:
        return _no_answer(Cause.CONNECTION, error)


async def _read(
    response: aiohttp.ClientResponse, sampling: Sampling, answer: completions_api.Answer
) -> Failure | None:
    # Bytes of any value, as text that a file can hold: aiohttp's own headers may hold surrogates.
    headers = {
        name.lower().decode("latin-1"): value.decode("latin-1")
        for name, value in response.raw_headers
    }
    answer.response_id = next(
        (headers[name][:256] for name in fireworks_names.RESPONSE_ID_HEADERS if headers.get(name)),
        None,
    )
    if response.status != 200:
        async with asyncio.timeout(sampling.sample_timeout):
            head = await head_of(response)
        return _failure_of_status(response.status, headers, head, answer.reading.rules)
    named = headers.get("content-type", "").partition(";")[0].strip().lower()
    if named not in (EVENT_STREAM, "application/json"):
        raise ProtocolError("sample", 200, f"expected {EVENT_STREAM}, found {named[:80]!r}")
    chunks = Chunks(answer) if named == EVENT_STREAM else None
    plain: list[bytes] = []
    size_bytes = 0
    limit_bytes = ANSWER_LIMIT_BYTES + ANSWER_LIMIT_BYTES_PER_TOKEN * sampling.max_completion_tokens
    progress_at = monotonic()
    async for piece in response.content.iter_chunked(PIECE_BYTES):
        size_bytes += len(piece)
        if size_bytes > limit_bytes:
            detail = f"more than {limit_bytes} bytes"
            return Failure(Action.FAIL_SAMPLE, Cause.TOO_LONG, 200, detail)
        before = answer.received
        if chunks is None:
            plain.append(piece)
        elif failure := chunks.feed(piece):
            return failure
        # A server that hangs may go on sending heartbeats, empty chunks, or single bytes.
        now = monotonic()
        if answer.received > before:
            progress_at = now
        elif now - progress_at > sampling.sample_timeout:
            detail = "nothing of an answer" if chunks else "not whole in time"
            return Failure(Action.RETRY, Cause.TIMEOUT, None, detail)
    if chunks is not None:
        failure = chunks.end()
    else:
        answer.is_done = True
        failure = _take("", b"".join(plain), answer)
    if failure is not None:
        return failure
    if answer.prefill_queue_seconds is None:
        answer.add_metrics(headers)
    return answer.finish()


class Chunks:
    """Puts the pieces of an event stream into an answer.

    As long as the stream is nothing but `data: {…}` and blank lines, as most are from end to end,
    all the events of a piece are decoded at once, at two thirds of the cost.
    """

    def __init__(self, answer: completions_api.Answer) -> None:
        self._answer = answer
        self._events: completions_api.EventStream | None = None
        self._tail = b""

    def feed(self, piece: bytes) -> Failure | None:
        """Take the next bytes in, cut anywhere; the failure, if they are or carry one."""
        if self._events is None:
            if self._tail:
                piece = self._tail + piece
            end = piece.rfind(b"\n\n")
            # JSON has no raw line ends: these are of lines that end in CRLF, which are not plain.
            if end < 0 and len(piece) < PLAIN_LIMIT_BYTES and b"\r" not in piece:
                self._tail = piece
                return None
            failure, is_plain = self._feed_plain(piece[:end]) if end >= 0 else (None, False)
            if is_plain:
                self._tail = piece[end + 2 :]
                return failure
            self._events, self._tail = completions_api.EventStream(), b""
        for name, data in self._events.feed(piece):
            failure = _take(name, data, self._answer)
            if failure is not None:
                return failure
        return None

    def end(self) -> Failure | None:
        """Take in what is left when the stream has ended."""
        if self._tail and self._events is None:
            self._events, tail = completions_api.EventStream(), self._tail
            return self.feed(tail)
        return None

    def _feed_plain(self, events: bytes) -> tuple[Failure | None, bool]:
        """The failure of whole events, and whether they were plain; others are not taken in."""
        if not events.startswith(b"data: {"):
            return None, False
        is_done = events.endswith(b"\n\ndata: [DONE]")
        text = events[6:-14] if is_done else events[6:]
        joined = text.replace(b"\n\ndata: ", b",")
        count = 1 + (len(text) - len(joined)) // 7
        try:
            chunks = orjson.loads(b"[%b]" % joined)
        except orjson.JSONDecodeError:
            return None, False
        if len(chunks) != count:
            return None, False
        failure = self._answer.add(*chunks)
        self._answer.is_done |= is_done
        return failure, True


def _take(name: str, data: bytes, answer: completions_api.Answer) -> Failure | None:
    if name in completions_api.HEARTBEAT_EVENTS:
        return None
    if data == completions_api.DONE:
        answer.is_done = True
        return None
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        return completions_api.malformed("an event is not JSON")
    if name == "error" and isinstance(chunk, dict) and "error" not in chunk:
        chunk = {"error": chunk}
    return answer.add(chunk)


def _no_answer(cause: Cause, error: Exception) -> Failure:
    # The class says enough; a transport's message may quote what was sent.
    return Failure(Action.RETRY, cause, None, type(error).__name__)


def _failure_of_status(
    status_code: int, headers: Mapping[str, str], body: bytes, rules: FailureRules
) -> Failure:
    return failure_of_status(
        status_code,
        body[:2048].decode("utf-8", "replace"),
        names_in(body),
        retry_after_seconds(headers.get("retry-after"), headers.get("date")),
        rules=rules,
    )
