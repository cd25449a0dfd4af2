"""What a hot-load service is called and shows of itself."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.loading.disk import Transition
from hotload.clients.access import check_origin
from hotload.publish.doors.api_dialect import API_DIALECTS, ApiDialect, ApiDialectName
from hotload.publish.fireworks_names import deployment_name, model_name


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """A service's bucket, names and key, and how its replicas swap weights."""

    bucket: str
    bucket_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    bucket_type: str = "S3"
    base_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    account_id: str = "local"
    model_id: str = "policy"
    deployment_id: str = "rollouts"
    transition: Transition = "ASYNC"
    dialect: ApiDialectName = "fireworks"

    @property
    def api(self) -> ApiDialect:
        """How the door spells headers, names, paths and formats."""
        return API_DIALECTS[self.dialect]

    @property
    def model(self) -> str:
        """Name of the model at this door."""
        if not self.api.names_are_resources:
            return self.model_id
        return model_name(self.account_id, self.model_id)

    @property
    def deployment(self) -> str:
        """Name of the service at this door."""
        if not self.api.names_are_resources:
            return self.deployment_id
        return deployment_name(self.account_id, self.deployment_id)

    @property
    def base(self) -> str:
        """Resource name of the base model, as the deployment shows it."""
        return self.base_model_name or f"accounts/{self.account_id}/models/base"


def address(text: str) -> str:
    """Parse the address of a server."""
    try:
        return check_origin(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def time_span(text: str) -> float:
    """Parse a time in seconds, more than none."""
    found = float(text)
    if not (math.isfinite(found) and found > 0):
        raise ArgumentTypeError(f"expected seconds above 0, not {text}")
    return found


def positive_count(text: str) -> int:
    """Parse a number of things, one at least."""
    if (found := int(text)) < 1:
        raise ArgumentTypeError(f"expected 1 or more, not {text}")
    return found


def key_and_value(text: str) -> tuple[str, str]:
    """Parse an option of the file system that a bucket lies in."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ArgumentTypeError("expected KEY=VALUE")
    return key, value


def add_addresses(parser: ArgumentParser, option: str, each: str) -> None:
    """Let a command line list agents, each by `option`, or all by its plural and a name."""
    add = parser.add_argument
    add(option, action="append", default=[], type=address, metavar="URL", help=each)
    add(f"{option}s", metavar="HOST:PORT", help="a name in the DNS that all of them answer to")


def add_names(parser: ArgumentParser) -> None:
    """Let a command line take the bucket and the names of a service."""
    add = parser.add_argument
    add("--bucket", required=True, metavar="URL", help="the service's bucket: s3://, gs://, a path")
    pair, shown = key_and_value, "KEY=VALUE"
    add("--bucket-option", action="append", default=[], type=pair, metavar=shown, help="of fsspec")
    for name in ("account", "deployment"):
        default = getattr(FleetConfig, f"{name}_id")
        add(f"--{name}", default=default, metavar="ID", help="of the service (%(default)s)")
