"""The document of a hot-load service: how it is announced to, and what opens the client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, JsonValue, model_validator

from agent.door.agent_fleet import DoorConfig
from agent.door.in_process import ORIGIN, InProcessDoor
from agent.fleet.addresses import Addresses
from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from hotload.clients.access import Access
from hotload.clients.service import HotLoadClient, open_service

NO_KEY = "agents-need-none"


class HotLoadService(Block):
    """An inference service whose weights are replaced while it serves."""

    _block_type_name = "Hot-Load Service"
    _block_type_slug = "hot-load-service"
    _description = "An inference service that loads new weights while it serves."

    model_config = ConfigDict(use_attribute_docstrings=True)

    account: InferenceAccount
    """Which service, and the key to it. An inference-only key is not enough."""
    base_model: str | None = Field(None, examples=["accounts/fireworks/models/qwen3-8b"])
    """Resource name of the model the service was made with; the preflight compares it."""
    hot_load_transition_type: Literal["ASYNC", "SYNC"] | None = None
    """How the service is expected to swap; the preflight warns of another. Agents are told it."""
    reset_prompt_cache: Literal["all", "new_session", "none"] = "all"
    """Whose cached prompts are recomputed after a load: all, those of new sessions, or none."""
    extra_fields_ignore: tuple[str, ...] = ()
    """Top-level keys of config.json the service leaves out when it compares snapshot and base."""
    hint_body_template: dict[str, JsonValue] | None = None
    """Posted per file, {identity} {file} {uri} {size} {kind} {previous} filled in; empty: none."""

    agents: tuple[str, ...] = Field((), examples=[["http://10.0.0.7:8700"], ["agents.local:8700"]])
    """Agents of your own fleet, each by address or all by a name in the DNS: no door is asked."""
    quorum: float = Field(1.0, gt=0, le=1)
    """Share of the agents that a signal needs; others load later what they missed."""
    store: CheckpointStore | None = None
    """The bucket that the agents follow; a cycle file's `store` unless it is said here."""

    @model_validator(mode="after")
    def _agents_are_complete(self) -> Self:
        if not self.agents:
            if self.quorum != 1:
                raise ValueError("quorum: it is of agents; a door has its own, `--quorum`")
            return self
        if self.store is None:
            raise ValueError("agents: they follow a store; name it in `store`")
        if self.account.dialect != "fireworks":
            raise ValueError("agents: the account's dialect is of a door, and none is asked")
        self._addresses()
        return self

    def open(self) -> HotLoadClient:
        """Open the client; it connects anew for every call."""
        access, more = self.account.access(self), dict[str, Any]()
        if self.agents:
            access = replace(
                access, base_url=access.base_url or ORIGIN, api_key=access.api_key or NO_KEY
            )
            more["transport"] = self._door(access)
        return open_service(
            access,
            base_model=self.base_model,
            hot_load_transition_type=self.hot_load_transition_type,
            reset_prompt_cache=self.reset_prompt_cache,
            extra_fields_ignore=self.extra_fields_ignore,
            hint_body_template=self.hint_body_template,
            **more,
        )

    def _addresses(self) -> Addresses:
        names = [one for one in self.agents if "://" not in one]
        if len(names) > 1:
            raise ValueError(f"agents: found the names {', '.join(names)}, expected one of them")
        return Addresses([one for one in self.agents if "://" in one], *names)

    def _door(self, access: Access) -> InProcessDoor:
        assert self.store is not None
        store = self.store.open()
        return InProcessDoor(
            DoorConfig(
                bucket=store.url,
                bucket_options=store.options,
                base_model_name=self.base_model,
                account_id=access.account_id,
                model_id=access.model_id,
                deployment_id=access.deployment_id,
                transition=self.hot_load_transition_type or "ASYNC",
                addresses=self._addresses(),
                quorum=self.quorum,
            ),
            store,
        )
