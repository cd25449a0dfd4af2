"""One attempt: a request, and its answer read to the end (protocol §11-§13)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass

import httpx
import orjson

from hotload.clients.inference.transport import NO_ANSWER, Wire, head_of, names_in
from hotload.errors import ProtocolError
from hotload.publish import fireworks_api
from hotload.rollout import completions_api
from hotload.rollout.failures import Action, Cause, Fault, fault_of_status
from hotload.rollout.retry_after import retry_after_seconds

EVENT_STREAM = "text/event-stream"
PLAIN_LIMIT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Call:
    """One logical request: named the same over all its attempts and after a restart.

    `answer_limit_bytes` is what an answer may weigh; `silence_seconds` how long it may bring
    nothing new.
    """

    path: str
    body: bytes
    request_id: str
    session_id: str
    answer_limit_bytes: int
    silence_seconds: float


async def exchange(wire: Wire, call: Call, answer: completions_api.Answer) -> Fault | None:
    """Send `call` once and read its answer into `answer`; the fault, if it cannot be used.

    Raises:
        ProtocolError: 200 with something else than an answer.
    """
    session = call.session_id.encode()
    headers = [
        (fireworks_api.REQUEST_ID_HEADER.encode(), call.request_id.encode()),
        (fireworks_api.SESSION_HEADER.encode(), session),
        (fireworks_api.AFFINITY_HEADER.encode(), session),
    ]
    try:
        response = await wire.post(call.path, call.body, headers)
        try:
            return await _read(response, call, answer)
        finally:
            await response.aclose()
    except httpx.ConnectTimeout as error:
        # The transport gives this name to every connection that broke before an answer.
        return _no_answer(Cause.CONNECTION, error)
    except (httpx.TimeoutException, TimeoutError) as error:
        return _no_answer(Cause.TIMEOUT, error)
    except NO_ANSWER as error:
        return _no_answer(Cause.CONNECTION, error)


async def _read(
    response: httpx.Response, call: Call, answer: completions_api.Answer
) -> Fault | None:
    # One pass over the raw headers: httpx searches all of them for every name.
    headers = {
        name.lower().decode("latin-1"): value.decode("latin-1")
        for name, value in response.headers.raw
    }
    answer.response_id = next(
        (headers[name][:256] for name in fireworks_api.RESPONSE_ID_HEADERS if headers.get(name)),
        None,
    )
    if response.status_code != 200:
        return _fault_of_status(response.status_code, headers, await head_of(response))
    named = headers.get("content-type", "").partition(";")[0].strip().lower()
    if named not in (EVENT_STREAM, "application/json"):
        raise ProtocolError("sample", 200, f"expected {EVENT_STREAM}, found {named[:80]!r}")
    chunks = Chunks(answer) if named == EVENT_STREAM else None
    plain: list[bytes] = []
    size_bytes = 0
    progress_at = time.monotonic()
    is_encoded = "content-encoding" in headers
    async for piece in response.aiter_bytes() if is_encoded else _stream_of(response):
        size_bytes += len(piece)
        if size_bytes > call.answer_limit_bytes:
            detail = f"more than {call.answer_limit_bytes} bytes"
            return Fault(Action.FAIL_SAMPLE, Cause.TOO_LONG, 200, detail)
        if chunks is None:
            plain.append(piece)
            continue
        count = chunks.count
        fault = chunks.feed(piece)
        if fault is not None:
            return fault
        # A server that hangs may go on sending heartbeats.
        now = time.monotonic()
        if chunks.count > count:
            progress_at = now
        elif now - progress_at > call.silence_seconds:
            return Fault(Action.RETRY, Cause.TIMEOUT, None, "heartbeats and nothing else")
    if chunks is not None:
        fault = chunks.end()
    else:
        answer.is_done = True
        fault = _take("", b"".join(plain), answer)
    if fault is not None:
        return fault
    if answer.prefill_queue_seconds is None:
        answer.add_metrics(headers)
    return answer.finish()


def _stream_of(response: httpx.Response) -> AsyncIterable[bytes]:
    """The raw body, without what httpx puts around it for its own client."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream


class Chunks:
    """Puts the pieces of an event stream into an answer.

    As long as the stream is nothing but `data: {…}` and blank lines, as most are from end to end,
    all the events of a piece are decoded at once, at two thirds of the cost.
    """

    def __init__(self, answer: completions_api.Answer) -> None:
        self.count = 0
        """Chunks taken in."""
        self._answer = answer
        self._events: completions_api.EventStream | None = None
        self._tail = b""

    def feed(self, piece: bytes) -> Fault | None:
        """Take the next bytes in, cut anywhere; the fault, if they are or carry an error."""
        if self._events is None:
            if self._tail:
                piece = self._tail + piece
            end = piece.rfind(b"\n\n")
            # JSON has no raw line ends: these are of lines that end in CRLF, which are not plain.
            if end < 0 and len(piece) < PLAIN_LIMIT_BYTES and b"\r" not in piece:
                self._tail = piece
                return None
            fault, is_plain = self._feed_plain(piece[:end]) if end >= 0 else (None, False)
            if is_plain:
                self._tail = piece[end + 2 :]
                return fault
            self._events, self._tail = completions_api.EventStream(), b""
        for name, data in self._events.feed(piece):
            fault = _take(name, data, self._answer)
            if fault is not None:
                return fault
            self.count += name not in completions_api.HEARTBEAT_EVENTS
        return None

    def end(self) -> Fault | None:
        """Take in what is left when the stream has ended."""
        if self._tail and self._events is None:
            self._events, tail = completions_api.EventStream(), self._tail
            return self.feed(tail)
        return None

    def _feed_plain(self, events: bytes) -> tuple[Fault | None, bool]:
        """The fault of whole events, and whether they were plain; others are not taken in."""
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
        self.count += count
        fault = self._answer.add(*chunks)
        self._answer.is_done |= is_done
        return fault, True


def _take(name: str, data: bytes, answer: completions_api.Answer) -> Fault | None:
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


def _no_answer(cause: Cause, error: Exception) -> Fault:
    # The class says enough; a transport's message may quote what was sent.
    return Fault(Action.RETRY, cause, None, type(error).__name__)


def _fault_of_status(status_code: int, headers: Mapping[str, str], body: bytes) -> Fault:
    return fault_of_status(
        status_code,
        body[:2048].decode("utf-8", "replace"),
        names_in(body),
        retry_after_seconds(headers.get("retry-after"), headers.get("date")),
    )
