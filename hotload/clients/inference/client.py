"""The inference client: samples answers from the service whose weights are hot-loaded (protocol
§11-§15).

aiohttp, since httpx's pool costs 10 ms of CPU a request at 64 connections.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from pydantic import SecretStr

from hotload.clients.access import key_of, origin_of
from hotload.clients.inference.sampler import Sampler, Sleep
from hotload.clients.inference.transport import NO_ANSWER, HttpTransport, head_of, names_in
from hotload.errors import ServiceError, ServiceRefusedError, ServiceUnavailableError
from hotload.http_status import StatusMeaning, meaning_of
from hotload.options import Sampling
from hotload.publish import fireworks_names
from hotload.publish.check_line import CheckLine
from hotload.rollout import completions_api
from hotload.rollout.window import Window

CONNECT_TIMEOUT_SECONDS = 30.0
CONNECTIONS = 256
WARM_UP_WAIT_SECONDS = 10.0
WARM_UP_TIMEOUT_SECONDS = 30.0
CHECK_TIMEOUT_SECONDS = 10.0
REFUSALS = (StatusMeaning.NO_ACCESS, StatusMeaning.NOT_FOUND, StatusMeaning.NOT_LOADABLE)


@dataclass(frozen=True, slots=True)
class InferenceClient:
    """One model on one service, by the vendor's names.

    Nothing is connected before it is used. Without `base_url` and `api_key` the environment's are
    taken then (FIREWORKS_BASE_URL, FIREWORKS_API_KEY).
    """

    account_id: str
    model_id: str
    deployment_id: str
    base_url: str | None = None
    api_key: SecretStr = field(default=SecretStr(""))
    model_addressing: Literal["header", "deployment"] = "header"
    drain_timeout_seconds: int | None = None

    @property
    def model(self) -> str:
        """What the body's `model` says (protocol §11)."""
        if self.model_addressing == "deployment":
            return fireworks_names.deployment_name(self.account_id, self.deployment_id)
        return fireworks_names.model_name(self.account_id, self.model_id)

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
    ) -> AsyncIterator[Sampler]:
        """Open a sampler whose samples all share one window; no connection outlives it.

        Args:
            identity: what the service was confirmed to serve.
            replica_count: for the window's first size.
            swap_timeout_seconds: what one sample may wait for swaps (`weight_sync_timeout`).
            sleep: waits between attempts.

        Raises:
            ServiceRefusedError: there is no key, or the environment's address is not one.
        """
        window = Window(sampling.concurrency, replica_count=replica_count)
        connections = max(window.widest, CONNECTIONS)
        async with self._transport(sampling.sample_timeout, connections) as transport:
            yield Sampler(
                transport,
                window,
                sampling,
                model=self.model,
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
                await self._probe(WARM_UP_TIMEOUT_SECONDS)
            except ServiceError as error:
                if isinstance(error, ServiceRefusedError) and error.status_code != 404:
                    return False  # no waiting mends a key
            else:
                return True
        return False

    async def check(self) -> list[CheckLine]:
        """Ask whether the service answers a small request, and what is missing if not (protocol §8,
        §14).
        """
        try:
            await self._probe(CHECK_TIMEOUT_SECONDS)
        except ServiceError as error:
            advice = "Check base_url, the three names and the key; right after a swap, wait"
            return [CheckLine("inference", False, str(error), advice)]
        return [CheckLine("inference", True, f"{self.model} answers")]

    async def _probe(self, timeout_seconds: float) -> None:
        """Send the request of protocol §14.

        Raises:
            ServiceRefusedError: 401, 402, 403, 404, 412, no key or no address.
            ServiceUnavailableError: any other failure.
        """
        body = json.dumps({"model": self.model, **completions_api.WARM_UP_BODY}).encode()
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._transport(timeout_seconds, connections=1) as transport,
                await transport.post(fireworks_names.COMPLETIONS_PATH, body) as response,
            ):
                status, head = response.status, await head_of(response)
        except NO_ANSWER as error:
            raise ServiceUnavailableError("warm-up", None, type(error).__name__) from None
        if status == 200:
            return
        detail = names_in(head)
        if meaning_of(status) in REFUSALS:
            raise ServiceRefusedError("warm-up", status, detail)
        raise ServiceUnavailableError("warm-up", status, detail)

    def _transport(self, read_timeout_seconds: float, connections: int) -> HttpTransport:
        return HttpTransport(
            origin_of(self.base_url, "rollouts"),
            self._headers(),
            connect_timeout_seconds=CONNECT_TIMEOUT_SECONDS,
            read_timeout_seconds=read_timeout_seconds,
            connections=connections,
        )

    def _headers(self) -> dict[str, str]:
        key = key_of(self.api_key.get_secret_value(), "rollouts")
        headers = {"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}
        if self.model_addressing == "header":
            headers[fireworks_names.MODEL_HEADER] = fireworks_names.model_name(
                self.account_id, self.model_id
            )
            headers[fireworks_names.DEPLOYMENT_HEADER] = fireworks_names.deployment_name(
                self.account_id, self.deployment_id
            )
        if self.drain_timeout_seconds is not None:
            headers[fireworks_names.DRAIN_TIMEOUT_HEADER] = str(self.drain_timeout_seconds)
        return headers
