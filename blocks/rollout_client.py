"""The block that says which service the rollouts are sampled from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, model_validator

from blocks.account import InferenceAccount
from hotload.clients.inference.client import InferenceClient
from hotload.rollout.engines.known import EngineName

HEADER = r"^[A-Za-z0-9-]+$"


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

    engine: EngineName = "fireworks"
    """Which kind of server answers; docs/sampling.md says what each has to be started with."""
    path_prefix: str | None = Field(
        None, pattern=r"^(/[A-Za-z0-9._~-]+)*$", examples=["/inference"]
    )
    """What stands before the paths of inference; empty is the account's dialect's, "" is none."""
    session_headers: tuple[Annotated[str, Field(pattern=HEADER)], ...] | None = None
    """Headers that carry one value per trajectory, for a router; empty are the engine's own."""
    request_id_header: str | None = Field(None, pattern=HEADER)
    """Header that carries a request's id; empty is X-Request-Id."""

    @model_validator(mode="after")
    def _has_an_address(self) -> Self:
        if self.engine != "fireworks" and self.account.base_url is None:
            raise ValueError(f"engine {self.engine} needs the account's base_url")
        return self

    def open(self) -> InferenceClient:
        """Make the client of this service; nothing is connected yet."""
        return InferenceClient(
            self.account.access(self),
            model_addressing=self.model_addressing,
            drain_timeout_seconds=self.drain_timeout_seconds,
            engine=self.engine,
            path_prefix=self.path_prefix,
            session_headers=self.session_headers,
            request_id_header=self.request_id_header,
        )
