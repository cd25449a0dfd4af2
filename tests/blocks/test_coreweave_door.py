"""CoreWeave's hot-loads (protocol §23): our client against the emulator's mode and bare answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from blocks.account import InferenceAccount
from blocks.hot_load_service import HotLoadService
from emulator.control.settings import EmulatorConfig
from emulator.server import RunningEmulator
from examples.tiny_trainer import TinyTrainer
from hotload.clients.access import Access
from hotload.clients.service.doors import CoreWeaveClient
from hotload.errors import (
    ProtocolError,
    ServiceRefusedError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.identity import SnapshotKind
from hotload.publish.doors.coreweave import HOT_LOADS_PATH, hot_load_body, hot_load_id
from hotload.publish.readiness import Verdict, assess, what_is_missing
from hotload.publish.snapshot import SnapshotManifest
from tests.factories import snapshot_manifest
from tests.waiting import PATIENCE_SECONDS, until

KEY = "key-that-must-not-be-shown"
NAMES = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
DELTA = {"kind": SnapshotKind.DELTA, "previous": "id-1"}


def delta(identity: str, previous: str) -> SnapshotManifest:
    """The manifest of a delta, as far as a signal reads it."""
    return snapshot_manifest(identity, kind=SnapshotKind.DELTA, previous=previous)


@pytest.fixture
def door(
    tmp_path: Path, emulators: Callable[[EmulatorConfig], RunningEmulator]
) -> Iterator[RunningEmulator]:
    """An emulator with CoreWeave's door; its bucket holds its base model as id-1 and id-2."""
    base, bucket = tmp_path / "base", tmp_path / "bucket"
    TinyTrainer().save(base)
    for identity in ("id-1", "id-2"):
        shutil.copytree(base, bucket / identity)
    (bucket / "id-2" / "model.weight.spec.json").unlink()  # Fireworks' own: not asked for here
    config = EmulatorConfig(
        bucket=bucket.as_uri(),
        base_model=base,
        replica_count=2,
        api_key=KEY,
        dialect="coreweave",
        **NAMES,  # type: ignore[arg-type]
    )
    with emulators(config) as running:
        yield running


def access(door: RunningEmulator, **changes: Any) -> Access:
    return Access(
        **{"base_url": door.url, "api_key": KEY, "dialect": "coreweave", **NAMES, **changes}
    )


async def served(service: CoreWeaveClient, identity: str) -> bool:
    async def is_ready() -> bool:
        status = await service.observe()
        return assess(status, identity, SnapshotKind.FULL).verdict is Verdict.READY

    return await until(is_ready)


def test_the_documents_open_its_client() -> None:
    account = InferenceAccount(api_key=KEY, dialect="coreweave", **NAMES)
    service = HotLoadService(account=account).open()
    assert isinstance(service, CoreWeaveClient)
    assert service.access.origin("observe") == "https://api.coreweave.com"


def test_the_vendors_address_and_key_stay_the_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREWORKS_BASE_URL", "https://fireworks.test")
    monkeypatch.setenv("FIREWORKS_API_KEY", "fireworks-key")
    there = Access(dialect="coreweave", **NAMES)
    assert there.origin("observe") == "https://api.coreweave.com"
    with pytest.raises(ServiceRefusedError, match="COREWEAVE_API_TOKEN"):
        there.key("observe")
    monkeypatch.setenv("COREWEAVE_API_TOKEN", "coreweave-key")
    assert there.key("observe") == "coreweave-key"


async def test_a_snapshot_is_loaded_and_every_replica_shown(door: RunningEmulator) -> None:
    service = CoreWeaveClient(access(door))
    before = await service.observe()
    assert before.describe() == "base weights, before the first load"
    assert what_is_missing(before, "run-000001", 2) is None
    await service.signal(snapshot_manifest("id-1"))
    assert await served(service, "id-1")
    assert len((await service.observe()).replicas) == 2
    await service.signal(snapshot_manifest("id-2"))
    assert await served(service, "id-2")


