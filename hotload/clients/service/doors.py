"""Clients of doors whose calls are their own, and which client a dialect has (protocol §23)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from hotload.check_line import CheckLine
from hotload.clients.access import Access
from hotload.clients.redaction import redact
from hotload.clients.service.calls import parse_json, raise_for
from hotload.clients.service.client import POST_TIMEOUT_SECONDS, HotLoadClient
from hotload.errors import (
    ProtocolError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.identity import SnapshotKind
from hotload.publish.doors import coreweave
from hotload.publish.fireworks_api import REPLICA_LIMIT, STATUS_LIMIT_BYTES
from hotload.publish.readiness import ServiceDescription, ServiceStatus
from hotload.publish.snapshot import SnapshotManifest

UNSAID = {"bucket type", "minimum replicas"}


@dataclass(frozen=True, eq=False)
class CoreWeaveClient(HotLoadClient):
    """Calls the hot-load API of a CoreWeave deployment, which `deployment_id` names."""

    async def observe(self) -> ServiceStatus:
        """Read what every replica serves and does, as the newest load lists them.

        Raises:
            ServiceUnavailableError, ServiceRefusedError, ProtocolError: as of any service.
        """
        newest = {"parentDeploymentId": self.access.deployment_id, "maxPageSize": 1}
        load = coreweave.parse_newest(await self._read(coreweave.HOT_LOADS_PATH, newest))
        if load is None:
            return coreweave.status_before_any(await self.describe())
        status = coreweave.status_of(load, await self._replicas(load.id))
        key = self.access.key("observe")
        return ServiceStatus(
            tuple(replace(one, raw=redact(one.raw, [key])) for one in status.replicas)
        )

    async def signal(self, manifest: SnapshotManifest) -> tuple[str, ...]:
        """Begin the load of a snapshot. Its id follows from its identity: one that was begun before
        is not begun again.

        Raises:
            ServiceUnavailableError: whether it began is unclear, or another load goes on.
            ServiceRefusedError: the key or a name is wrong.
            SnapshotRejectedError: the service refuses the snapshot; carries its text.
        """
        if manifest.kind is SnapshotKind.LORA:
            reason = "hot-loads take full weights and deltas of them, no adapters"
            raise SnapshotRejectedError("signal", None, reason)
        deployment = self.access.deployment_id
        body = coreweave.hot_load_body(deployment, manifest, self.reset_prompt_cache)
        status, text = await self._ask(
            "signal", "POST", coreweave.HOT_LOADS_PATH, POST_TIMEOUT_SECONDS, body=body
        )
        match coreweave.error_code(status, text) if status >= 400 else None:
            case "already_exists":
                path = f"{coreweave.HOT_LOADS_PATH}/{body['hotLoadId']}"
                found = await self._read(path, {})
                load = coreweave.parse_hot_load(
                    found.get("hotLoad") if isinstance(found, dict) else None
                )
                if not load.is_of(manifest):
                    raise SnapshotRejectedError(
                        "signal", status, f"{load.id} loads {load.identity}"
                    )
            case "failed_precondition" if coreweave.IN_PROGRESS in text:
                raise ServiceUnavailableError("signal", status, text)
            case "failed_precondition":
                raise SnapshotRejectedError("signal", status, text)
            case _:
                raise_for(status, "signal", text, SnapshotRejectedError, self.access.remedy(status))
        return ()

    async def describe(self) -> ServiceDescription:
        """Read the deployment.

        Raises:
            ServiceUnavailableError, ServiceRefusedError, ProtocolError: as of any service.
        """
        path = f"{coreweave.DEPLOYMENTS_PATH}/{self.access.deployment_id}"
        return coreweave.parse_deployment(await self._read(path, {}, "describe"))

    def preflight(
        self, description: ServiceDescription | None, bucket_url: str | None
    ) -> list[CheckLine]:
        """Check what a deployment says of itself; a line each."""
        lines = super().preflight(description, bucket_url)
        return [line for line in lines if line.name not in UNSAID]

    async def _replicas(self, load_id: str) -> list[object]:
        path = f"{coreweave.HOT_LOADS_PATH}/{load_id}/replicas"
        query: dict[str, Any] = {"maxPageSize": coreweave.PAGE_SIZE}
        found: list[object] = []
        while True:
            page = await self._read(path, query)
            found += coreweave.entries(page, "replicas")
            token = coreweave.next_page(page)
            if token is None:
                return found
            if token == query.get("pageToken") or len(found) > REPLICA_LIMIT:
                raise ProtocolError("observe", 200, f"the pages of {path} do not end")
            query["pageToken"] = token

    async def _read(self, path: str, query: dict[str, Any], operation: str = "observe") -> Any:
        query_text = f"?{urlencode(query)}" if query else ""
        text = await self._get(operation, path + query_text, STATUS_LIMIT_BYTES)
        return parse_json(self.access, operation, text, ServiceUnavailableError)


def open_service(access: Access, **fields: Any) -> HotLoadClient:
    """Open the client of a service by the dialect of its API; `fields` are the client's.

    Raises:
        ServiceRefusedError: a field that this dialect cannot say is set.
    """
    kind = CoreWeaveClient if access.dialect == "coreweave" else HotLoadClient
    return kind(access, **fields)
