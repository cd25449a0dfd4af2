"""Endpoints A to H: signal, status, hint, ledger, deployment, model, account (protocol §2)."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.api.gateway import CONTROL_LIMIT_BYTES, check_names, fleet_of, operation, read_object
from agent.failures import RefusedError, json_response
from agent.fleet.service import Fleet
from hotload.publish.fireworks_names import ACCOUNTS_PATH, HINT_PATH, HOT_LOAD_PATH

ACCOUNT = f"{ACCOUNTS_PATH}/{{account}}"
DEPLOYMENTS = f"{ACCOUNT}/deployments"
DEPLOYMENT = f"{DEPLOYMENTS}/{{deployment}}"
MODELS = f"{ACCOUNT}/models"


@operation("signal")
async def signal(request: Request) -> Response:
    """Answer A: announce a snapshot."""
    service = fleet_of(request)
    check_names(service, request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    return json_response(await service.signal(body))


@operation("status")
async def status(request: Request) -> Response:
    """B: the replicas."""
    service = fleet_of(request)
    check_names(service, request)
    return json_response(await service.observe())


@operation("hint")
async def hint(request: Request) -> Response:
    """C: one file has arrived."""
    service = fleet_of(request)
    check_names(service, request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    await service.hint(body)
    return json_response({})


@operation("ledger")
async def delete_ledger(request: Request) -> Response:
    """D: forget every snapshot."""
    service = fleet_of(request)
    _check_deployment(service, request)
    await service.forget()
    return json_response({})


@operation("ledger")
async def read_ledger(request: Request) -> Response:
    """E: our own extension; the vendor shows the ledger only in its command line."""
    service = fleet_of(request)
    _check_deployment(service, request)
    return json_response({"entries": await service.entries()})


@operation("deployment")
async def get_deployment(request: Request) -> Response:
    """F: the deployment."""
    service = fleet_of(request)
    _check_deployment(service, request)
    return json_response(await _deployment(service))


@operation("deployment")
async def create_deployment(request: Request) -> Response:
    """Answer G: the one deployment is there already; a caller adopts it."""
    service = fleet_of(request)
    _check_account(service, request)
    await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    wanted = request.query_params.get("deploymentId")
    if wanted != service.config.deployment_id:
        raise RefusedError(400, f"there is one deployment here, {service.config.deployment_id!r}")
    raise RefusedError(409, f"deployment {wanted!r} already exists")


@operation("deployment")
async def change_deployment(request: Request) -> Response:
    """Refuse G: PATCH and DELETE are not part of the pipeline (protocol §2)."""
    _check_deployment(fleet_of(request), request)
    raise RefusedError(400, "the deployment is set by its command line")


@operation("deployment")
async def list_deployments(request: Request) -> Response:
    """List what F answers: the one deployment."""
    service = fleet_of(request)
    _check_account(service, request)
    return _only("deployments", await _deployment(service))


@operation("deployment")
async def get_model(request: Request) -> Response:
    """Answer with the model that the deployment serves."""
    service = fleet_of(request)
    _check_account(service, request)
    if request.path_params["model"] != service.config.model_id:
        raise RefusedError(404, "model not found")
    return json_response(_model(service))


@operation("deployment")
async def list_account_models(request: Request) -> Response:
    """List the one model."""
    service = fleet_of(request)
    _check_account(service, request)
    return _only("models", _model(service))


@operation("deployment")
async def get_account(request: Request) -> Response:
    """Answer with the account."""
    service = fleet_of(request)
    _check_account(service, request)
    return json_response(_account(service))


@operation("deployment")
async def list_accounts(request: Request) -> Response:
    """H: exactly one account, as the vendor's SDK insists."""
    return _only("accounts", _account(fleet_of(request)))


def _only(kind: str, resource: dict[str, Any]) -> Response:
    """Write a list of one page and one entry."""
    return json_response({kind: [resource], "nextPageToken": "", "totalSize": 1})


def _account(service: Fleet) -> dict[str, Any]:
    return {"name": f"accounts/{service.config.account_id}", "state": "READY"}


def _model(service: Fleet) -> dict[str, Any]:
    length = service.context_length
    return {"name": service.config.model, "state": "READY", "contextLength": length}


def _check_account(service: Fleet, request: Request) -> None:
    if request.path_params["account"] != service.config.account_id:
        raise RefusedError(404, "account not found")


def _check_deployment(service: Fleet, request: Request) -> None:
    _check_account(service, request)
    if request.path_params["deployment"] != service.config.deployment_id:
        raise RefusedError(404, "deployment not found")


async def _deployment(service: Fleet) -> dict[str, Any]:
    """Fields of protocol §8, with the counts as they are now."""
    config, replicas = service.config, await service.count()
    return {
        "name": config.deployment,
        "baseModel": config.base,
        "state": "READY" if replicas.listed else "CREATING",
        "status": {"code": "OK", "message": ""},
        "replicaCount": replicas.listed,
        "desiredReplicaCount": replicas.expected,
        "minReplicaCount": replicas.expected,
        "maxReplicaCount": replicas.expected,
        "replicaStats": {
            "downloadingModelReplicaCount": 0,
            "initializingReplicaCount": replicas.listed - replicas.ready,
            "pendingSchedulingReplicaCount": replicas.expected - replicas.listed,
            "readyReplicaCount": replicas.ready,
        },
        "enableHotLoad": True,
        "hotLoadBucketType": config.bucket_type,
        "hotLoadBucketUrl": config.bucket.rstrip("/"),
        "hotLoadTransitionType": config.transition,
        "hotLoadTrainerJob": "",
        "deploymentShape": "",
        "region": "LOCAL",
        "placement": {},
        "enableSessionAffinity": True,
        "maxContextLength": service.context_length,
        "precision": "BF16",
    }


ROUTES = (
    Route(HOT_LOAD_PATH, signal, methods=["POST"]),
    Route(HOT_LOAD_PATH, status, methods=["GET"]),
    Route(HINT_PATH, hint, methods=["POST"]),
    Route(f"{DEPLOYMENT}/ledger", delete_ledger, methods=["DELETE"]),
    Route(f"{DEPLOYMENT}/ledger", read_ledger, methods=["GET"]),
    Route(DEPLOYMENT, get_deployment, methods=["GET"]),
    Route(DEPLOYMENT, change_deployment, methods=["PATCH", "DELETE"]),
    Route(DEPLOYMENTS, create_deployment, methods=["POST"]),
    Route(DEPLOYMENTS, list_deployments, methods=["GET"]),
    Route(f"{MODELS}/{{model}}", get_model, methods=["GET"]),
    Route(MODELS, list_account_models, methods=["GET"]),
    Route(ACCOUNT, get_account, methods=["GET"]),
    Route(ACCOUNTS_PATH, list_accounts, methods=["GET"]),
)
