"""The block that says which service the rollouts are sampled from."""

from __future__ import annotations

from typing import Literal

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field

from blocks.account import InferenceAccount
from hotload.clients.inference.client import InferenceClient


class RolloutClient(Block):
    """Samples rollouts from the inference service whose weights are hot-loaded."""

    _block_type_name = "Rollout Client"
    _block_type_slug = "rollout-client"
    _description = "Samples rollouts from an inference service, within an adaptive window."

    model_config = ConfigDict(use_attribute_docstrings=True)

    account: InferenceAccount
    """Which service, and the key to it."""
    model_addressing: Literal["header", "deployment"] = "header"
    """The model's path with headers that name the service, or the service's own path as model."""
    drain_timeout_seconds: int | None = Field(None, ge=1, le=86_400)
    """Seconds a swap of weights may hold a request; empty is the service's default, 90."""

    def open(self) -> InferenceClient:
        """Make the client of this service; nothing is connected yet."""
        return InferenceClient(
            self.account.access(self),
            model_addressing=self.model_addressing,
            drain_timeout_seconds=self.drain_timeout_seconds,
        )
