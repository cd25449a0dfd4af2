"""Endpoints A to H: signal, status, hint, ledger, deployment, model, account (protocol §2)."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from emulator.api.gateway import (
    CONTROL_LIMIT_BYTES,
    check_names,
    operation,
    read_object,
    service_of,
)
from emulator.failures import RefusedError, json_response
from emulator.replicas.service import Service


@operation("signal")
async def signal(request: Request) -> Response:
    """Answer A: announce a snapshot."""
    service = service_of(request)
    check_names(service, request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    return json_response(await service.signal(body))


@operation("status")
async def status(request: Request) -> Response:
    """B: the replicas."""
    service = service_of(request)
    check_names(service, request)
    return json_response(service.status())


@operation("hint")
async def hint(request: Request) -> Response:
    """C: one file has arrived."""
    service = service_of(request)
    check_names(service, request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    code = service.config.hint_status_code
    if code != 200:
        raise RefusedError(code, "hints are not taken here")
    await service.hint(body)
    return json_response({})


@operation("ledger")
async def delete_ledger(request: Request) -> Response:
    """D: forget every snapshot."""
    service = service_of(request)
    _check_deployment(service, request)
    service.reset()
    return json_response({})


@operation("ledger")
async def read_ledger(request: Request) -> Response:
    """E: the emulator's own extension; the vendor shows the ledger only in its command line."""
    service = service_of(request)
    _check_deployment(service, request)
    return json_response({"entries": service.ledger.render()})


@operation("deployment")
async def get_deployment(request: Request) -> Response:
    """F: the deployment."""
    service = service_of(request)
    _check_deployment(service, request)
    return json_response(_deployment(service))


@operation("deployment")
async def create_deployment(request: Request) -> Response:
    """Answer G: the one deployment is there already; a caller adopts it."""
    service = service_of(request)
    _check_account(service, request)
    await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    wanted = request.query_params.get("deploymentId")
    if wanted != service.config.deployment_id:
        raise RefusedError(
            400, f"this emulator has one deployment, {service.config.deployment_id!r}"
        )
    raise RefusedError(409, f"deployment {wanted!r} already exists")


@operation("deployment")
async def change_deployment(request: Request) -> Response:
    """Refuse G: PATCH and DELETE are not part of the pipeline (protocol §2)."""
    _check_deployment(service_of(request), request)
    raise RefusedError(400, "the emulator's deployment is set by its command line")


@operation("deployment")
async def list_deployments(request: Request) -> Response:
    """List what F answers: the one deployment."""
    service = service_of(request)
    _check_account(service, request)
    return _only("deployments", _deployment(service))


@operation("deployment")
async def get_model(request: Request) -> Response:
    """Answer with the model that the deployment serves."""
    service = service_of(request)
    _check_account(service, request)
    if request.path_params["model"] != service.config.model_id:
        raise RefusedError(404, "model not found")
    return json_response(_model(service))


@operation("deployment")
async def list_account_models(request: Request) -> Response:
    """List the one model."""
    service = service_of(request)
    _check_account(service, request)
    return _only("models", _model(service))


@operation("deployment")
async def get_account(request: Request) -> Response:
    """Answer with the account."""
    service = service_of(request)
    _check_account(service, request)
    return json_response(_account(service))


@operation("deployment")
async def list_accounts(request: Request) -> Response:
    """H: exactly one account, as the vendor's SDK insists."""
    return _only("accounts", _account(service_of(request)))


def _only(kind: str, resource: dict[str, Any]) -> Response:
    """Write a list of one page and one entry."""
    return json_response({kind: [resource], "nextPageToken": "", "totalSize": 1})


def _account(service: Service) -> dict[str, Any]:
    return {"name": f"accounts/{service.config.account_id}", "state": "READY"}


def _model(service: Service) -> dict[str, Any]:
    length = service.around.base_weights.context_length
    return {"name": service.config.model, "state": "READY", "contextLength": length}


def _check_account(service: Service, request: Request) -> None:
    if request.path_params["account"] != service.config.account_id:
        raise RefusedError(404, "account not found")


def _check_deployment(service: Service, request: Request) -> None:
    _check_account(service, request)
    if request.path_params["deployment"] != service.config.deployment_id:
        raise RefusedError(404, "deployment not found")


def _deployment(service: Service) -> dict[str, Any]:
    """Fields of protocol §8, with the counts as they are now."""
    config = service.config
    replicas = service.replicas if service.is_up else []
    ready = sum(replica.readiness for replica in replicas)
    count = len(service.replicas)
    return {
        "name": config.deployment,
        "baseModel": config.base,
        "state": "READY" if service.is_up else "CREATING",
        "status": {"code": "OK", "message": ""},
        "replicaCount": len(replicas),
        "desiredReplicaCount": count,
        "minReplicaCount": count,
        "maxReplicaCount": count,
        "replicaStats": {
            "downloadingModelReplicaCount": 0,
            "initializingReplicaCount": len(replicas) - ready,
            "pendingSchedulingReplicaCount": count - len(replicas),
            "readyReplicaCount": ready,
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
        "maxContextLength": service.around.base_weights.context_length,
        "precision": "BF16",
    }
