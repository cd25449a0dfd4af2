"""What every endpoint does first: ordered faults, key, names, a bounded JSON body (protocol §2)."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from emulator.failures import RefusedError, is_control_plane
from emulator.replicas.service import Service
from hotload.publish.fireworks_names import API_KEY_HEADER

CONTROL_LIMIT_BYTES = 1 << 20
INFERENCE_LIMIT_BYTES = 16 << 20
Endpoint = Callable[[Request], Awaitable[Response]]


class BrokenResponse(Response):
    """Begins an answer and ends the connection before the answer does."""

    def __init__(self, head: bytes = b"", media_type: str = "application/json") -> None:
        super().__init__(head, media_type=media_type)
        self.headers["content-length"] = str(len(head) + 1024)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, promise more, return: the server then closes the connection."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})


def service_of(request: Request) -> Service:
    """Return the service behind the application."""
    service: Service = request.app.state.service
    return service


def operation(name: str) -> Callable[[Endpoint], Endpoint]:
    """Wrap an endpoint: faults ordered for operation `name` come before everything else."""

    def wrap(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            service, path = service_of(request), request.url.path
            try:
                if name != "inference":
                    faulty = await struck(service, request, name, lambda: endpoint(request))
                    if faulty is not None:
                        return faulty
                check_key(service, request)
                return await endpoint(request)
            except RefusedError as error:
                return error.response(path)

        return answer

    return wrap


async def struck(
    service: Service,
    request: Request,
    name: str,
    carry_out: Callable[[], Awaitable[Response]],
    **where: str | None,
) -> Response | None:
    """Return the answer a fault gives instead of the endpoint's; None where none strikes."""
    faults = service.faults
    hang = faults.take("hang", operation=name, **where)
    if hang is not None:
        while not await request.is_disconnected() and faults.holds(hang):
            faults.changed.clear()
            with service.clock.busy():
                await service.clock.wait(faults.changed, 0.5)
        return BrokenResponse()
    if faults.take("disconnect", operation=name, **where) is not None:
        return BrokenResponse()
    fault = faults.take("respond", operation=name, **where)
    if fault is None:
        return None
    if fault["accepted"]:
        check_key(service, request)
        await carry_out()
    status = int(fault["status"])
    headers = {}
    if fault["retry_after"] is not None:
        headers["retry-after"] = str(fault["retry_after"])
    if fault["body"] is not None:
        return Response(str(fault["body"]), status, headers, media_type="text/html")
    reason = str(fault["message"] or f"ordered fault: {status}")
    return RefusedError(status, reason).response(request.url.path, headers)


def check_key(service: Service, request: Request) -> None:
    """Return if the request carries a key, and the right one where one is set.

    The control plane takes it in either header, the gateway as a bearer token alone; where there
    are both, the bearer token counts (protocol §1).

    Raises:
        RefusedError: 401.
    """
    authorization = request.headers.get("authorization", "")
    if is_control_plane(request.url.path) and not authorization:
        authorization = f"Bearer {request.headers.get(API_KEY_HEADER, '')}"
    scheme, _, key = authorization.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise RefusedError(401, "missing bearer token")
    expected = service.config.api_key
    if expected is not None and not hmac.compare_digest(key.encode(), expected.encode()):
        raise RefusedError(401, "invalid API key")


def check_names(service: Service, request: Request) -> None:
    """Return if both resource headers name this service.

    Raises:
        RefusedError: 400 for a missing header, 404 for a wrong name.
    """
    config = service.config
    expected = {
        config.api.model_header: config.model,
        config.api.deployment_header: config.deployment,
    }
    for header, name in expected.items():
        given = request.headers.get(header)
        if not given:
            raise RefusedError(400, f"header {header} is missing")
        if given != name:
            raise RefusedError(404, f"{header} {given[:200]!r} not found")


async def read_object(request: Request, *, limit_bytes: int) -> dict[str, Any]:
    """Read the JSON object in a request's body.

    Raises:
        RefusedError: 413 above the limit, 400 for anything but a JSON object.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise RefusedError(413, f"body is larger than {limit_bytes} bytes")
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit_bytes:
            raise RefusedError(413, f"body is larger than {limit_bytes} bytes")
        pieces.append(piece)
    try:
        body = orjson.loads(b"".join(pieces))
    except orjson.JSONDecodeError:
        raise RefusedError(400, "body is not valid JSON") from None
    if not isinstance(body, dict):
        raise RefusedError(400, "body: Input should be an object")
    return body
