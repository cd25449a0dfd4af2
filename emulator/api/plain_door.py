"""A plain door: signal, status and inference in other words, and nothing else (protocol §22).

As at the one public door of this kind, what it takes is turned into the documented signal, and what
it shows of a replica is less: no loading state, so a load that failed looks like one that lasts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.api.gateway import CONTROL_LIMIT_BYTES, operation, read_object
from agent.failures import RefusedError, json_response
from emulator.api.gateway import service_of
from emulator.api.inference import infer
from emulator.control.settings import EmulatorConfig
from hotload.publish.fireworks_names import CHAT, COMPLETIONS, FORMATS, HOT_LOAD_PATH

FIELDS = ("identity", "incremental_snapshot_metadata", "reset_prompt_cache")
METADATA = "incremental_snapshot_metadata"
POLICY = "new_session"


@operation("signal")
async def plain_signal(request: Request) -> Response:
    """Announce a snapshot, as operation A does."""
    service = service_of(request)
    _check_names(service.config, request)
    body = await read_object(request, limit_bytes=CONTROL_LIMIT_BYTES)
    translated = _translated(service.config, body)
    if service.config.base_identity is not None:
        _check_base(service.config.base_identity, translated)
    return json_response({"accepted": True, **await service.signal(translated)})


@operation("status")
async def plain_status(request: Request) -> Response:
    """Show the replicas, as operation B does."""
    service = service_of(request)
    _check_names(service.config, request)
    shown = [
        {
            "readiness": replica["readiness"],
            "current_snapshot_identity": replica["current_snapshot_identity"],
        }
        for replica in service.status()["replicas"]
    ]
    return json_response({"replicas": shown})


ROUTES = (
    Route(COMPLETIONS, infer, methods=["POST"]),
    Route(CHAT, infer, methods=["POST"]),
    Route(HOT_LOAD_PATH, plain_signal, methods=["POST"]),
    Route(HOT_LOAD_PATH, plain_status, methods=["GET"]),
)


def _check_names(config: EmulatorConfig, request: Request) -> None:
    for header, name in (
        (config.api.model_header, config.model),
        (config.api.deployment_header, config.deployment),
    ):
        if request.headers.get(header) != name:
            raise RefusedError(400, f"{header.title()} header does not match this deployment")


def _translated(config: EmulatorConfig, body: Mapping[str, Any]) -> dict[str, Any]:
    """Put a signal into the words of protocol §4."""
    if unknown := sorted(set(body) - set(FIELDS)):
        raise RefusedError(400, f"body has unknown fields {unknown}")
    if body.get("reset_prompt_cache", POLICY) != POLICY:
        raise RefusedError(400, f"body.reset_prompt_cache, when present, must be {POLICY!r}")
    translated, metadata = dict(body), body.get(METADATA)
    if isinstance(metadata, dict):
        for name, expected in config.api.formats.items():
            if (given := metadata.get(name, expected)) != expected:
                raise RefusedError(400, f"unsupported {name} {given!r}")
        translated[METADATA] = {**metadata, **FORMATS}
    return translated


def _check_base(base: str, body: Mapping[str, Any]) -> None:
    """Refuse every full snapshot but the base, which is served from the start."""
    identity = body.get("identity")
    if METADATA not in body and identity != base:
        raise RefusedError(409, f"this deployment serves base {base!r}, not {identity!r}")
