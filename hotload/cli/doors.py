"""What commands open on the network: a store, and services that load from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotload.cli.refusals import UsageError

if TYPE_CHECKING:
    from hotload.clients.service.client import HotLoadClient
    from hotload.clients.store.store import Store

# A model may have a name with slashes in it, so that it takes what is between the two others.
SERVICE = re.compile(r"(?:([a-z]+):)?([^/@:\s]+)/([^@\s]+)/([^/@\s]+)(?:@(https?://\S+))?")


@contextmanager
def clients_needed() -> Iterator[None]:
    """Say what to install where the wheel was installed without its clients.

    Raises:
        UsageError: a package is missing.
    """
    try:
        yield
    except ImportError as error:
        needed = f"the package {error.name!r} is not installed"
        raise UsageError(f'{needed}, expected `pip install "hotload[clients]"`') from None


def open_store(url: str) -> Store:
    """Open the store at a URL or a path, which may be relative.

    Raises:
        UsageError: it is no URL of a store.
    """
    from hotload.clients.store.store import Store

    try:
        return Store(url if "://" in url else str(Path(url).absolute()))
    except ValueError as error:
        raise UsageError(f"the URL of the store: {error}") from None


def open_services(named: Sequence[str]) -> list[HotLoadClient]:
    """Open the services [DIALECT:]ACCOUNT/MODEL/DEPLOYMENT, each perhaps with @URL; keys are the
    environment's.

    Raises:
        UsageError: one is of another form.
    """
    services = []
    for text in named:
        form = SERVICE.fullmatch(text)
        if form is None:
            expected = "[DIALECT:]ACCOUNT/MODEL/DEPLOYMENT, perhaps with @http(s)://… behind it"
            raise UsageError(f"--service: found {text!r}, expected {expected}")
        dialect, account, model, deployment, url = form.groups()
        declared = {"account_id": account, "model_id": model, "deployment_id": deployment}
        optional = {"base_url": url, "dialect": dialect}
        declared |= {name: value for name, value in optional.items() if value}
        services.append(_open_service(declared, "--service"))
    return services


def open_declared(path: Path) -> tuple[HotLoadClient, Store | None]:
    """Open the service of a cycle file, and its store, if that is declared in the file.

    Raises:
        UsageError: the file is no cycle file, or names a service that it does not declare.
    """
    from hotload.cli.cycle_file import read_cycle_file
    from hotload.clients.store.store import Store

    try:
        cycle, inline = read_cycle_file(path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    service, store = inline.get("service"), inline.get("store")
    if isinstance(service, dict) and service.get("agents"):
        asked = "ask each of them, `curl http://AGENT/agent`"
        raise UsageError(f"{path}: the service is agents without a door: {asked}")
    account = inline.get("account") or (isinstance(service, dict) and service.get("account"))
    if not isinstance(account, dict):
        name = cycle.get("service", "default")
        found = f"found no account below `blocks:`, and the service {name!r}"
        expected = "expected one in the file, or --service: blocks on a Prefect server are not read"
        raise UsageError(f"{path}: {found}, {expected}")
    client = _open_service(account, f"{path}: blocks.account")
    if not isinstance(store, dict):
        return client, None
    try:
        return client, Store(str(store.get("url")), dict(store.get("options") or {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: blocks.store: {error}") from None


def _open_service(declared: Mapping[str, Any], where: str) -> HotLoadClient:
    """The client of an account as it is declared; no value is shown that may be a key."""
    from hotload.clients.access import MODEL_ID, RESOURCE_ID, Access, check_model_id, check_origin
    from hotload.clients.service.doors import open_service
    from hotload.publish.doors.api_dialect import API_DIALECTS

    known = {field.name for field in fields(Access)} - {"block"}
    wrong = declared.keys() - known or [
        name for name, value in declared.items() if not isinstance(value, str)
    ]
    if wrong:
        expected = f"texts named {', '.join(sorted(known))}"
        raise UsageError(f"{where}: found {sorted(map(str, wrong))}, expected {expected}")
    patterns = {"account_id": RESOURCE_ID, "model_id": MODEL_ID, "deployment_id": RESOURCE_ID}
    for name, pattern in patterns.items():
        if not re.fullmatch(pattern, declared.get(name, "")):
            found = declared.get(name, "none")
            raise UsageError(f"{where}: found {name} {found!r}, expected letters, digits and . _ -")
    dialect = declared.get("dialect", "fireworks")
    if dialect not in API_DIALECTS:
        expected = " or ".join(API_DIALECTS)
        raise UsageError(f"{where}: found dialect {dialect!r}, expected {expected}")
    try:
        check_model_id(declared["model_id"], API_DIALECTS[dialect])
        if declared.get("base_url"):
            check_origin(declared["base_url"])
    except ValueError as error:
        raise UsageError(f"{where}: {declared['deployment_id']}: {error}") from None
    return open_service(Access(**declared))
