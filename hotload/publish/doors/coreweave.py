"""CoreWeave's hot-loads: every load is a resource with an id, a state and replicas (protocol §23).

What the API says of enums, errors and pages is known from `cwtrain` 1.0.2, CoreWeave's own client.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hotload.errors import ProtocolError
from hotload.identity import SnapshotKind
from hotload.publish.doors.api_dialect import API_DIALECTS
from hotload.publish.readiness import ReplicaStatus, ServiceDescription, ServiceStatus
from hotload.publish.snapshot import SnapshotManifest

API_PREFIX = "/v1alpha1/inference"
HOT_LOADS_PATH = f"{API_PREFIX}/hotLoads"
DEPLOYMENTS_PATH = f"{API_PREFIX}/deployments"
PAGE_SIZE = 1000  # the API's largest
BASE_IDENTITY = "initial"
RAW_CHARS = 512
IN_PROGRESS = "already in progress"  # in a failed precondition: another load goes on

LOAD_STATES = ("UNSPECIFIED", "PENDING", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELED")
ENDED_BADLY = ("FAILED", "CANCELED")
REPLICA_STATES = ("UNSPECIFIED", "PENDING_UPDATE", "UPDATING", "READY", "ERROR")
STAGES = {
    "PENDING_UPDATE": "pending",
    "UPDATING": "downloading",
    "READY": "completed",
    "ERROR": "error",
}
DEPLOYMENT_STATES = (
    "UNSPECIFIED",
    "CREATING",
    "UPDATING",
    "DELETING",
    "ERROR",
    "FAILED",
    "READY",
)
PROMPT_CACHE = {"all": "PROMPT_CACHE_POLICY_RESET_ALL", "none": "PROMPT_CACHE_POLICY_PRESERVE"}
CODES = {6: "already_exists", 9: "failed_precondition"}
CODE_OF_STATUS = {409: "already_exists", 412: "failed_precondition"}


@dataclass(frozen=True, slots=True)
class HotLoad:
    """One load of a deployment; `says` is what the API tells of its end, in words."""

    id: str
    identity: str
    previous: str | None
    state: str
    says: str

    def is_of(self, manifest: SnapshotManifest) -> bool:
        """Tell whether it loads this snapshot, as what it is."""
        return (self.identity, self.previous) == (manifest.identity, manifest.previous)


def hot_load_id(deployment_id: str, identity: str) -> str:
    """Make the id of the load of a snapshot: always the same, so that it is never begun twice."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{deployment_id}/{identity}"))


def hot_load_body(
    deployment_id: str, manifest: SnapshotManifest, reset_prompt_cache: str
) -> dict[str, Any]:
    """Make the body that begins a load. The server's own default keeps every cached prompt, so what
    becomes of them is always said."""
    is_delta = manifest.kind is SnapshotKind.DELTA
    body: dict[str, Any] = {
        "deploymentId": deployment_id,
        "hotLoadId": hot_load_id(deployment_id, manifest.identity),
        "identity": manifest.identity,
        "type": "SNAPSHOT_TYPE_INCREMENTAL" if is_delta else "SNAPSHOT_TYPE_FULL",
        "promptCachePolicy": PROMPT_CACHE[reset_prompt_cache],
    }
    if is_delta:
        formats = API_DIALECTS["coreweave"].formats
        previous = {"previousSnapshotIdentity": manifest.previous}
        body["incrementalSnapshotMetadata"] = previous | dict(formats)
    return body


