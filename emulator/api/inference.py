"""Endpoints I and J: completions and chat, streamed or whole, and the list of models
(protocol §11-§13).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent.api.gateway import operation, read_object
from agent.failures import RefusedError, json_response
from emulator.api.gateway import INFERENCE_LIMIT_BYTES, BrokenResponse, service_of, struck
from emulator.api.generation import Generation, Piece
from emulator.api.inference_request import InferenceRequest
from emulator.api.inference_response import AnswerWriter
from emulator.replicas.replica import Replica
from emulator.replicas.service import Service
from hotload.publish.fireworks_names import (
    AFFINITY_HEADER,
    CHAT,
    DRAIN_TIMEOUT_HEADER,
    REQUEST_ID_HEADER,
    SESSION_HEADER,
    model_name,
)

DRAIN_SECONDS = 90.0
CUT = 499  # logged of an answer that did not come to its end, whatever status it began with
SSE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
SESSION_CHARS = 512


@operation("inference")
async def infer(request: Request) -> Response:
    """Answer one completion or chat request."""
    service = service_of(request)
    request_id = request.headers.get(REQUEST_ID_HEADER, "")[:200] or uuid.uuid4().hex
    record: dict[str, Any] = {
        "request_id": request_id,
        "session": _session(request),
        "replica": None,
        "identity_first": None,
        "identity_last": None,
        "completion_tokens": 0,
        "status": 200,
    }
    service.requests.append(record)
    try:
        response = await _answer(service, request, record, request_id)
    except RefusedError as error:
        response = error.response(request.url.path)
    record["status"] = CUT if isinstance(response, BrokenResponse) else response.status_code
    response.headers[REQUEST_ID_HEADER] = request_id
    return response


@operation("deployment")
async def list_models(request: Request) -> Response:
    """List the names that `model` of a request may have, in the form of OpenAI's API."""
    service = service_of(request)
    config = service.config
    adapters = (model_name(config.account_id, identity) for identity in service.adapters())
    beside = (f"{adapter}#{config.deployment}" for adapter in adapters)
    names = (config.model, config.deployment, *beside)
    entries = [
        {"id": name, "object": "model", "created": 0, "owned_by": config.account_id}
        for name in names
    ]
    return json_response({"object": "list", "data": entries})


async def _answer(
    service: Service, request: Request, record: dict[str, Any], request_id: str
) -> Response:
    body = await read_object(request, limit_bytes=INFERENCE_LIMIT_BYTES)
    weights = service.around.base_weights
    parsed = InferenceRequest.parse(
        body,
        service.tokens,
        is_chat=request.url.path.endswith(CHAT),
        vocab_size=weights.vocab_size,
        context_length=weights.context_length,
    )
    adapter = _named_adapter(service, request, parsed.model)
    record["session"] = record["session"] or parsed.prompt_cache_key[:SESSION_CHARS] or None
    if parsed.wants_routing and not weights.has_experts:
        raise RefusedError(400, "include_routing_matrix: the model has no experts")
    drain_seconds = _drain_seconds(request.headers.get(DRAIN_TIMEOUT_HEADER))
    replica = service.pick(record["session"])
    record["replica"] = replica.name
    where = {"replica": replica.name, "identity": replica.serving(adapter).identity}

    async def carry_out() -> Response:
        return await _whole(generation, writer, record, drain_seconds)

    generation = Generation(service, replica, parsed, record["session"], adapter)
    writer = AnswerWriter(service.config, service.tokens, parsed, generation, f"cmpl-{request_id}")
    if service.faults.take("drain_expiry", **where) is not None:
        raise RefusedError(425, "hot loading: drain timeout passed")
    faulty = await struck(service, request, "inference", carry_out, **where)
    if faulty is not None:
        return faulty
    if not parsed.is_stream:
        return await carry_out()
    pieces = generation.pieces(drain_seconds=drain_seconds, request_id=request_id)
    # The first piece comes before the status line: a swap can still answer 425.
    first = await anext(pieces)
    chunks = _broken(service, replica, _chunks(first, pieces, writer))
    return EventResponse(chunks, pieces, generation, record)


async def _whole(
    generation: Generation, writer: AnswerWriter, record: dict[str, Any], drain_seconds: float
) -> Response:
    async for piece in generation.pieces(
        drain_seconds=drain_seconds, request_id=record["request_id"]
    ):
        writer.take(piece)
    body = writer.whole()
    _note(record, generation)
    headers = {f"fireworks-{name}": str(value) for name, value in writer.metrics().items()}
    return json_response(body, headers=headers)