async def test_a_load_is_never_begun_twice(door: RunningEmulator) -> None:
    service = CoreWeaveClient(access(door))
    await service.signal(snapshot_manifest("id-1"))
    await service.signal(snapshot_manifest("id-1"))
    assert await served(service, "id-1")
    with pytest.raises(SnapshotRejectedError, match="loads id-1"):
        await service.signal(delta("id-1", "id-0"))  # the same name for something else
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS) as client:
        log = (await client.get(f"{door.url}/emulator/log")).json()
    assert [one["result"] for one in log["signals"]] == ["accepted"]


async def test_what_the_service_refuses_is_a_rejection(door: RunningEmulator) -> None:
    service = CoreWeaveClient(access(door))
    with pytest.raises(SnapshotRejectedError, match="not in the bucket"):
        await service.signal(snapshot_manifest("id-9"))
    with pytest.raises(SnapshotRejectedError, match="not in the ledger"):
        await service.signal(delta("id-2", "id-1"))
    adapter = snapshot_manifest("id-1", kind=SnapshotKind.LORA)
    with pytest.raises(SnapshotRejectedError, match="no adapters"):
        await service.signal(adapter)


async def test_the_check_reads_the_deployment(door: RunningEmulator, tmp_path: Path) -> None:
    lines = await CoreWeaveClient(access(door)).check((tmp_path / "bucket").as_uri())
    assert {line.name: line.ok for line in lines} == {
        "key": True,
        "status": True,
        "hot load": True,
        "bucket": True,
        "transition": True,
        "base model": True,
        "state": True,
    }
    wrong = CoreWeaveClient(access(door, deployment_id="elsewhere"))
    with pytest.raises(ServiceRefusedError, match="deployment not found"):
        await wrong.observe()
    with pytest.raises(ServiceRefusedError, match="HTTP 401"):
        await CoreWeaveClient(access(door, api_key="another")).observe()
    with pytest.raises(ServiceRefusedError, match="no ledger"):
        await wrong.reset_ledger()


@pytest.mark.parametrize(
    "fields",
    [
        {"reset_prompt_cache": "new_session"},
        {"extra_fields_ignore": ("x",)},
        {"hint_body_template": {"file": "{file}"}},
    ],
)
def test_what_the_api_has_no_word_for_is_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ServiceRefusedError, match=f"{name}: found .* cannot be told"):
        CoreWeaveClient(Access(dialect="coreweave", **NAMES), **fields)


def test_a_body_is_in_the_words_of_the_api() -> None:
    made = hot_load_body("rollouts", delta("id-2", "id-1"), "none")
    assert made == {
        "deploymentId": "rollouts",
        "hotLoadId": hot_load_id("rollouts", "id-2"),
        "identity": "id-2",
        "type": "SNAPSHOT_TYPE_INCREMENTAL",
        "promptCachePolicy": "PROMPT_CACHE_POLICY_PRESERVE",
        "incrementalSnapshotMetadata": {
            "previousSnapshotIdentity": "id-1",
            "compressionFormat": "COMPRESSION_FORMAT_ZSTD",
            "checksumFormat": "CHECKSUM_FORMAT_ADLER32",
        },
    }
    assert hot_load_id("rollouts", "id-2") != hot_load_id("elsewhere", "id-2")


# What the emulator never answers, from answers made by hand.

Answers = Mapping[str, tuple[int, Any]]


