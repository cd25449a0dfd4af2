"""CoreWeave's door: hot-loads as resources with ids, states and replicas (protocol §23).

Each becomes the documented signal; what the replicas do is shown in the API's own words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.api.gateway import CONTROL_LIMIT_BYTES, operation, read_object
from agent.failures import RefusedError, json_response
from agent.fleet.signals import refuse_extra
from emulator.api.gateway import service_of
from emulator.api.inference import infer
from emulator.replicas.service import Service
from hotload.errors import InvalidIdentityError
from hotload.identity import check_identity
from hotload.publish.doors.coreweave import (
    BASE_IDENTITY,
    DEPLOYMENTS_PATH,
    HOT_LOADS_PATH,
    IN_PROGRESS,
    PAGE_SIZE,
    PROMPT_CACHE,
)
from hotload.publish.fireworks_names import CHAT, COMPLETIONS, FORMATS

FIELDS = (
    "deploymentId",
    "hotLoadId",
    "identity",
    "type",
    "incrementalSnapshotMetadata",
    "promptCachePolicy",
)
METADATA = "incrementalSnapshotMetadata"
PREVIOUS = "previousSnapshotIdentity"
KINDS = ("SNAPSHOT_TYPE_FULL", "SNAPSHOT_TYPE_INCREMENTAL")
POLICIES = {spelled: policy for policy, spelled in PROMPT_CACHE.items()}
UPDATING = ("PENDING_UPDATE", "UPDATING")


@dataclass(slots=True)
class Begun:
    """A load as it was asked for; `end` is its state once that is final."""

    body: Mapping[str, Any]
    end: str | None = None


@operation("signal")
async def begin(request: Request) -> Response:
    """Begin a hot-load."""
    service, begun = service_of(request), _begun(request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    signal = _translated(service, body)
    if body["hotLoadId"] in begun:
        raise RefusedError(409, f"hot-load {body['hotLoadId']!r} already exists")
    if not service.is_up:
        raise RefusedError(412, "the deployment is not READY")
    if any(_state(service, one) in ("PENDING", "IN_PROGRESS") for one in begun.values()):
        raise RefusedError(412, f"a hot-load is {IN_PROGRESS}")
    if service.ledger.get(signal["identity"]) is not None:
        raise RefusedError(412, "loaded before; the emulator loads no snapshot twice")
    try:
        await service.signal(signal)
    except RefusedError as error:
        raise RefusedError(412, error.message) from None
    begun[body["hotLoadId"]] = load = Begun(body)
    return json_response({"hotLoad": _shown(service, load)})


@operation("status")
async def list_loads(request: Request) -> Response:
    """List the loads, newest first."""
    service = service_of(request)
    parent = request.query_params.get("parentDeploymentId", service.config.deployment_id)
    is_ours = parent == service.config.deployment_id
    loads = [*_begun(request).values()][::-1] if is_ours else []
    return _page(request, "hotLoads", [_shown(service, one) for one in loads])


@operation("status")
async def get_load(request: Request) -> Response:
    """Show one load."""
    return json_response({"hotLoad": _shown(service_of(request), _found(request))})


@operation("status")
async def list_replicas(request: Request) -> Response:
    """List what every replica makes of a load."""
    return _page(request, "replicas", _rows(service_of(request), _found(request)))


@operation("signal")
async def cancel(request: Request) -> Response:
    """Refuse to cancel: what becomes of the replicas then is in no public source."""
    _found(request)
    raise RefusedError(501, "the emulator cancels no hot-load")


@operation("deployment")
async def show_one_deployment(request: Request) -> Response:
    """Show the deployment."""
    service = service_of(request)
    if request.path_params["deployment"] != service.config.deployment_id:
        raise RefusedError(404, "deployment not found")
    return json_response({"deployment": _deployment(service)})


@operation("deployment")
async def show_deployments(request: Request) -> Response:
    """List the one deployment."""
    return _page(request, "items", [_deployment(service_of(request))])


ROUTES = (
    Route(COMPLETIONS, infer, methods=["POST"]),
    Route(CHAT, infer, methods=["POST"]),
    Route(HOT_LOADS_PATH, begin, methods=["POST"]),
    Route(HOT_LOADS_PATH, list_loads, methods=["GET"]),
    Route(f"{HOT_LOADS_PATH}/{{load}}:cancel", cancel, methods=["POST"]),
    Route(f"{HOT_LOADS_PATH}/{{load}}", get_load, methods=["GET"]),
    Route(f"{HOT_LOADS_PATH}/{{load}}/replicas", list_replicas, methods=["GET"]),
    Route(DEPLOYMENTS_PATH, show_deployments, methods=["GET"]),
    Route(f"{DEPLOYMENTS_PATH}/{{deployment}}", show_one_deployment, methods=["GET"]),
)


def _begun(request: Request) -> dict[str, Begun]:
    """The loads by their ids, oldest first."""
    loads: dict[str, Begun] = request.app.state.hot_loads
    return loads


def _found(request: Request) -> Begun:
    load = _begun(request).get(request.path_params["load"])
    if load is None:
        raise RefusedError(404, "hot-load not found")
    return load


def _translated(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Put the body of a load into the words of protocol §4."""
    refuse_extra(body, FIELDS)
    for name in ("deploymentId", "hotLoadId", "identity", "type"):
        if not isinstance(body.get(name), str) or not body[name]:
            raise RefusedError(400, f"{name}: a text is needed")
    if body["deploymentId"] != service.config.deployment_id:
        raise RefusedError(404, "deployment not found")
    metadata = body.get(METADATA)
    if body["type"] not in KINDS or (body["type"] == KINDS[1]) != isinstance(metadata, dict):
        raise RefusedError(400, f"type: one of {KINDS}, and metadata with the second alone")
    policy = body.get("promptCachePolicy", PROMPT_CACHE["none"])
    if policy not in POLICIES:
        raise RefusedError(400, f"promptCachePolicy: one of {sorted(POLICIES)}")
    signal = {"identity": body["identity"], "reset_prompt_cache": POLICIES[policy]}
    if isinstance(metadata, dict):
        refuse_extra(metadata, (PREVIOUS, *service.config.api.formats), f"{METADATA}.")
        for name, expected in service.config.api.formats.items():
            if metadata.get(name) != expected:
                raise RefusedError(400, f"{METADATA}.{name}: expected {expected}")
        previous = {"previous_snapshot_identity": metadata.get(PREVIOUS)}
        signal["incremental_snapshot_metadata"] = previous | FORMATS
    try:
        check_identity(body["identity"])
    except InvalidIdentityError as error:
        raise RefusedError(400, f"identity: {error}") from None
    return signal