def error_code(status_code: int, text: str) -> str | None:
    """Read why a call was refused, where that is one of CODES; from the body, else the status."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    code = body.get("code") if isinstance(body, dict) else None
    if isinstance(code, str):
        return code.lower()
    return CODES.get(code) if isinstance(code, int) else CODE_OF_STATUS.get(status_code)


def parse_hot_load(data: object) -> HotLoad:
    """Parse one load.

    Raises:
        ProtocolError: it is none, or names no id or identity.
    """
    spec, status = _part(data, "spec"), _part(data, "status")
    load_id, identity = spec.get("id"), spec.get("identity")
    if not isinstance(load_id, str) or not load_id or not isinstance(identity, str):
        raise ProtocolError("observe", 200, "a hot-load without id or identity")
    previous = _part(spec, "incrementalSnapshotMetadata").get("previousSnapshotIdentity")
    conditions = status.get("conditions")
    said = (_part({"one": one}, "one").get("message") for one in conditions or ())
    return HotLoad(
        load_id,
        identity,
        previous if isinstance(previous, str) and previous else None,
        _name(status.get("state"), LOAD_STATES, "HOT_LOAD_STATE_"),
        "; ".join(message for message in said if isinstance(message, str) and message),
    )


def parse_newest(data: object) -> HotLoad | None:
    """Parse the newest load from a page of them, newest first; None before the first.

    Raises:
        ProtocolError: the page is of another form.
    """
    loads = entries(data, "hotLoads")
    return parse_hot_load(loads[0]) if loads else None


def entries(data: object, name: str) -> list[object]:
    """Take the entries of a page; of an empty list the API may say nothing.

    Raises:
        ProtocolError: the page is no object, or has something else there.
    """
    found = data.get(name) if isinstance(data, Mapping) else data
    if not isinstance(found, list | None) or not isinstance(data, Mapping):
        raise ProtocolError("observe", 200, f"expected an object with a list `{name}`")
    return found or []


def next_page(data: object) -> str | None:
    """Read the token of the page after this one; None behind the last."""
    token = data.get("nextPageToken") if isinstance(data, Mapping) else None
    return token if isinstance(token, str) and token else None


def status_of(load: HotLoad, replicas: Sequence[object]) -> ServiceStatus:
    """Make the status of the replicas, as the newest load lists them.

    A load that failed, or was canceled, is an error of every replica, also where none is listed:
    nothing brings it there any more.

    Raises:
        ProtocolError: an entry is not an object.
    """
    found = tuple(_replica(load, entry) for entry in replicas)
    if not found and load.state in ENDED_BADLY:
        found = (ReplicaStatus(False, None, "error", load.identity, raw=_raw(load, {})),)
    return ServiceStatus(found)


def status_before_any(description: ServiceDescription) -> ServiceStatus:
    """Make the status before the first load, when nothing lists the replicas: one stands for all of
    a deployment that is ready to load."""
    if description.state != "READY":
        return ServiceStatus(())
    return ServiceStatus((ReplicaStatus(True, None, "idle"),), is_complete=False)


def _replica(load: HotLoad, entry: object) -> ReplicaStatus:
    if not isinstance(entry, Mapping):
        raise ProtocolError("observe", 200, "a replica is not an object")
    state = _name(entry.get("state"), REPLICA_STATES, "")
    current = entry.get("currentSnapshotIdentity")
    current = current if isinstance(current, str) and current not in ("", BASE_IDENTITY) else None
    is_on_it, is_completed = current == load.identity, load.state == "COMPLETED"
    is_left = is_completed and state == "READY" and not is_on_it
    return ReplicaStatus(
        # Until the load is completed, replicas may be missing from the list.
        readiness=state == "READY" and (is_completed or not is_on_it),
        current_identity=current,
        stage="error" if load.state in ENDED_BADLY else STAGES.get(state, state.lower()),
        target_identity=None if is_left else load.identity,
        raw=_raw(load, entry),
    )


def parse_deployment(data: object) -> ServiceDescription:
    """Parse a deployment.

    Raises:
        ProtocolError: it is none.
    """
    deployment = _part(data, "deployment")
    spec, status = _part(deployment, "spec"), _part(deployment, "status")
    if not spec:
        raise ProtocolError("describe", 200, "expected an object with a `deployment`")
    load, model = spec.get("hotLoad"), _part(spec, "model").get("name")
    load = load if isinstance(load, Mapping) else {}
    bucket, prefix = str(load.get("bucket") or ""), str(load.get("pathPrefix") or "")
    url = bucket if "://" in bucket else f"s3://{bucket}"
    return ServiceDescription(
        name=str(spec.get("name") or ""),
        base_model=model if isinstance(model, str) and model else None,
        state=_name(status.get("status"), DEPLOYMENT_STATES, "STATUS_"),
        hot_load_enabled=bool(load),
        bucket_url="/".join(filter(None, (url.rstrip("/"), prefix.strip("/")))) if bucket else None,
        bucket_type=None,
        transition_type="ASYNC",  # the only mode there is
        desired_replica_count=None,
        min_replica_count=None,
    )


def _part(data: object, name: str) -> Mapping[str, Any]:
    part = data.get(name) if isinstance(data, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _name(value: object, names: Sequence[str], prefix: str) -> str:
    """Read an enum's name, with or without its prefix, or its number; the first is "unknown"."""
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else names[0]
    name = str(value).upper().removeprefix(prefix)
    return name if name in names else names[0]


def _raw(load: HotLoad, entry: Mapping[str, Any]) -> str:
    shown = {"hot_load": load.id, "state": load.state, "says": load.says, "replica": entry}
    return json.dumps(shown)[:RAW_CHARS]
