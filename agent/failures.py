"""Refusals, and the two shapes their bodies have (protocol §3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from hotload.publish.doors.coreweave import API_PREFIX as COREWEAVE_PREFIX
from hotload.publish.fireworks_names import ACCOUNTS_PATH
from hotload.sampling.reward.user_errors import replace_surrogates

CONTROL_CODES = {
    400: 3,
    401: 16,
    403: 7,
    404: 5,
    409: 6,
    412: 9,
    413: 3,
    429: 8,
    500: 13,
    501: 12,
    503: 14,
}
CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHORIZED",
    402: "PAYMENT_REQUIRED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    409: "CONFLICT",
    413: "REQUEST_TOO_LARGE",
    425: "HOT_LOAD_IN_PROGRESS",
    429: "RATE_LIMIT_EXCEEDED",
    503: "SERVICE_UNAVAILABLE",
}


def refused_field(name: str) -> RefusedError:
    """Make the refusal of a request field, in the sentence the vendor's SDK looks for."""
    return RefusedError(400, f"Extra inputs are not permitted, field: '{name[:200]}'")


class RefusedError(Exception):
    """A request is answered with `status_code` and `message`."""

    def __init__(self, status_code: int, message: str, code: str | None = None) -> None:
        super().__init__(status_code, message, code)
        # A name within a snapshot may have half a surrogate pair, which no answer can hold.
        self.status_code, self.message = status_code, replace_surrogates(message)
        self.code = code or CODES.get(status_code, "INTERNAL")

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """Make the gateway's error body, also a chunk inside a stream."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"error": {"message": self.message, "code": self.code, "type": kind}}

    def control_body(self) -> dict[str, Any]:
        """Make the control plane's error body."""
        code = CONTROL_CODES.get(self.status_code, 2)
        return {"code": code, "message": self.message, "details": []}

    def response(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        """Answer at `path`, in the shape of the side it belongs to."""
        is_control = is_control_plane(path) or path.startswith(COREWEAVE_PREFIX)
        body = self.control_body() if is_control else self.body()
        return json_response(body, self.status_code, headers)


def is_control_plane(path: str) -> bool:
    """Tell whether `path` is the control plane's; every other is the gateway's (protocol §3)."""
    return path.startswith(ACCOUNTS_PATH)


def json_response(
    body: object, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with `body` as JSON."""
    return Response(
        orjson.dumps(body), status_code, dict(headers or {}), media_type="application/json"
    )
