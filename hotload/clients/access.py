"""Access to the API: its origin, the key, TLS, and the form of names in it."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from hotload.errors import ServiceRefusedError
from hotload.publish import fireworks_names
from hotload.publish.doors.api_dialect import API_DIALECTS, ApiDialect, ApiDialectName
from hotload.publish.workspace import Workspace

RESOURCE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MODEL_ID = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"


@cache
def tls_context() -> ssl.SSLContext:
    """Make the one context of all clients: making it costs more than a request."""
    return httpx.create_ssl_context()


def check_origin(url: str) -> str:
    """Return the address without a trailing slash, if it is an http or https origin.

    Raises:
        ValueError: another scheme, credentials, a query, or nothing at all.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an http or https address")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("expected an address without credentials, query or fragment")
    return url.rstrip("/")


def check_model_id(model_id: str, api: ApiDialect) -> None:
    """Return if the API takes the model's name.

    Raises:
        ValueError: it has a slash in it, and the API makes a resource's name of it.
    """
    if api.names_are_resources and "/" in model_id:
        raise ValueError(f"model_id {model_id!r} is more than a name of this dialect")


@dataclass(frozen=True, slots=True)
class Access:
    """Names one model on one service, the API's address, and the key; may be pickled.

    Without `base_url` and `api_key` the environment's are taken, by the names of the dialect
    (FIREWORKS_BASE_URL, FIREWORKS_API_KEY), at the moment of a call. `block` names the document
    that all this is from, `hot-load-service/default` for example; it stands in errors.
    """

    account_id: str
    model_id: str
    deployment_id: str
    base_url: str | None = None
    api_key: str = field(default="", repr=False)
    block: str = ""
    dialect: ApiDialectName = "fireworks"

    @property
    def api(self) -> ApiDialect:
        """How this service spells headers, names, paths and formats."""
        return API_DIALECTS[self.dialect]

    def origin(self, operation: str) -> str:
        """Find the API's address: `base_url`, else the environment's, else the vendor's.

        Raises:
            ServiceRefusedError: the address is not an origin.
        """
        variable = self.api.base_url_variable
        environment = os.environ.get(variable) if variable else None
        try:
            return check_origin(self.base_url or environment or self.api.base_url)
        except ValueError as error:
            source = variable if environment and not self.base_url else "base_url"
            reason = f"{source}: {error}"
            raise ServiceRefusedError(operation, None, reason, self.remedy(None)) from None

    def key(self, operation: str) -> str:
        """Return the key itself, else that of the environment, if there is one that can be sent.

        Raises:
            ServiceRefusedError: none, or with characters httpx would refuse, showing the key.
        """
        key = self.api_key or os.environ.get(self.api.key_variable, "")
        if not key:
            raise ServiceRefusedError(operation, None, "no API key", self.remedy(401))
        if not (key.isascii() and key.isprintable() and " " not in key):
            reason = "the API key has characters that no key has, a line end perhaps"
            raise ServiceRefusedError(operation, None, reason, self.remedy(401))
        return key

    def remedy(self, status_code: int | None) -> str:
        """Advise the operator on an answer that is no good, None for no answer: one text for the
        check of a block and for the error that a cycle ends with."""
        match status_code:
            case 400:
                what = "compare dialect, model and deployment with what the service asks for"
            case 401:
                what = (
                    f"use a key of this account, as api_key or in {self.api.key_variable};"
                    " to publish, an inference-only key is not enough"
                )
            case 402:
                what = f"settle the billing of account {self.account_id}"
            case 403:
                what = f"give the key's owner rights on {self.deployment()}"
            case 404:
                what = "compare account, model and deployment with the vendor's names"
            case 412:
                what = f"see at the vendor's whether {self.deployment()} is suspended"
            case _:
                what = "compare base_url, and see whether the service is up or swapping weights"
        return f"For {self.source}: {what}"

    @property
    def source(self) -> str:
        """The block that all this is from, for a person."""
        return f"block {self.block}" if self.block else "the account block"

    @property
    def service(self) -> str:
        """Name the service among those that load from one store; also a path below a directory."""
        return f"{self.account_id}/{self.deployment_id}"

    def workspace(self, work_dir: Path) -> Workspace:
        """Return where a publisher to this service keeps its files below `work_dir`."""
        return Workspace(work_dir, self.account_id, self.deployment_id)

    def model(self) -> str:
        """Name the model as the service does, by default as a resource."""
        if not self.api.names_are_resources:
            return self.model_id
        return fireworks_names.model_name(self.account_id, self.model_id)

    def deployment(self) -> str:
        """Name the service as it does itself, by default as a resource."""
        if not self.api.names_are_resources:
            return self.deployment_id
        return fireworks_names.deployment_name(self.account_id, self.deployment_id)

    def names(self) -> dict[str, str]:
        """Name model and service in the headers of a request, where the API has them (protocol
        §2)."""
        named = {
            self.api.model_header: self.model(),
            self.api.deployment_header: self.deployment(),
        }
        return {header: name for header, name in named.items() if header}
