"""The client of a hot-load service: announces snapshots and watches them load (protocol §2-§8)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

from hotload.check_line import CheckLine
from hotload.clients.access import Access
from hotload.clients.redaction import redact
from hotload.clients.service.calls import ask, parse_json, raise_for
from hotload.errors import (
    ProtocolError,
    ServiceError,
    ServiceRefusedError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.identity import SnapshotKind
from hotload.publish import fireworks_api, fireworks_names
from hotload.publish.preflight import service_lines
from hotload.publish.readiness import ServiceDescription, ServiceStatus
from hotload.publish.snapshot import SnapshotManifest
from hotload.rollout import completions_api

POST_TIMEOUT_SECONDS = 60.0
GET_TIMEOUT_SECONDS = 30.0
HINT_TIMEOUT_SECONDS = 10.0
PROBE_TIMEOUT_SECONDS = 10.0
DESCRIPTION_LIMIT_BYTES = 1 << 20
NO_DESCRIPTION = "this API has none; the cycle's readiness.replica_count says how many replicas"
NO_SUCH_CALL = {404, 405, 501}
NO_LEDGER_CALL = "if they are right, only the vendor's command line shows it: `firectl get ledger"
RESET_PROMPT_CACHE, HINTS = "reset_prompt_cache", "hints"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HotLoadClient:
    """Calls the control side of an inference service whose weights are replaced while it serves.

    The fields are those of the block `HotLoadService`, which describes them; may be pickled.
    """

    access: Access
    base_model: str | None = None
    hot_load_transition_type: Literal["ASYNC", "SYNC"] | None = None
    reset_prompt_cache: Literal["all", "new_session", "none"] = "all"
    extra_fields_ignore: tuple[str, ...] = ()
    hint_body_template: Mapping[str, object] | None = None
    is_one_of_several: bool = False
    """Whether what is said of it has to name it."""
    _refused: set[str] = field(default_factory=set, init=False, repr=False)
    """What this service has refused by its form: RESET_PROMPT_CACHE, HINTS. Not sent again."""
    transport: httpx.AsyncBaseTransport | None = field(default=None, repr=False)
    """What carries its calls; None is the network."""

    def __post_init__(self) -> None:
        """Refuse what this API cannot be told, before anything is uploaded for it.

        Raises:
            ServiceRefusedError: such a field is set.
        """
        api = self.access.api
        for name, is_taken in (
            ("reset_prompt_cache", self.reset_prompt_cache in api.prompt_cache_policies),
            ("extra_fields_ignore", not self.extra_fields_ignore or api.has_control_plane),
            ("hint_body_template", self.hint_body_template is None or api.has_control_plane),
        ):
            if not is_taken:
                found = f"{name}: found {getattr(self, name)!r}, which this API cannot be told"
                policies = " or ".join(api.prompt_cache_policies)
                advice = f"For {self.access.source}: leave it out; prompts: {policies}"
                raise ServiceRefusedError("open", None, found, advice)

    @property
    def said(self) -> str:
        """Begins a sentence about this service; empty where it is the only one."""
        return f"{self.access.service}: " if self.is_one_of_several else ""

    @property
    def label(self) -> str:
        """Ends the name of a step at this service; empty where it is the only one."""
        if not self.is_one_of_several:
            return ""
        return f"-at-{self.access.account_id}-{self.access.deployment_id}"

    async def observe(self) -> ServiceStatus:
        """Read what every replica serves and does; empty while the service scales up (protocol §5).

        Raises:
            ServiceUnavailableError: no answer, or none that is JSON: gateways do that now and then.
            ServiceRefusedError: the key, a name or the account is wrong.
            ProtocolError: JSON of another form.
        """
        limit = fireworks_api.STATUS_LIMIT_BYTES
        text = await self._get("observe", fireworks_names.HOT_LOAD_PATH, limit, self.access.names())
        data = parse_json(self.access, "observe", text, ServiceUnavailableError)
        replicas, key = fireworks_api.parse_status(data).replicas, self.access.key("observe")
        # What is shown of a replica goes to the log, whatever the server put into it.
        return ServiceStatus(
            tuple(
                replace(
                    one,
                    raw=redact(one.raw, [key]),
                    error=redact(one.error, [key])[: fireworks_api.ERROR_CHARS],
                )
                for one in replicas
            )
        )

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
        raise_for(status, "signal", text, SnapshotRejectedError, self.access.remedy(status))
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
                "hint",
                "POST",
                fireworks_names.HINT_PATH,
                HINT_TIMEOUT_SECONDS,
                self.access.names(),
                body,
            )
            raise_for(status, "hint", text, ServiceRefusedError, self.access.remedy(status))
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
            ServiceUnavailableError, ServiceRefusedError: as `observe`; also where there is no
                ledger.
        """
        if not self.access.api.has_control_plane:
            advice = "Set snapshot.ledger_reset to never"
            raise ServiceRefusedError("reset_ledger", None, "this API has no ledger", advice)
        path = fireworks_names.ledger_path(self.access.deployment())
        status, text = await self._ask("reset_ledger", "DELETE", path, POST_TIMEOUT_SECONDS)
        raise_for(status, "reset_ledger", text, ServiceRefusedError, self.access.remedy(status))

    async def read_ledger(self) -> list[Any] | None:
        """Read what the service has loaded, newest first; None where this API has no ledger.

        No public source states path or fields (protocol §7): entries are what the service gave.

        Raises:
            ServiceUnavailableError, ServiceRefusedError: as `observe`; also where it shows none.
            ProtocolError: the answer is not JSON, or has no list of entries.
        """
        if not self.access.api.has_control_plane:
            return None
        path = fireworks_names.ledger_path(self.access.deployment())
        limit = fireworks_api.STATUS_LIMIT_BYTES
        status, text = await self._ask(
            "read_ledger", "GET", path, GET_TIMEOUT_SECONDS, limit_bytes=limit
        )
        if status in NO_SUCH_CALL:
            advice = f"{self.access.remedy(status)}; {NO_LEDGER_CALL} {self.access.deployment_id}`"
            raise ServiceRefusedError("read_ledger", status, "it shows no ledger", advice)
        raise_for(status, "read_ledger", text, ServiceRefusedError, self.access.remedy(status))
        shown = redact(text, [self.access.key("read_ledger")])
        return fireworks_api.parse_ledger(
            parse_json(self.access, "read_ledger", shown, ProtocolError)
        )

    async def describe(self) -> ServiceDescription | None:
        """Read the service as its control plane describes it; None where it has none (protocol §8,
        §22).

        Raises:
            ServiceUnavailableError: no answer.
            ServiceRefusedError: there is no such service, or the key may not ask.
            ProtocolError: the answer is not JSON, or not an object.
        """
        if not self.access.api.has_control_plane:
            return None
        path = fireworks_names.deployment_path(self.access.deployment())
        text = await self._get("describe", path, DESCRIPTION_LIMIT_BYTES)
        data = parse_json(self.access, "describe", text, ProtocolError)
        return fireworks_api.parse_description(data)

    def preflight(
        self, description: ServiceDescription | None, bucket_url: str | None
    ) -> list[CheckLine]:
        """Check that the service can be hot-loaded from `bucket_url`; a line each (protocol §8)."""
        if description is None:
            return [CheckLine("description", True, NO_DESCRIPTION)]
        return service_lines(
            description,
            bucket_url=bucket_url,
            base_model=self.base_model,
            transition_type=self.hot_load_transition_type,
        )

    async def probe(self) -> bool:
        """Ask for a very small completion; whether it came within 10 s (protocol §8, §14)."""
        try:
            status, _ = await self._ask(
                "probe",
                "POST",
                self.access.api.inference_prefix + fireworks_names.COMPLETIONS,
                PROBE_TIMEOUT_SECONDS,
                self.access.names(),
                {"model": self.access.model(), **completions_api.WARM_UP_BODY},
            )
        except ServiceError:
            return False
        return status == 200

    async def check(self, bucket_url: str | None = None) -> list[CheckLine]:
        """Check that the key works and the service answers and can be hot-loaded, line by line.

        Never raises for the service's sake. `bucket_url` is the store's, compared when given.
        """
        try:
            self.access.key("check")
        except ServiceRefusedError as error:
            return [CheckLine("key", False, error.answer, error.advice)]
        lines = [CheckLine("key", True, "there is one")]
        try:
            status = await self.observe()
            lines.append(CheckLine("status", True, status.describe()))
        except ServiceError as error:
            lines.append(CheckLine("status", False, error.answer, error.advice))
        try:
            description = await self.describe()
        except ServiceError as error:
            return [*lines, CheckLine("description", False, error.answer, error.advice)]
        lines += self.preflight(description, bucket_url)
        if description is not None and description.state == "CREATING":
            answers = await self.probe()
            text = "answers a request" if answers else "does not answer requests yet"
            lines.append(CheckLine("inference", answers, text, "Wait until it does", stops=False))
        return lines

    async def _signal(self, manifest: SnapshotManifest) -> tuple[int, str]:
        policy = "all" if RESET_PROMPT_CACHE in self._refused else self.reset_prompt_cache
        body = fireworks_api.signal_body(
            manifest,
            reset_prompt_cache=policy,
            extra_fields_ignore=self.extra_fields_ignore,
            formats=self.access.api.formats,
        )
        return await self._ask(
            "signal",
            "POST",
            fireworks_names.HOT_LOAD_PATH,
            POST_TIMEOUT_SECONDS,
            self.access.names(),
            body,
        )

    async def _get(
        self, operation: str, path: str, limit_bytes: int, headers: dict[str, str] | None = None
    ) -> str:
        status, text = await self._ask(
            operation, "GET", path, GET_TIMEOUT_SECONDS, headers, limit_bytes=limit_bytes
        )
        raise_for(status, operation, text, ServiceRefusedError, self.access.remedy(status))
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
        return await ask(
            self.access,
            operation,
            method,
            path,
            headers=headers or {},
            body=body,
            timeout_seconds=timeout_seconds,
            limit_bytes=limit_bytes,
            transport=self.transport,
        )
