"""What the emulator does before an endpoint: the faults that were ordered for its operation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent.api.gateway import Endpoint, check_key
from agent.failures import RefusedError
from emulator.replicas.service import Service

INFERENCE_LIMIT_BYTES = 16 << 20


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
    """Return the emulated service behind the application."""
    service: Service = request.app.state.service
    return service


async def ordered(request: Request, name: str, endpoint: Endpoint) -> Response | None:
    """Return the answer of a fault that was ordered for operation `name`; those of inference wait
    until a replica is known."""
    if name == "inference":
        return None
    return await struck(service_of(request), request, name, lambda: endpoint(request))


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