async def _chunks(
    first: Piece, rest: AsyncIterator[Piece], writer: AnswerWriter
) -> AsyncIterator[tuple[bytes, int]]:
    """Events with the number of tokens in them; what belongs together comes together."""
    head = _event(writer.chunk(first))
    try:
        async for piece in rest:
            event = head + _event(writer.chunk(piece))
            head = b"" if piece.tokens else event
            if piece.tokens:
                yield event + (b"" if writer.left else DONE), len(piece.tokens)
    except RefusedError as error:
        yield head + _error_event(error.status_code, error.body()), 0
        return
    if head:
        yield head + DONE, 0


async def _broken(
    service: Service, replica: Replica, chunks: AsyncIterator[tuple[bytes, int]]
) -> AsyncIterator[bytes | None]:
    """The events, cut or spoilt by an ordered fault; None breaks the connection."""
    where = {"replica": replica.name, "identity": replica.served.identity}
    cut = service.faults.take("truncate_stream", **where)
    spoilt = cut or service.faults.take("stream_error", **where)
    count = 0
    async for event, token_count in chunks:
        count += token_count
        if spoilt is not None and (count > spoilt["after_tokens"] or event.endswith(DONE)):
            break
        yield event
    else:
        return
    if cut is not None:
        if cut["abrupt"]:
            yield None
    else:
        status = int(spoilt["status"]) if spoilt else 500
        body = RefusedError(status, f"ordered fault: {status} inside the stream").body()
        yield _error_event(status, body, as_event=bool(spoilt and spoilt["as_event"]))


class EventResponse(Response):
    """Sends server-sent events as they come, and stops computing when the client has gone."""

    def __init__(
        self,
        events: AsyncIterator[bytes | None],
        pieces: Any,
        generation: Generation,
        record: dict[str, Any],
    ) -> None:
        super().__init__(media_type=SSE)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self._events, self._pieces = events, pieces
        self._generation, self._record = generation, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        gone = asyncio.create_task(_disconnected(receive))
        is_whole = False
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for event in self._events:
                if event is None or gone.done():
                    return
                await send({"type": "http.response.body", "body": event, "more_body": True})
                is_whole = event.endswith(DONE)
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            await self._pieces.aclose()
            _note(self._record, self._generation)
            if not is_whole:
                self._record["status"] = CUT


def _note(record: dict[str, Any], generation: Generation) -> None:
    identities = generation.identities or [None]
    record["identity_first"], record["identity_last"] = identities[0], identities[-1]
    record["completion_tokens"] = generation.completion_count


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _error_event(status: int, body: dict[str, Any], *, as_event: bool = False) -> bytes:
    body["error"]["status_code"] = status
    return (b"event: error\n" if as_event else b"") + _event(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _session(request: Request) -> str | None:
    value = request.headers.get(SESSION_HEADER) or request.headers.get(AFFINITY_HEADER)
    return value[:SESSION_CHARS] if value else None


def _drain_seconds(value: str | None) -> float:
    if value is None:
        return DRAIN_SECONDS
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise RefusedError(400, f"{DRAIN_TIMEOUT_HEADER}: Input should be seconds")
    return seconds


def _named_adapter(service: Service, request: Request, model: str) -> str | None:
    """Find the adapter that `model` names, if any; the deployment is named alone, behind a # or in
    its header (protocol §10, §11).

    Raises:
        RefusedError: 404 for what is not served here, 400 where the deployment is not named.
    """
    config = service.config
    model, _, named = model.partition("#")
    header = request.headers.get(config.api.deployment_header) or named or None
    if header is not None and header != config.deployment:
        raise RefusedError(404, f"{config.api.deployment_header} {header[:200]!r} not found")
    if named not in ("", config.deployment):
        raise RefusedError(404, f"Model not found: {named[:200]!r}")
    if model == config.deployment:
        return None
    adapters = {
        model_name(config.account_id, identity): identity for identity in service.adapters()
    }
    if model != config.model and model not in adapters:
        raise RefusedError(404, f"Model not found: {model[:200]!r}")
    if header is None and config.api.deployment_header:
        raise RefusedError(400, f"header {config.api.deployment_header} is missing")
    return adapters.get(model)
