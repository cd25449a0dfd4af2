"""The emulator's own endpoints, below /emulator: faults, log, replicas, tick. They need no key."""

from __future__ import annotations

from functools import wraps

from starlette.requests import Request
from starlette.responses import Response

from agent.api.gateway import CONTROL_LIMIT_BYTES, Endpoint, read_object
from agent.failures import RefusedError, json_response
from emulator.api.gateway import service_of
from emulator.control.faults import InvalidFaultError


def own(endpoint: Endpoint) -> Endpoint:
    """Refusals as the gateway words them."""

    @wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RefusedError as error:
            return error.response(request.url.path)

    return answer


@own
async def add_faults(request: Request) -> Response:
    """Answer POST /emulator/faults: a fault, or `{"faults": [...]}`, with `{"numbers": [...]}`."""
    service = service_of(request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    orders = body.get("faults", [body])
    if not isinstance(orders, list):
        raise RefusedError(400, "faults: Input should be a list")
    added = []
    try:
        for order in orders:
            added.append(service.faults.add(order).number)
    except InvalidFaultError as error:
        for number in added:
            service.faults.clear(number)
        raise RefusedError(400, str(error)) from None
    return json_response({"numbers": added})


@own
async def list_faults(request: Request) -> Response:
    """Answer GET /emulator/faults."""
    return json_response({"faults": service_of(request).faults.render()})


@own
async def clear_faults(request: Request) -> Response:
    """Answer DELETE /emulator/faults, all or `?number=`, with `{"cleared": count}`."""
    number = request.query_params.get("number")
    if number is not None and not number.isdigit():
        raise RefusedError(400, "number: Input should be a number")
    cleared = service_of(request).faults.clear(None if number is None else int(number))
    return json_response({"cleared": cleared})


@own
async def read_request_log(request: Request) -> Response:
    """Answer GET /emulator/log: what was signalled, hinted, applied per replica, and answered."""
    service = service_of(request)
    return json_response(
        {
            "requests": list(service.requests),
            "signals": service.signals,
            "hints": service.hints,
            "client_bugs": service.client_bugs,
            "snapshots": {each.name: each.applications for each in service.replicas},
        }
    )


@own
async def clear_log(request: Request) -> Response:
    """Answer DELETE /emulator/log: forget answered requests and hints."""
    service = service_of(request)
    service.requests.clear()
    service.hints.clear()
    return json_response({})


@own
async def change_replicas(request: Request) -> Response:
    """Answer POST /emulator/replicas: `{"action": "add"}`; "remove" or "restart" with `replica`.

    A restart takes `on_base: true`; without it the replica replays the chain.
    """
    service = service_of(request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    action = body.get("action")
    if action == "add":
        return json_response({"replica": service.add_replica().name})
    replica = service.replica(body.get("replica"))
    if replica is None:
        raise RefusedError(404, "no such replica")
    if action == "remove":
        service.remove_replica(replica)
    elif action == "restart":
        service.restart(replica, on_base=body.get("on_base") is True)
    else:
        raise RefusedError(400, "action: Input should be add, remove or restart")
    return json_response({"replica": replica.name})


@own
async def tick(request: Request) -> Response:
    """Answer POST /emulator/tick: let `seconds` pass (0: wait until nothing is left to do)."""
    service = service_of(request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    seconds = body.get("seconds", 0)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
        raise RefusedError(400, "seconds: Input should be a number")
    return json_response({"now_seconds": await service.clock.tick(float(seconds))})