def scripted(answers: Answers) -> CoreWeaveClient:
    """A client whose calls are answered by method and path."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode().partition("?")[0]
        status, body = answers[f"{request.method} {path.removeprefix(HOT_LOADS_PATH)}"]
        return httpx.Response(status, json=body)

    there = Access(base_url="http://door", api_key=KEY, dialect="coreweave", **NAMES)
    return replace(CoreWeaveClient(there), transport=httpx.MockTransport(answer))


def showing(state: object, *replicas: object) -> CoreWeaveClient:
    """A client whose newest load is of id-2, in this state, with these replicas."""
    load = {"spec": {"id": "L", "identity": "id-2"}, "status": {"state": state}}
    return scripted(
        {
            "GET ": (200, {"hotLoads": [load]}),
            "GET /L/replicas": (200, {"replicas": list(replicas)}),
        }
    )


def row(state: object, identity: str = "id-2") -> dict[str, Any]:
    return {"name": "r", "state": state, "currentSnapshotIdentity": identity}


@pytest.mark.parametrize(
    ("state", "replicas", "verdict"),
    [
        ("HOT_LOAD_STATE_COMPLETED", [row("READY"), row("READY")], Verdict.READY),
        (3, [row(3)], Verdict.READY),  # enums may be numbers
        ("COMPLETED", [row("READY"), row("READY", "id-1")], Verdict.WAITING),
        ("COMPLETED", [row("READY", "initial")], Verdict.LOST),
        ("COMPLETED", [row("READY", "")], Verdict.LOST),
        ("COMPLETED", [], Verdict.WAITING),
        ("IN_PROGRESS", [row("READY")], Verdict.WAITING),  # others may not be listed yet
        ("IN_PROGRESS", [row("READY", "id-1")], Verdict.WAITING),
        ("PENDING", [], Verdict.WAITING),
        ("SOMETHING_NEW", [row("READY")], Verdict.WAITING),
        ("COMPLETED", [row("SOMETHING_NEW")], Verdict.WAITING),
        ("IN_PROGRESS", [row("UPDATING", "id-1"), row("ERROR", "id-1")], Verdict.FAILED),
        ("FAILED", [row("READY", "id-1")], Verdict.FAILED),
        ("FAILED", [], Verdict.FAILED),
        ("CANCELED", [row("READY")], Verdict.FAILED),
    ],
)
async def test_only_a_completed_load_on_every_replica_is_ready(
    state: object, replicas: list[object], verdict: Verdict
) -> None:
    status = await showing(state, *replicas).observe()
    assert assess(status, "id-2", SnapshotKind.FULL).verdict is verdict


async def test_a_load_of_somebody_else_s_holds_the_plan() -> None:
    status = await showing("IN_PROGRESS", row("PENDING_UPDATE", "id-1")).observe()
    assert what_is_missing(status, "run-000001", 1) == "a replica is loading id-2"


async def test_the_reason_a_replica_gives_is_shown_without_the_key() -> None:
    failed = row("ERROR") | {"errorReason": f"checksum of w, asked with {KEY}"}
    (one,) = (await showing("FAILED", failed).observe()).replicas
    assert "checksum of w" in one.raw
    assert KEY not in one.raw


async def test_all_pages_of_replicas_are_read_and_pages_end() -> None:
    pages = {"": ["a"], "1": ["b"]}

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/replicas"):
            spec = {"id": "L", "identity": "id-2"}
            return httpx.Response(200, json={"hotLoads": [{"spec": spec, "status": {"state": 3}}]})
        token = request.url.params.get("pageToken", "")
        body: dict[str, Any] = {"replicas": [row("READY") for _ in pages[token]]}
        return httpx.Response(
            200, json=body | ({"nextPageToken": "1"} if is_endless or not token else {})
        )

    there = Access(base_url="http://door", api_key=KEY, dialect="coreweave", **NAMES)
    client = replace(CoreWeaveClient(there), transport=httpx.MockTransport(answer))
    is_endless = False
    assert len((await client.observe()).replicas) == 2
    is_endless = True
    with pytest.raises(ProtocolError, match="do not end"):
        await client.observe()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"code": "failed_precondition", "message": "no chain"}, SnapshotRejectedError),
        (412, {"code": 9, "message": "no chain"}, SnapshotRejectedError),
        (412, {}, SnapshotRejectedError),
        (400, {"code": 9, "message": "already in progress"}, ServiceUnavailableError),
        (400, {"code": 3, "message": "type"}, SnapshotRejectedError),
        (404, {"code": "not_found"}, ServiceRefusedError),
        (403, {"code": "permission_denied"}, ServiceRefusedError),
        (503, {"code": "unavailable"}, ServiceUnavailableError),
    ],
)
async def test_the_code_says_who_must_act(
    status: int, body: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await scripted({"POST ": (status, body)}).signal(snapshot_manifest("id-2"))


@pytest.mark.parametrize("body", [[], {"hotLoads": {}}, {"hotLoads": [{}]}, {"hotLoads": ["x"]}])
async def test_a_list_of_another_form_is_no_status(body: object) -> None:
    with pytest.raises(ProtocolError):
        await scripted({"GET ": (200, body)}).observe()
