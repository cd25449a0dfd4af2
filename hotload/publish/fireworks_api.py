"""The Fireworks hot-load API: names on the wire, JSON to values and back (protocol §1-§8).

The vendor's word *deployment* is our *service*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hotload.errors import ProtocolError
from hotload.identity import SnapshotKind
from hotload.publish.fireworks_names import FORMATS
from hotload.publish.readiness import ReplicaStatus, ServiceDescription, ServiceStatus
from hotload.publish.snapshot import SnapshotManifest

UNKNOWN_FIELD_TEXT = "extra inputs are not permitted"

STATUS_LIMIT_BYTES = 8 << 20
REPLICA_LIMIT = 10_000
RAW_REPLICA_CHARS = 512
ERROR_CHARS = 2048  # of a replica, once no key is in it


def signal_body(
    manifest: SnapshotManifest,
    *,
    reset_prompt_cache: str,
    extra_fields_ignore: Sequence[str],
    formats: Mapping[str, str] = FORMATS,
) -> dict[str, Any]:
    """Body of the signal (protocol §4); `formats` are the names of a delta's formats there.

    Delta metadata is left out entirely for full and LoRA snapshots; `reset_prompt_cache` is omitted
    where it is the server's default, `all`; `validation` is sent only when it says something.
    """
    body: dict[str, Any] = {"identity": manifest.identity}
    if manifest.kind is SnapshotKind.DELTA:
        body |= delta_metadata(manifest.previous, formats)
    if reset_prompt_cache != "all":
        body["reset_prompt_cache"] = reset_prompt_cache
    if extra_fields_ignore:
        body["validation"] = {"extra_fields_ignore": list(extra_fields_ignore)}
    return body


def delta_metadata(previous: str | None, formats: Mapping[str, str] = FORMATS) -> dict[str, Any]:
    """Make what the body of a signal says of a delta beside its identity (protocol §4)."""
    return {"incremental_snapshot_metadata": {"previous_snapshot_identity": previous, **formats}}


def refuses_prompt_cache_field(status_code: int, text: str) -> bool:
    """Tell whether a server answered that it does not know `reset_prompt_cache` (protocol §4)."""
    folded = text.casefold()
    return status_code == 400 and "reset_prompt_cache" in folded and UNKNOWN_FIELD_TEXT in folded


def parse_status(data: object) -> ServiceStatus:
    """Parse the service's status from the JSON of operation B (protocol §5). Unknown fields are
    ignored.

    Raises:
        ProtocolError: `replicas` is not a list, or an entry is not of the documented form.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("replicas"), list):
        raise ProtocolError("observe", 200, "expected an object with a list `replicas`")
    replicas = data["replicas"]
    if len(replicas) > REPLICA_LIMIT:
        raise ProtocolError("observe", 200, f"{len(replicas)} replicas; at most {REPLICA_LIMIT}")
    return ServiceStatus(tuple(_parse_replica(entry) for entry in replicas))


def _parse_replica(entry: object) -> ReplicaStatus:
    if not isinstance(entry, Mapping):
        raise ProtocolError("observe", 200, "a replica is not an object")
    loading = entry.get("loading_state")
    loading = loading if isinstance(loading, Mapping) else {}
    listed = entry.get("loaded_adapters")
    adapters = (
        [item for item in listed if isinstance(item, Mapping)] if isinstance(listed, list) else []
    )
    return ReplicaStatus(
        # Anything but a plain true is "not ready": a guess would send requests to the wrong
        # weights.
        readiness=entry.get("readiness") is True,
        current_identity=_text(entry.get("current_snapshot_identity")),
        stage=_text(loading.get("stage")),
        target_identity=_text(loading.get("target_snapshot_identity")),
        adapters=tuple(
            (str(item.get("identity")), str(item.get("status")))
            for item in adapters[:REPLICA_LIMIT]
        ),
        error=" ".join((_text(loading.get("error")) or "").split()),
        is_final=loading.get("final") is True,
        raw=json.dumps(entry)[:RAW_REPLICA_CHARS],
    )


def parse_ledger(data: object) -> list[Any]:
    """Take the entries from the JSON of a ledger, as they are: no source names their fields
    (protocol §7).

    Raises:
        ProtocolError: there is no list of entries.
    """
    entries = data.get("entries") if isinstance(data, Mapping) else data
    if not isinstance(entries, list):
        raise ProtocolError("read_ledger", 200, "expected a list, or an object with `entries`")
    return entries


def parse_description(data: object) -> ServiceDescription:
    """Parse the service as its control plane describes it (protocol §8). Unset transition means
    ASYNC.

    Raises:
        ProtocolError: not a JSON object.
    """
    if not isinstance(data, Mapping):
        raise ProtocolError("describe", 200, "expected an object")
    return ServiceDescription(
        name=_text(data.get("name")) or "",
        base_model=_text(data.get("baseModel")),
        state=_text(data.get("state")),
        hot_load_enabled=data.get("enableHotLoad") is True,
        bucket_url=(_text(data.get("hotLoadBucketUrl")) or "").rstrip("/") or None,
        bucket_type=_text(data.get("hotLoadBucketType")),
        transition_type=_text(data.get("hotLoadTransitionType")) or "ASYNC",
        desired_replica_count=_count(data.get("desiredReplicaCount")),
        min_replica_count=_count(data.get("minReplicaCount")),
    )


def hint_body(template: object, values: Mapping[str, object]) -> object:
    """Make a hint's JSON: `template` with `{identity} {file} {uri} {size} {kind} {previous}` filled
    in (protocol §6).
    """
    if isinstance(template, str):
        for name, value in values.items():
            template = template.replace("{" + name + "}", str(value))
        return template
    if isinstance(template, Mapping):
        return {str(key): hint_body(value, values) for key, value in template.items()}
    if isinstance(template, Sequence):
        return [hint_body(value, values) for value in template]
    return template


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: object) -> int | None:
    # Protobuf JSON spells 64-bit integers as strings.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
