"""The document of a hot-load service: names, address and key, and what opens the client."""

from __future__ import annotations

from typing import Literal

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, JsonValue, SecretStr, field_validator

from hotload.clients.access import RESOURCE_ID, check_origin
from hotload.clients.service import HotLoadClient
from hotload.publish import fireworks_names


class HotLoadService(Block):
    """An inference service whose weights are replaced while it serves."""

    _block_type_name = "Hot-Load Service"
    _block_type_slug = "hot-load-service"
    _description = "An inference service that loads new weights while it serves."

    # The UI makes a paragraph of every line break, so fields are described in one line each.
    model_config = ConfigDict(use_attribute_docstrings=True)

    account_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """Account that owns model and service."""
    model_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """The base model, as the service names it."""
    deployment_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """The service, in the vendor's word; it exists beforehand, with hot-loading switched on."""
    base_url: str | None = Field(None, examples=[fireworks_names.BASE_URL])
    """Origin of the API. Empty takes FIREWORKS_BASE_URL, or else the vendor's."""
    api_key: SecretStr = SecretStr("")
    """Empty takes FIREWORKS_API_KEY from the environment. An inference-only key is not enough."""
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

    @field_validator("base_url")
    @classmethod
    def _origin(cls, url: str | None) -> str | None:
        return None if url is None else check_origin(url)

    def open(self) -> HotLoadClient:
        """Open the client; it connects anew for every call."""
        return HotLoadClient(
            account_id=self.account_id,
            model_id=self.model_id,
            deployment_id=self.deployment_id,
            base_url=self.base_url,
            api_key=self.api_key.get_secret_value(),
            base_model=self.base_model,
            hot_load_transition_type=self.hot_load_transition_type,
            reset_prompt_cache=self.reset_prompt_cache,
            extra_fields_ignore=self.extra_fields_ignore,
            hint_body_template=self.hint_body_template,
        )
