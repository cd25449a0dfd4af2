"""The inference client: samples answers from the service whose weights are hot-loaded (protocol
§11-§15).

aiohttp, since httpx's pool costs 10 ms of CPU a request at 64 connections.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from hotload.check_line import CheckLine
from hotload.clients.access import Access
from hotload.clients.inference.proof import Proof
from hotload.clients.inference.sampler import Sampler, Sleep
from hotload.clients.inference.transport import (
    ERROR_BODY_LIMIT_BYTES,
    NO_ANSWER,
    HttpTransport,
    head_of,
    names_in,
)
from hotload.errors import ServiceError, ServiceRefusedError, ServiceUnavailableError
from hotload.http_status import StatusMeaning, meaning_of
from hotload.options import Sampling
from hotload.publish import fireworks_names
from hotload.publish.probe import ProbeAnswer
from hotload.rollout import completions_api
from hotload.rollout.engines.kind import ServerKind
from hotload.rollout.engines.known import KINDS, EngineName
from hotload.rollout.window import Window

CONNECT_TIMEOUT_SECONDS = 30.0
CONNECTIONS = 256
WARM_UP_WAIT_SECONDS = 10.0
WARM_UP_TIMEOUT_SECONDS = 30.0
CHECK_TIMEOUT_SECONDS = 10.0
PROBE_TIMEOUT_SECONDS = 60.0
PROBE_ANSWER_LIMIT_BYTES = 4 << 20
REFUSALS = (StatusMeaning.NO_ACCESS, StatusMeaning.NOT_FOUND, StatusMeaning.NOT_LOADABLE)


@dataclass(frozen=True, slots=True)
class InferenceClient:
    """One model on one service, answered by servers of one kind, the vendor's or another `engine`.

    `path_prefix`, `session_headers` and `request_id_header` are those of dialect and engine where
    they are None. Nothing is connected before it is used.
    """

    access: Access
    model_addressing: Literal["header", "deployment"] = "header"
    drain_timeout_seconds: int | None = None
    engine: EngineName = "fireworks"
    path_prefix: str | None = None
    session_headers: tuple[str, ...] | None = None
    request_id_header: str | None = None

    @property
    def kind(self) -> ServerKind:
        """How the servers are asked, and what their answers mean."""
        kind = KINDS[self.engine]
        return replace(
            kind,
            session_headers=(
                kind.session_headers if self.session_headers is None else self.session_headers
            ),
            request_id_header=self.request_id_header or kind.request_id_header,
        )

    @property
    def is_vendors(self) -> bool:
        """Whether the vendor's service answers, whose fields are documented."""
        return self.engine == "fireworks"

    @property
    def model(self) -> str:
        """What the body's `model` says (protocol §11)."""
        if self.model_addressing == "deployment":
            return self.access.deployment()
        return self.access.model()

    @asynccontextmanager
    async def session(
        self,
        sampling: Sampling,
        *,
        identity: str,
        policy_version: int,
        replica_count: int | None = None,
        swap_timeout_seconds: float = 600.0,
        sleep: Sleep = asyncio.sleep,
        window: Window | None = None,
    ) -> AsyncIterator[Sampler]:
        """Open a sampler whose samples all share one window; no connection outlives it.

        Args:
            identity: what the service was confirmed to serve.
            replica_count: for the window's first size.
            swap_timeout_seconds: what one sample may wait for swaps (`weight_sync_timeout`).
            sleep: waits between attempts.
            window: instead of one of its own.

        Raises:
            ServiceRefusedError: there is no key, or the environment's address is not one.
        """
        window = window or Window(sampling.concurrency, replica_count=replica_count)
        connections = max(window.widest, CONNECTIONS)
        async with self._transport(sampling.sample_timeout, connections) as transport:
            yield Sampler(
                transport,
                window,
                sampling,
                kind=self.kind,
                model=self.model,
                remedy=self._remedy,
                identity=identity,
                policy_version=policy_version,
                swap_timeout_seconds=swap_timeout_seconds,
                sleep=sleep,
            )

    async def warm_up(self, *, retries: int, sleep: Sleep = asyncio.sleep) -> bool:
        """Tell whether a small request was answered within `retries` tries, 10 s apart (protocol
        §14). Never fatal.

        The first requests after a swap can be slow or fail while the replicas rebuild their memory.
        """
        for attempt in range(retries):
            if attempt:
                await sleep(WARM_UP_WAIT_SECONDS)
            try:
                await self._warm_up(WARM_UP_TIMEOUT_SECONDS)
            except ServiceError as error:
                if isinstance(error, ServiceRefusedError) and error.status_code != 404:
                    return False  # no waiting mends a key
            else:
                return True
        return False

    async def ask_logprobs(self, token_ids: tuple[int, ...], session_id: str) -> ProbeAnswer:
        """Ask for the log-probabilities of `token_ids` by the replica that this session leads to.

        Raises:
            ServiceRefusedError, ServiceUnavailableError: no answer, or not the vendor's service.
            ProtocolError: an answer without these tokens.
        """
        if not self.is_vendors:
            advice = f"For {self.access.source}: set readiness.probe_sessions to 0"
            reason = f"the log-probabilities of a prompt are not read of {self.engine}"
            raise ServiceRefusedError("probe", None, reason, advice)
        body = json.dumps(completions_api.probe_body(token_ids, self.model)).encode()
        headers = {
            fireworks_names.SESSION_HEADER: session_id,
            fireworks_names.AFFINITY_HEADER: session_id,
        }
        data = await self._complete("probe", body, PROBE_TIMEOUT_SECONDS, headers)
        return ProbeAnswer(session_id, *completions_api.parse_probe(data, token_ids))

    async def ask_first(self, sampling: Sampling) -> None:
        """Ask whether samples would be answered: the vendor's service for one token, whichever it
        is, any other for all that a trainer needs of samples by these settings.

        Raises:
            ServiceRefusedError: 401, 402, 403, 404, 412, no key or no address; of another engine,
                any answer that no sample could be trained on.
            ServiceUnavailableError: any other failure, or none within 10 s.
        """
        if not self.is_vendors:
            return await self._prove(sampling, CHECK_TIMEOUT_SECONDS)
        body = json.dumps({"model": self.model, **completions_api.ONE_TOKEN_BODY}).encode()
        await self._complete("rollouts", body, CHECK_TIMEOUT_SECONDS, {})
        return None

    async def check(self) -> list[CheckLine]:
        """Ask whether the service answers a small request, and what is missing if not (protocol §8,
        §14).
        """
        try:
            await self._warm_up(CHECK_TIMEOUT_SECONDS)
        except ServiceError as error:
            return [CheckLine("inference", False, error.answer, error.advice)]
        return [CheckLine("inference", True, f"{self.model} answers")]

    async def _warm_up(self, timeout_seconds: float) -> None:
        """Send the request of protocol §14, to another engine one like a sample's.

        Raises:
            ServiceRefusedError: 401, 402, 403, 404, 412, no key or no address; as `ask_first`.
            ServiceUnavailableError: any other failure.
        """
        if not self.is_vendors:
            return await self._prove(Sampling(), timeout_seconds)
        body = json.dumps({"model": self.model, **completions_api.WARM_UP_BODY}).encode()
        await self._complete("warm-up", body, timeout_seconds, {})
        return None

    async def _prove(self, sampling: Sampling, timeout_seconds: float) -> None:
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._transport(timeout_seconds, connections=1) as transport,
            ):
                await Proof(transport, self.kind, self.model, self._remedy).prove(sampling)
        except TimeoutError as error:
            advice = self.access.remedy(None)
            raise ServiceUnavailableError("rollouts", None, type(error).__name__, advice) from None

    def _remedy(self, status_code: int | None) -> str:
        """Advise as the account does, and where the server answered, as its kind does."""
        if self.is_vendors or status_code in (None, 401):
            return self.access.remedy(status_code)
        return f"For {self.access.source}: {self.kind.advice}"

    async def _complete(
        self, operation: str, body: bytes, timeout_seconds: float, headers: Mapping[str, str]
    ) -> bytes:
        """Send one completion outside a session's window; returns the body of a good answer, at
        most 4 MiB.

        Raises:
            ServiceRefusedError, ServiceUnavailableError: as `_warm_up`.
        """
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._transport(timeout_seconds, connections=1) as transport,
                await transport.post(fireworks_names.COMPLETIONS, body, headers) as response,
            ):
                status = response.status
                limit = PROBE_ANSWER_LIMIT_BYTES if status == 200 else ERROR_BODY_LIMIT_BYTES
                head = await head_of(response, limit)
        except NO_ANSWER as error:
            advice = self.access.remedy(None)
            raise ServiceUnavailableError(operation, None, type(error).__name__, advice) from None
        if status == 200:
            return head
        detail, advice = names_in(head), self.access.remedy(status)
        if meaning_of(status) in REFUSALS:
            raise ServiceRefusedError(operation, status, detail, advice)
        raise ServiceUnavailableError(operation, status, detail, advice)

    def _transport(self, read_timeout_seconds: float, connections: int) -> HttpTransport:
        prefix = self.path_prefix
        if prefix is None:
            prefix = self.access.api.inference_prefix
        return HttpTransport(
            self.access.origin("rollouts") + prefix,
            self._headers(),
            connect_timeout_seconds=CONNECT_TIMEOUT_SECONDS,
            read_timeout_seconds=read_timeout_seconds,
            connections=connections,
        )

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        # A server of one's own may ask for no key; the vendor's is not for it.
        if self.is_vendors or self.access.api_key:
            headers["Authorization"] = f"Bearer {self.access.key('rollouts')}"
        if self.model_addressing == "header":
            headers |= self.access.names()
        if self.drain_timeout_seconds is not None:
            headers[fireworks_names.DRAIN_TIMEOUT_HEADER] = str(self.drain_timeout_seconds)
        return headers
