"""A trainer's trigger: one cycle through the API of a Prefect server, without Prefect's package.

    run = publish("http://127.0.0.1:4200/api", {"checkpoint": …, "policy_version": 12, …})

The blocks that the cycle names are saved on the server. A call that is repeated never makes a
second cycle: the server answers a key it knows with the run it knows.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from hotload.clients.redaction import redact
from hotload.clock import monotonic
from hotload.errors import (
    IdentityConflictError,
    ProtocolError,
    ServiceRefusedError,
    ServiceUnavailableError,
)
from hotload.http_status import MAY_PASS, meaning_of
from hotload.spec import CycleSpec

SERVED = "checkpoint-to-rollout/served"
DEPLOY = "`python -m flows.serve` makes checkpoint-to-rollout/served, `make deploy` …/process"
ASK_AGAIN = "what was triggered goes on; the same call finds it again"
SERVER = "Prefect server"
ENDED = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
REQUEST_SECONDS = 30.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 5.0
DETAIL_CHARS = 2048


_Parsed = TypeVar("_Parsed", bound=BaseModel)


class _Deployment(BaseModel):
    id: str


class _State(BaseModel):
    type: str
    name: str
    message: str | None = None


class _FlowRun(BaseModel):
    id: str
    name: str
    parameters: dict[str, Any]
    state: _State | None = None


@dataclass(frozen=True, slots=True)
class CycleRun:
    """A cycle as the server knows it; deployments/README.md says what each state means."""

    id: str
    name: str
    state: str
    message: str
    has_ended: bool
    is_completed: bool


def publish(
    api_url: str,
    cycle: Mapping[str, Any],
    *,
    deployment: str = SERVED,
    attempt: int = 1,
    authorization: str | None = None,
    wait: bool = True,
    patience_seconds: float = 60.0,
) -> CycleRun:
    """Trigger a cycle, or find the run that this has triggered before, and wait for its end.

    A cycle that failed is no exception: look at `is_completed`. Its next attempt has the next
    number; what was done is not repeated.

    Args:
        api_url: of the server, as in PREFECT_API_URL.
        authorization: the header of that name. Without one, it is made of PREFECT_API_KEY or
            PREFECT_API_AUTH_STRING in the environment.
        cycle: the fields of a CycleSpec.
        deployment: `<flow>/<name>` of the deployment that runs it.
        wait: otherwise the run is returned as it stands.
        patience_seconds: how long a server may be away or too busy.

    Raises:
        ValueError: `cycle` is not one, or there is no such deployment; nothing was triggered.
        ServiceRefusedError: the key is wrong, or the deployment takes no such cycle.
        ServiceUnavailableError: no usable answer for `patience_seconds`.
        ProtocolError: what answers is no Prefect server.
        IdentityConflictError: this cycle and attempt was triggered before, as something else.
    """
    spec = CycleSpec.model_validate(cycle)
    declared = spec.model_dump(mode="json")
    key = f"cycle/{deployment}/{spec.name}/{attempt}"
    with _Server(api_url, authorization, patience_seconds) as server:
        try:
            found = server.ask(_Deployment, "GET", f"deployments/name/{deployment}")
        except ServiceRefusedError as error:
            if error.status_code != 404:
                raise
            raise ValueError(f"no deployment {deployment}: {DEPLOY}") from None
        body = {"parameters": {"spec": declared}, "idempotency_key": key}
        run = server.ask(_FlowRun, "POST", f"deployments/{found.id}/create_flow_run", body)
        if run.parameters.get("spec") != declared:
            reason = f"attempt {attempt} of it was triggered with other parameters"
            raise IdentityConflictError(spec.name, reason)
        pause = FIRST_WAIT_SECONDS
        while wait and not _run_of(run).has_ended:
            time.sleep(pause)
            pause = min(1.2 * pause, LONGEST_WAIT_SECONDS)
            run = server.ask(_FlowRun, "GET", f"flow_runs/{run.id}")
    return _run_of(run)


class _Server:
    """The API of a Prefect server, asked again while it is away or busy."""

    def __init__(self, api_url: str, authorization: str | None, patience_seconds: float) -> None:
        self._url, self._patience_seconds = api_url.rstrip("/"), patience_seconds
        key = os.environ.get("PREFECT_API_KEY")
        pair = os.environ.get("PREFECT_API_AUTH_STRING")
        header = authorization or authorization_of(key, pair)
        self._secrets = [one for one in (key, pair, header, *(header or "").split()) if one]
        headers = {"Authorization": header} if header else {}
        self._client = httpx.Client(headers=headers, timeout=REQUEST_SECONDS)

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, kind: type[_Parsed], method: str, path: str, body: object = None) -> _Parsed:
        """Send one request, again and again if need be, and parse its answer."""
        until, pause = monotonic() + self._patience_seconds, FIRST_WAIT_SECONDS
        while True:
            status, reason = None, ""
            try:
                answer = self._client.request(method, f"{self._url}/{path}", json=body)
                if answer.is_success:
                    return kind.model_validate_json(answer.content)
                status, reason = answer.status_code, " ".join(answer.text[:DETAIL_CHARS].split())
            except ValidationError:
                raise ProtocolError(SERVER, 200, f"{path}: not an answer of Prefect's") from None
            except (httpx.RequestError, httpx.InvalidURL) as error:
                reason = f"{type(error).__name__}: {error}"
            reason = redact(reason, self._secrets)
            if status is not None and meaning_of(status) not in MAY_PASS:
                raise ServiceRefusedError(SERVER, status, reason)
            if monotonic() + pause > until:
                raise ServiceUnavailableError(SERVER, status, reason, ASK_AGAIN)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT_SECONDS)


def authorization_of(api_key: str | None, auth_string: str | None) -> str | None:
    """Make the header that a Prefect server asks for, of its key or its `user:password`."""
    if api_key:
        return f"Bearer {api_key}"
    if auth_string:
        return f"Basic {base64.b64encode(auth_string.encode()).decode()}"
    return None


def _run_of(run: _FlowRun) -> CycleRun:
    state = run.state or _State(type="SCHEDULED", name="Scheduled")
    return CycleRun(
        id=run.id,
        name=run.name,
        state=state.name,
        message=state.message or "",
        has_ended=state.type in ENDED,
        is_completed=state.type == "COMPLETED",
    )
