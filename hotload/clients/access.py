"""Access to the API: its origin, the key, TLS, and the form of names in it."""

from __future__ import annotations

import os
import ssl
from functools import cache
from urllib.parse import urlsplit

import httpx

from hotload.errors import (
    ServiceRefusedError,
)
from hotload.publish import fireworks_names

RESOURCE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


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


def origin_of(base_url: str | None, operation: str) -> str:
    """Find the API's address: `base_url`, else the environment's, else the vendor's.

    Raises:
        ServiceRefusedError: the address is not an origin.
    """
    variable = fireworks_names.BASE_URL_VARIABLE
    try:
        return check_origin(base_url or os.environ.get(variable) or fireworks_names.BASE_URL)
    except ValueError as error:
        source = "base_url" if base_url else variable
        raise ServiceRefusedError(operation, None, f"{source}: {error}") from None


def key_of(api_key: str, operation: str) -> str:
    """Return the key itself, else that of the environment, if there is one that can be sent.

    Raises:
        ServiceRefusedError: none, or with characters httpx would refuse, showing the key.
    """
    key = api_key or os.environ.get(fireworks_names.API_KEY_VARIABLE, "")
    if not key:
        reason = f"no API key: set the block's api_key or {fireworks_names.API_KEY_VARIABLE}"
        raise ServiceRefusedError(operation, None, reason)
    if not (key.isascii() and key.isprintable() and " " not in key):
        reason = "the API key has characters that no key has, a line end perhaps"
        raise ServiceRefusedError(operation, None, reason)
    return key
