"""The document of an account: one model on one service, where the API is, and the key to it."""

from __future__ import annotations

from typing import Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

from hotload.clients.access import MODEL_ID, RESOURCE_ID, Access, check_model_id, check_origin
from hotload.publish import fireworks_names
from hotload.publish.doors.api_dialect import API_DIALECTS, ApiDialectName


class InferenceAccount(Block):
    """Whose model is served, by which service, where the API is, and the key to it."""

    _block_type_name = "Inference Account"
    _block_type_slug = "inference-account"
    _description = "One model on one inference service, with the API's address and key."

    # The UI makes a paragraph of every line break, so fields are described in one line each.
    model_config = ConfigDict(use_attribute_docstrings=True)

    account_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """Account that owns model and service."""
    model_id: str = Field(pattern=MODEL_ID, max_length=128)
    """The base model, as the service names it; a slash in it needs the dialect `plain`."""
    deployment_id: str = Field(pattern=RESOURCE_ID, max_length=128)
    """The service, in the vendor's word; it exists beforehand, with hot-loading switched on."""
    base_url: str | None = Field(None, examples=[fireworks_names.BASE_URL])
    """Origin of the API. Empty takes FIREWORKS_BASE_URL, or else the vendor's own."""
    api_key: SecretStr = SecretStr("")
    """Empty takes FIREWORKS_API_KEY, at CoreWeave COREWEAVE_API_TOKEN. It needs control rights."""

    dialect: ApiDialectName = "fireworks"
    """Which API it is; `plain` is a door without a control plane (protocol §22, §23)."""

    @model_validator(mode="after")
    def _names_one_model(self) -> Self:
        check_model_id(self.model_id, API_DIALECTS[self.dialect])
        return self

    @field_validator("base_url")
    @classmethod
    def _origin(cls, url: str | None) -> str | None:
        return None if url is None else check_origin(url)

    def access(self, holder: Block) -> Access:
        """Return what the clients need of it; errors name `holder`, the block that asks."""
        name = holder._block_document_name
        return Access(
            self.account_id,
            self.model_id,
            self.deployment_id,
            self.base_url,
            self.api_key.get_secret_value(),
            dialect=self.dialect,
            block=f"{holder.get_block_type_slug()}/{name}" if name else "",
        )
