"""The trainer's trigger against a server that is away, busy, of another kind, or asks for a key."""

import asyncio
import json
import socket
from typing import Any

import pytest

from hotload.clients.trigger import CycleRun, publish
from hotload.errors import ProtocolError, ServiceRefusedError, ServiceUnavailableError
from hotload.spec import CycleSpec
from tests.scripted_server import Reply, ScriptedServer, http

CYCLE: dict[str, Any] = {
    "checkpoint": "/c",
    "run_id": "r",
    "policy_version": 1,
    "work_dir": "/w",
    "problems": {"dataset": "/d"},
}
SPEC = CycleSpec.model_validate(CYCLE).model_dump(mode="json")
FOUND = http(json.dumps({"id": "d-1"}).encode())
PASSWORD = "hush-hush"

pytestmark = pytest.mark.server


def run(state: str, *, status: int = 200) -> bytes:
    facts = {"id": "f-1", "name": "r-000001", "parameters": {"spec": SPEC}}
    kind = state.upper() if state in ("Completed", "Failed", "Running") else "COMPLETED"
    return http(json.dumps(facts | {"state": {"type": kind, "name": state}}).encode(), status)


async def published(*replies: Reply, **options: Any) -> tuple[CycleRun, list[Any]]:
    async with ScriptedServer(*replies).running() as server:
        url = f"{server.address}/api/"
        ended = await asyncio.to_thread(publish, url, CYCLE, **options)
    return ended, server.requests


async def test_a_cycle_is_triggered_and_awaited() -> None:
    ended, asked = await published(FOUND, run("Running", status=201), run("Running"), run("Failed"))
    assert (ended.name, ended.state, ended.is_completed) == ("r-000001", "Failed", False)
    assert [one.path for one in asked] == [
        "/api/deployments/name/checkpoint-to-rollout/served",
        "/api/deployments/d-1/create_flow_run",
        "/api/flow_runs/f-1",
        "/api/flow_runs/f-1",
    ]
    body = asked[1].body
    assert body["idempotency_key"] == "cycle/checkpoint-to-rollout/served/r-000001/1"
    assert body["parameters"] == {"spec": SPEC}


async def test_without_a_wait_it_is_returned_as_it_stands() -> None:
    ended, asked = await published(FOUND, run("Running"), wait=False)
    assert not ended.has_ended
    assert len(asked) == 2


async def test_a_busy_server_is_asked_again() -> None:
    busy = http(b'{"exception_message": "database is locked"}', 503)
    ended, asked = await published(busy, FOUND, busy, run("AlreadyServed"))
    assert (ended.state, ended.is_completed) == ("AlreadyServed", True)
    assert len(asked) == 4


async def test_what_cannot_pass_ends_at_once() -> None:
    detail = http(b'{"detail": "spec: no such field"}', 409)
    with pytest.raises(ServiceRefusedError, match=r"HTTP 409: .*no such field"):
        await published(FOUND, detail)
    with pytest.raises(ServiceRefusedError, match="HTTP 401"):
        await published(http(b"{}", 401))


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]"])
async def test_an_answer_of_another_kind_is_one_error(answer: bytes) -> None:
    with pytest.raises(ProtocolError, match="not an answer of Prefect's"):
        await published(http(answer))


def test_a_server_that_is_not_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", f"me:{PASSWORD}")
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://me:{PASSWORD}@127.0.0.1:{reserved.getsockname()[1]}/api"
        with pytest.raises(ServiceUnavailableError, match="the same call finds it") as raised:
            publish(url, CYCLE, patience_seconds=0.0)
    assert PASSWORD not in str(raised.value)


async def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", PASSWORD)
    _, asked = await published(FOUND, run("Completed"))
    assert asked[0].headers["authorization"] == f"Bearer {PASSWORD}"
    with pytest.raises(ServiceRefusedError) as raised:
        await published(http(f'{{"detail": "bad key {PASSWORD}"}}'.encode(), 403))
    assert PASSWORD not in str(raised.value)


def test_what_is_no_cycle_is_not_sent() -> None:
    with pytest.raises(ValueError, match="policy_version"):
        publish("http://127.0.0.1:9/api", CYCLE | {"policy_version": -1})
