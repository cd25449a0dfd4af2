"""The block that says which service the rollouts are sampled from."""

from __future__ import annotations

from typing import Literal

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, field_validator

from hotload.clients.access import RESOURCE_ID, check_origin
from hotload.clients.inference.client import InferenceClient


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

    def open(self) -> InferenceClient:
        """Make the client of this service; nothing is connected yet."""
        return InferenceClient(
            self.account_id,
            self.model_id,
            self.deployment_id,
            base_url=self.base_url,
            api_key=self.api_key,
            model_addressing=self.model_addressing,
            drain_timeout_seconds=self.drain_timeout_seconds,
        )
