"""The client of a hot-load service: announces snapshots and watches them load (protocol §2-§8)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from hotload.clients.access import key_of, origin_of
from hotload.clients.redaction import redact
from hotload.clients.service.calls import advice_for, ask, parse_json, raise_for
from hotload.errors import (
    ProtocolError,
    ServiceError,
    ServiceRefusedError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.identity import SnapshotKind
from hotload.publish import fireworks_api, fireworks_names
from hotload.publish.check_line import CheckLine
from hotload.publish.preflight import service_lines
from hotload.publish.readiness import ServiceDescription, ServiceStatus
from hotload.publish.snapshot import SnapshotManifest
from hotload.rollout import completions_api

POST_TIMEOUT_SECONDS = 60.0
GET_TIMEOUT_SECONDS = 30.0
HINT_TIMEOUT_SECONDS = 10.0
PROBE_TIMEOUT_SECONDS = 10.0
DESCRIPTION_LIMIT_BYTES = 1 << 20
RESET_PROMPT_CACHE, HINTS = "reset_prompt_cache", "hints"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HotLoadClient:
    """Calls the control side of an inference service whose weights are replaced while it serves.

    The fields are those of the block `HotLoadService`, which describes them; may be pickled.
    """

    account_id: str
    model_id: str
    deployment_id: str
    base_url: str | None = None
    api_key: str = field(default="", repr=False)
    base_model: str | None = None
    hot_load_transition_type: Literal["ASYNC", "SYNC"] | None = None
    reset_prompt_cache: Literal["all", "new_session", "none"] = "all"
    extra_fields_ignore: tuple[str, ...] = ()
    hint_body_template: Mapping[str, object] | None = None
    _refused: set[str] = field(default_factory=set, init=False, repr=False)
    """What this service has refused by its form: RESET_PROMPT_CACHE, HINTS. Not sent again."""

    async def observe(self) -> ServiceStatus:
        """Read what every replica serves and does; empty while the service scales up (protocol §5).

        Raises:
            ServiceUnavailableError: no answer, or none that is JSON: gateways do that now and then.
            ServiceRefusedError: the key, a name or the account is wrong.
            ProtocolError: JSON of another form.
        """
        limit = fireworks_api.STATUS_LIMIT_BYTES
        text = await self._get("observe", fireworks_names.HOT_LOAD_PATH, limit, self._names())
        key = self._key("observe")
        data = parse_json("observe", text, key, ServiceUnavailableError)
        replicas = fireworks_api.parse_status(data).replicas
        # What is shown of a replica goes to the log, whatever the server put into it.
        return ServiceStatus(tuple(replace(one, raw=redact(one.raw, [key])) for one in replicas))

    async def signal(self, manifest: SnapshotManifest) -> tuple[str, ...]:
        """Say that a snapshot is complete and is to be loaded; returns warnings (protocol §4).

        The answer's body is never read. If the service does not know `reset_prompt_cache`, the
        signal is repeated once without it, and this client leaves the field out from then on.

        Raises:
            ServiceUnavailableError: whether it was accepted is unclear: observe before repeating.
            ServiceRefusedError: the key, a name or the account is wrong.
            SnapshotRejectedError: the service refuses the snapshot; carries its text.
        """
        status, text = await self._signal(manifest)
        if RESET_PROMPT_CACHE not in self._refused and fireworks_api.refuses_prompt_cache_field(
            status, text
        ):
            self._refused.add(RESET_PROMPT_CACHE)
            status, text = await self._signal(manifest)
        raise_for(status, "signal", text, SnapshotRejectedError)
        if self.reset_prompt_cache == "all" or RESET_PROMPT_CACHE not in self._refused:
            return ()
        return (
            "the service does not know reset_prompt_cache: "
            f"its default, all, is in force instead of {self.reset_prompt_cache}",
        )

    async def hint(
        self,
        *,
        identity: str,
        file: str,
        uri: str,
        size_bytes: int,
        kind: SnapshotKind,
        previous: str | None,
    ) -> bool:
        """Tell the service that one file has arrived; whether it took notice (protocol §6).

        Best effort: never raises, never repeats, and stops for good at the first 4xx.
        """
        if self.hint_body_template is None or HINTS in self._refused:
            return False
        values = {
            "identity": identity,
            "file": file,
            "uri": uri,
            "size": size_bytes,
            "kind": kind.value,
            "previous": previous or "",
        }
        body = fireworks_api.hint_body(self.hint_body_template, values)
        try:
            status, text = await self._ask(
                "hint", "POST", fireworks_names.HINT_PATH, HINT_TIMEOUT_SECONDS, self._names(), body
            )
            raise_for(status, "hint", text, ServiceRefusedError)
        except ServiceError as error:
            code = error.status_code
            if isinstance(error, ServiceRefusedError) or (code is not None and 400 <= code < 500):
                self._refused.add(HINTS)
                logger.warning("no more hints to this service: %s", error)
            else:
                logger.info("the hint for %s was lost: %s", file, error)
            return False
        return True

    async def reset_ledger(self) -> None:
        """Make the service forget every hot-loaded snapshot; base weights answer (protocol §7).

        Raises:
            ServiceUnavailableError, ServiceRefusedError: as `observe`.
        """
        path = fireworks_names.ledger_path(self.account_id, self.deployment_id)
        status, text = await self._ask("reset_ledger", "DELETE", path, POST_TIMEOUT_SECONDS)
        raise_for(status, "reset_ledger", text, ServiceRefusedError)

    async def describe(self) -> ServiceDescription:
        """Read the service as its control plane describes it (protocol §8).

        Raises:
            ServiceUnavailableError: no answer.
            ServiceRefusedError: there is no such service, or the key may not ask.
            ProtocolError: the answer is not JSON, or not an object.
        """
        path = fireworks_names.deployment_path(self.account_id, self.deployment_id)
        text = await self._get("describe", path, DESCRIPTION_LIMIT_BYTES)
        data = parse_json("describe", text, self._key("describe"), ProtocolError)
        return fireworks_api.parse_description(data)

    def preflight(self, description: ServiceDescription, bucket_url: str | None) -> list[CheckLine]:
        """Check that the service can be hot-loaded from `bucket_url`; a line each (protocol §8)."""
        return service_lines(
            description,
            bucket_url=bucket_url,
            base_model=self.base_model,
            transition_type=self.hot_load_transition_type,
        )

    async def probe(self) -> bool:
        """Ask for a very small completion; whether it came within 10 s (protocol §8, §14)."""
        model = fireworks_names.model_name(self.account_id, self.model_id)
        try:
            status, _ = await self._ask(
                "probe",
                "POST",
                fireworks_names.COMPLETIONS_PATH,
                PROBE_TIMEOUT_SECONDS,
                self._names(),
                {"model": model, **completions_api.WARM_UP_BODY},
            )
        except ServiceError:
            return False
        return status == 200

    async def check(self, bucket_url: str | None = None) -> list[CheckLine]:
        """Check that the key works and the service answers and can be hot-loaded, line by line.

        Never raises for the service's sake. `bucket_url` is the store's, compared when given.
        """
        try:
            self._key("check")
        except ServiceRefusedError as error:
            return [CheckLine("key", False, error.detail, KEY_ADVICE)]
        lines = [CheckLine("key", True, "there is one")]
        try:
            status = await self.observe()
            lines.append(CheckLine("status", True, status.describe()))
        except ServiceError as error:
            lines.append(CheckLine("status", False, str(error), advice_for(error)))
        try:
            description = await self.describe()
        except ServiceError as error:
            return [*lines, CheckLine("description", False, str(error), advice_for(error))]
        lines += self.preflight(description, bucket_url)
        if description.state == "CREATING":
            answers = await self.probe()
            text = "answers a request" if answers else "does not answer requests yet"
            lines.append(CheckLine("inference", answers, text, "Wait until it does", stops=False))
        return lines

    async def _signal(self, manifest: SnapshotManifest) -> tuple[int, str]:
        policy = "all" if RESET_PROMPT_CACHE in self._refused else self.reset_prompt_cache
        body = fireworks_api.signal_body(
            manifest, reset_prompt_cache=policy, extra_fields_ignore=self.extra_fields_ignore
        )
        return await self._ask(
            "signal",
            "POST",
            fireworks_names.HOT_LOAD_PATH,
            POST_TIMEOUT_SECONDS,
            self._names(),
            body,
        )

    async def _get(
        self, operation: str, path: str, limit_bytes: int, headers: dict[str, str] | None = None
    ) -> str:
        status, text = await self._ask(
            operation, "GET", path, GET_TIMEOUT_SECONDS, headers, limit_bytes=limit_bytes
        )
        raise_for(status, operation, text, ServiceRefusedError)
        return text

    async def _ask(
        self,
        operation: str,
        method: str,
        path: str,
        timeout_seconds: float,
        headers: dict[str, str] | None = None,
        body: object = None,
        *,
        limit_bytes: int = 0,
    ) -> tuple[int, str]:
        url = origin_of(self.base_url, operation) + path
        key = self._key(operation)
        return await ask(
            operation,
            method,
            url,
            key=key,
            headers=headers or {},
            body=body,
            timeout_seconds=timeout_seconds,
            limit_bytes=limit_bytes,
        )

    def _names(self) -> dict[str, str]:
        return {
            fireworks_names.MODEL_HEADER: fireworks_names.model_name(
                self.account_id, self.model_id
            ),
            fireworks_names.DEPLOYMENT_HEADER: fireworks_names.deployment_name(
                self.account_id, self.deployment_id
            ),
        }

    def _key(self, operation: str) -> str:
        return key_of(self.api_key, operation)


KEY_ADVICE = "Put a key with control rights into the block, or into the environment"
