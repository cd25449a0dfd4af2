"""The rollout client: samples answers from the service, with the one retry budget a request has
(protocol §11-§15).

httpx's interface on the aiohttp transport: httpx's own pool costs 10 ms of CPU a request at 64
connections.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import httpx
from httpx_aiohttp import AiohttpTransport
from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, field_validator

from hotload.clients.inference.sampler import Sampler, Sleep
from hotload.clients.inference.transport import NO_ANSWER, Wire, head_of, names_in
from hotload.clients.service.calls import RESOURCE_ID, check_origin, key_of, origin_of
from hotload.errors import ServiceError, ServiceRefusedError, ServiceUnavailableError
from hotload.publish import fireworks_api
from hotload.publish.preflight import CheckLine
from hotload.rollout import completions_api
from hotload.rollout.window import Window
from hotload.spec import Sampling

CONNECT_TIMEOUT_SECONDS = 30.0
CONNECTIONS = 256
KEPT_CONNECTIONS = 64
WARM_UP_WAIT_SECONDS = 10.0
WARM_UP_TIMEOUT_SECONDS = 30.0
CHECK_TIMEOUT_SECONDS = 10.0


class RolloutClient(Block):
    """Samples rollouts from the inference service whose weights are hot-loaded."""

    _block_type_name = "Rollout Client"
    _block_type_slug = "rollout-client"
    _description = "Samples rollouts from an inference service, within an adaptive window."

    model_config = ConfigDict(use_attribute_docstrings=True)

    account_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """Account that owns model and service."""
    model_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """The model as the service names it."""
    deployment_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """The service; the vendor calls it a deployment."""
    base_url: str | None = Field(None, examples=["https://api.fireworks.ai"])
    """Origin of the API. Empty takes FIREWORKS_BASE_URL, or else the vendor's."""
    api_key: SecretStr = SecretStr("")
    """Empty takes FIREWORKS_API_KEY from the environment when it is needed."""
    model_addressing: Literal["header", "deployment"] = "header"
    """The model's path with headers that name the service, or the service's own path as model."""
    drain_timeout_seconds: int | None = Field(None, ge=1, le=86_400)
    """Seconds a swap of weights may hold a request; empty is the service's default, 90."""

    @field_validator("base_url")
    @classmethod
    def _origin(cls, url: str | None) -> str | None:
        return None if url is None else check_origin(url)

    @property
    def model(self) -> str:
        """What the body's `model` says (protocol §11)."""
        if self.model_addressing == "deployment":
            return fireworks_api.deployment_name(self.account_id, self.deployment_id)
        return fireworks_api.model_name(self.account_id, self.model_id)

    def _headers(self) -> dict[str, str]:
        key = key_of(self.api_key.get_secret_value(), "rollouts")
        headers = {"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}
        if self.model_addressing == "header":
            headers[fireworks_api.MODEL_HEADER] = fireworks_api.model_name(
                self.account_id, self.model_id
            )
            headers[fireworks_api.DEPLOYMENT_HEADER] = fireworks_api.deployment_name(
                self.account_id, self.deployment_id
            )
        if self.drain_timeout_seconds is not None:
            headers[fireworks_api.DRAIN_TIMEOUT_HEADER] = str(self.drain_timeout_seconds)
        return headers

    @asynccontextmanager
    async def _wire(
        self, read_timeout_seconds: float, connections: int = CONNECTIONS
    ) -> AsyncIterator[Wire]:
        origin = origin_of(self.base_url, "rollouts")
        limits = httpx.Limits(
            max_connections=max(connections, CONNECTIONS),
            max_keepalive_connections=KEPT_CONNECTIONS,
        )
        timeout = httpx.Timeout(CONNECT_TIMEOUT_SECONDS, read=read_timeout_seconds)
        headers = self._headers()
        async with AiohttpTransport(limits=limits) as transport:
            yield Wire(transport, origin, headers, timeout)

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
        """A sampler whose samples all share one window; leaves no connection open behind it.

        Args:
            identity: what the service was confirmed to serve.
            replica_count: for the window's first size.
            swap_timeout_seconds: what one sample may wait for swaps (`weight_sync_timeout`).
            sleep: waits between attempts.

        Raises:
            ServiceRefusedError: no key is to be had, or the environment's address is none.
        """
        window = Window(sampling.concurrency, replica_count=replica_count)
        async with self._wire(sampling.sample_timeout, window.widest) as wire:
            yield Sampler(
                wire,
                window,
                sampling,
                model=self.model,
                identity=identity,
                policy_version=policy_version,
                swap_timeout_seconds=swap_timeout_seconds,
                sleep=sleep,
            )

    async def warm_up(self, *, retries: int, sleep: Sleep = asyncio.sleep) -> bool:
        """Whether a small request was answered within `retries` tries, 10 s apart (protocol §14).
        Never fatal.

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
        """Whether the service answers a small request, and what is missing if not (protocol §8,
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
        try:
            async with asyncio.timeout(timeout_seconds), self._wire(timeout_seconds) as wire:
                body = {"model": self.model, **completions_api.WARM_UP_BODY}
                response = await wire.post(
                    fireworks_api.COMPLETIONS_PATH, json.dumps(body).encode(), []
                )
                try:
                    head = await head_of(response)
                finally:
                    await response.aclose()
        except NO_ANSWER as error:
            raise ServiceUnavailableError("warm-up", None, type(error).__name__) from None
        if response.status_code == 200:
            return
        detail = names_in(head)
        if response.status_code in (401, 402, 403, 404, 412):
            raise ServiceRefusedError("warm-up", response.status_code, detail)
        raise ServiceUnavailableError("warm-up", response.status_code, detail)
