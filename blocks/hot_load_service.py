"""The document of a hot-load service: how it is announced to, and what opens the client."""

from __future__ import annotations

from typing import Literal

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, JsonValue

from blocks.account import InferenceAccount
from hotload.clients.service import HotLoadClient, open_service


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
    """How the service is expected to swap weights; the preflight warns when it does otherwise."""
    reset_prompt_cache: Literal["all", "new_session", "none"] = "all"
    """Whose cached prompts are recomputed after a load: all, those of new sessions, or none."""
    extra_fields_ignore: tuple[str, ...] = ()
    """Top-level keys of config.json the service leaves out when it compares snapshot and base."""
    hint_body_template: dict[str, JsonValue] | None = None
    """Posted per file, {identity} {file} {uri} {size} {kind} {previous} filled in; empty: none."""

    def open(self) -> HotLoadClient:
        """Open the client; it connects anew for every call."""
        return open_service(
            self.account.access(self),
            base_model=self.base_model,
            hot_load_transition_type=self.hot_load_transition_type,
            reset_prompt_cache=self.reset_prompt_cache,
            extra_fields_ignore=self.extra_fields_ignore,
            hint_body_template=self.hint_body_template,
        )
