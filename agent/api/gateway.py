"""What every endpoint does first: key, names, a bounded JSON body (protocol §2)."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.failures import RefusedError, is_control_plane
from agent.fleet.service import Fleet
from hotload.publish.fireworks_names import API_KEY_HEADER

CONTROL_LIMIT_BYTES = 1 << 20
Endpoint = Callable[[Request], Awaitable[Response]]


def fleet_of(request: Request) -> Fleet:
    """Return the service behind the application."""
    service: Fleet = request.app.state.service
    return service


def operation(name: str) -> Callable[[Endpoint], Endpoint]:
    """Wrap an endpoint; what the application answers `instead`, if anything, comes first."""

    def wrap(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            try:
                instead = getattr(request.app.state, "instead", None)
                other = await instead(request, name, endpoint) if instead else None
                if other is not None:
                    return other
                check_key(fleet_of(request), request)
                return await endpoint(request)
            except RefusedError as error:
                return error.response(request.url.path)

        return answer

    return wrap


def check_key(service: Fleet, request: Request) -> None:
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


def check_names(service: Fleet, request: Request) -> None:
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


def make_app(routes: Sequence[Route], lifespan: Any) -> Starlette:
    """Make the application of a service: refusals and defects in the documented shape."""
    handlers = {HTTPException: _refuse, Exception: _confess}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    reason = f"{request.method} {request.url.path}: not found"
    if status == 405:
        reason = f"{request.method} is not allowed here"
    return RefusedError(status, reason).response(request.url.path)


async def _confess(request: Request, error: Exception) -> Response:
    """A defect of this program itself, said so that nobody looks for it elsewhere."""
    reason = f"defect of the server: {type(error).__name__}: {error}"
    return RefusedError(500, reason[:2000]).response(request.url.path)
