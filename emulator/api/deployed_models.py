"""Loaded adapters as the control plane shows them, loaded and unloaded there (protocol §10)."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from agent.api.gateway import CONTROL_LIMIT_BYTES, operation, read_object
from agent.failures import RefusedError, json_response
from emulator.api.gateway import service_of
from emulator.replicas.adapters import LOADED, LOADING
from emulator.replicas.service import Service
from hotload.publish.fireworks_names import model_name


@operation("deployment")
async def list_deployed(request: Request) -> Response:
    """List the adapters that a replica has, or loads."""
    service = _service(request)
    found = [_deployed(service, identity) for identity in service.adapters()]
    return json_response({"deployedModels": found, "nextPageToken": "", "totalSize": len(found)})


@operation("deployment")
async def get_deployed(request: Request) -> Response:
    """Answer with one of them."""
    service = _service(request)
    identity = request.path_params["deployed"]
    if identity not in service.adapters():
        raise RefusedError(404, "deployed model not found")
    return json_response(_deployed(service, identity))


@operation("deployment")
async def load(request: Request) -> Response:
    """Load an adapter again that was unloaded; one that is new arrives by a signal."""
    service = _service(request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    if body.get("deployment") != service.config.deployment:
        raise RefusedError(404, "deployment not found")
    name = str(body.get("model"))
    identity = name.rpartition("/")[2]
    if name != model_name(service.config.account_id, identity) or not service.reload(identity):
        raise RefusedError(404, f"model {name[:200]!r} is no adapter that was signalled here")
    return json_response(_deployed(service, identity))


@operation("deployment")
async def unload(request: Request) -> Response:
    """Free the adapter's slot in every replica; its files stay in the bucket."""
    if not _service(request).unload(request.path_params["deployed"]):
        raise RefusedError(404, "deployed model not found")
    return json_response({})


def _service(request: Request) -> Service:
    service = service_of(request)
    if request.path_params["account"] != service.config.account_id:
        raise RefusedError(404, "account not found")
    return service


def _deployed(service: Service, identity: str) -> dict[str, Any]:
    config = service.config
    statuses = {each.adapters.statuses.get(identity, LOADING) for each in service.replicas}
    state = "DEPLOYING" if LOADING in statuses else "STATE_UNSPECIFIED"
    newest = {each.served.identity for each in service.replicas}
    return {
        "name": f"accounts/{config.account_id}/deployedModels/{identity}",
        "model": model_name(config.account_id, identity),
        "deployment": config.deployment,
        "default": newest == {identity},
        "state": "DEPLOYED" if statuses == {LOADED} else state,
        "serverless": False,
    }