def _rows(service: Service, load: Begun) -> list[dict[str, Any]]:
    identity = load.body["identity"]
    entry, rows = service.ledger.get(identity), []
    for replica, shown in zip(service.replicas, service.status()["replicas"], strict=False):
        loading = shown["loading_state"]
        is_about_it = loading.get("target_snapshot_identity") == identity
        error = entry.errors.get(replica.name) if entry else None
        if is_about_it and loading["stage"] == "error":
            state = "ERROR"
        elif is_about_it and loading["stage"] == "pending":
            state = "PENDING_UPDATE"
        elif not shown["readiness"] or (is_about_it and loading["stage"] != "completed"):
            state = "UPDATING"
        elif is_about_it or (entry and replica.name in entry.ready_at):
            state = "READY"
        else:
            state = "ERROR" if error else "PENDING_UPDATE"
        row = {"name": replica.name, "zone": "LOCAL", "state": state}
        row["currentSnapshotIdentity"] = shown["current_snapshot_identity"] or BASE_IDENTITY
        rows.append(row | ({"errorReason": error or ""} if state == "ERROR" else {}))
    return rows


def _state(service: Service, load: Begun) -> str:
    """Say how far a load is; what it came to at last stays."""
    states = {row["state"] for row in _rows(service, load)}
    if load.end is None and states and states.isdisjoint(UPDATING):
        load.end = "FAILED" if "ERROR" in states else "COMPLETED"
    return load.end or ("PENDING" if states <= {"PENDING_UPDATE"} else "IN_PROGRESS")


def _shown(service: Service, load: Begun) -> dict[str, Any]:
    given = {name: load.body[name] for name in FIELDS if name in load.body and name != "hotLoadId"}
    return {
        "spec": {"id": load.body["hotLoadId"], **given},
        "status": {"state": f"HOT_LOAD_STATE_{_state(service, load)}", "conditions": []},
    }


def _deployment(service: Service) -> dict[str, Any]:
    config, url = service.config, service.config.bucket.rstrip("/")
    parts = urlsplit(url)
    is_s3 = parts.scheme == "s3"  # another has no name as a bucket: it is shown as it is
    hot_load = {
        "bucket": parts.netloc if is_s3 else url,
        "pathPrefix": parts.path.strip("/") if is_s3 else "",
        "transitionMode": "TRANSITION_MODE_ASYNC",
    }
    return {
        "spec": {
            "id": config.deployment_id,
            "name": config.deployment_id,
            "model": {"name": config.model},
            "hotLoad": hot_load,
        },
        "status": {"status": "STATUS_READY" if service.is_up else "STATUS_CREATING"},
    }


def _page(request: Request, name: str, items: Sequence[object]) -> Response:
    """Answer with a page of the items, and the token of the next."""
    size = request.query_params.get("maxPageSize", str(PAGE_SIZE))
    token = request.query_params.get("pageToken", "0")
    if not (size.isdecimal() and token.isdecimal() and 0 < int(size) <= PAGE_SIZE):
        raise RefusedError(400, f"maxPageSize: 1 to {PAGE_SIZE}; pageToken: as it was given")
    start, end = int(token), int(token) + int(size)
    body: dict[str, Any] = {name: items[start:end]}
    if end < len(items):
        body["nextPageToken"] = str(end)
    return json_response(body)
