"""The document of a checkpoint store: where the bucket is, and what opens it."""

from __future__ import annotations

from prefect.blocks.core import Block
from prefect.types import SecretDict
from pydantic import ConfigDict, Field, field_validator

from hotload.clients.store import Store, check_url


class CheckpointStore(Block):
    """The bucket through which snapshots reach the inference service.

    Everything below its url belongs to the services that load from it: snapshots by identity, and
    hotload's own records below `_hotload/`. Credentials come from the environment unless
    `options` names them.
    """

    _block_type_name = "Checkpoint Store"
    _block_type_slug = "checkpoint-store"
    _description = "The bucket (file, S3, GCS) through which snapshots reach a hot-load service."

    model_config = ConfigDict(use_attribute_docstrings=True)

    url: str = Field(
        examples=["s3://bucket/account/account-deployment", "gs://bucket", "file:///data/store"]
    )
    """The services' bucket, which exists: s3://, gs://, file:// or an absolute path, memory://."""
    options: SecretDict = SecretDict({})
    """fsspec options, kept secret: endpoint_url, key, secret, token; empty: the environment's."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        return check_url(url)

    def open(self) -> Store:
        """Open the client; it connects at its first call."""
        return Store(self.url, self.options.get_secret_value())
