"""Stores of every kind with a directory of their own, and a server that answers anything."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.scripted_server import ScriptedServer

if TYPE_CHECKING:
    # Importing Prefect reads the environment, which tests/servers.py sets only after this file.
    from hotload.clients.store import Store

# Where `make test-stores` says which store it started; every test run removes AWS_ variables.
GIVEN_URL, GIVEN_OPTIONS = "HOTLOAD_TEST_STORE_URL", "HOTLOAD_TEST_STORE_OPTIONS"
GIVEN = (
    [pytest.param("given", marks=[pytest.mark.stores, pytest.mark.server])]
    if GIVEN_URL in os.environ
    else []
)

S3, GS = (pytest.param(kind, marks=pytest.mark.server) for kind in ("s3", "gs"))


def _bucket(kind: str, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    if kind == "file":
        return f"file://{request.getfixturevalue('tmp_path')}", {}
    if kind == "memory":
        return "memory://bucket", {}
    if kind == "given":
        return os.environ[GIVEN_URL], json.loads(os.environ.get(GIVEN_OPTIONS, "{}"))
    server = request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[kind])
    return server.url, dict(server.options)


def make_store(kind: str, request: pytest.FixtureRequest) -> Store:
    """A store of `kind` with a fresh directory of its own in that kind's bucket."""
    from hotload.clients.store import Store

    url, options = _bucket(kind, request)
    url = f"{url}/{uuid.uuid4().hex}"
    if kind == "file":
        os.mkdir(url.removeprefix("file://"))
    return Store(url=url, options=options)


@pytest.fixture(params=["file", "memory", S3, GS, *GIVEN])
def store(request: pytest.FixtureRequest) -> Store:
    """The contract suite runs once per kind of store."""
    return make_store(request.param, request)


@pytest.fixture(params=[S3, *GIVEN])
def s3_store(request: pytest.FixtureRequest) -> Store:
    """A store that speaks S3."""
    return make_store(request.param, request)


@pytest.fixture(params=[GS])
def gs_store(request: pytest.FixtureRequest) -> Store:
    """A store that speaks GCS."""
    return make_store(request.param, request)


@pytest.fixture
def file_store(request: pytest.FixtureRequest) -> Store:
    """A store that is a directory."""
    return make_store("file", request)


@pytest.fixture
async def raw_server() -> AsyncIterator[ScriptedServer]:
    """A hand-written HTTP server for answers no proper server gives."""
    async with ScriptedServer().running() as raw:
        yield raw
