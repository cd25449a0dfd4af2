"""The service's client over HTTP: against the emulator, and answers no service should give."""

import json
import logging
import pickle
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from blocks.account import InferenceAccount
from blocks.hot_load_service import HotLoadService
from emulator.control.settings import EmulatorConfig
from emulator.server import RunningEmulator
from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.names import INDEX_FILE, SPEC_FILE
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.clients.service import HotLoadClient
from hotload.directory.shards import open_shard
from hotload.errors import (
    ProtocolError,
    ServiceError,
    ServiceRefusedError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.identity import SnapshotKind
from hotload.publish.readiness import ServiceDescription
from tests.factories import snapshot_manifest
from tests.scripted_server import JSON, Request, ScriptedServer, http, never
from tests.waiting import until

KEY = "fw_s3cr3tServiceKeyForTests"
MODEL = Path(__file__).parents[1] / "emulator" / "fixtures" / "llama"
NAMES = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
HINT = {"identity": "id-1", "file": "a.safetensors", "uri": "s3://b/id-1/a.safetensors",
        "size_bytes": 7, "kind": SnapshotKind.FULL, "previous": None}  # fmt: skip


def client(address: str, **fields: Any) -> HotLoadClient:
    return HotLoadClient(Access(base_url=address, api_key=KEY, **NAMES), **fields)


@pytest.fixture
def start(
    tmp_path: Path, emulators: Callable[[EmulatorConfig], RunningEmulator]
) -> Iterator[Callable[..., RunningEmulator]]:
    """Starts an emulator over a bucket that holds the base model as snapshot id-1."""
    bucket = tmp_path / "bucket"
    shutil.copytree(MODEL, bucket / "id-1")
    with open_shard(MODEL / "model.safetensors") as shard:
        (bucket / "id-1" / INDEX_FILE).write_bytes(build_index([shard.header]))
        (bucket / "id-1" / SPEC_FILE).write_bytes(build_spec([shard.header]))
    running: list[RunningEmulator] = []

    def begin(**settings: Any) -> RunningEmulator:
        config = EmulatorConfig(
            bucket=f"file://{bucket}",
            base_model=MODEL,
            **{"engine": "stub", "replica_count": 1, "api_key": KEY, **settings},
        )
        running.append(emulators(config))
        return running[-1]

    yield begin
    for emulator in running:
        emulator.stop()


async def test_a_signalled_snapshot_is_served(start: Callable[..., RunningEmulator]) -> None:
    service = client(start().url)
    assert (await service.observe()).describe() == "base weights on 1"
    assert await service.signal(snapshot_manifest("id-1")) == ()

    async def is_served() -> bool:
        return (await service.observe()).is_served_everywhere("id-1")

    async def is_gone() -> bool:
        return not await is_served()

    await until(is_served)
    await service.reset_ledger()
    await until(is_gone)


async def test_a_delta_on_what_is_not_served_is_rejected_with_the_text(
    start: Callable[..., RunningEmulator],
) -> None:
    with pytest.raises(SnapshotRejectedError) as caught:
        await client(start().url).signal(snapshot_manifest("id-1", previous="id-0"))
    assert caught.value.status_code == 400
    assert "id-0" in caught.value.detail


async def test_an_unknown_cache_field_is_dropped_once_and_remembered(
    start: Callable[..., RunningEmulator],
) -> None:
    service = client(start(reject_reset_prompt_cache=True).url, reset_prompt_cache="none")
    warnings = await service.signal(snapshot_manifest("id-1"))
    assert warnings == (
        "the service does not know reset_prompt_cache: "
        "its default, all, is in force instead of none",
    )
    assert await service.signal(snapshot_manifest("id-1")) == warnings


async def test_the_cache_policy_is_sent_where_it_is_known(
    start: Callable[..., RunningEmulator],
) -> None:
    service = client(start().url, reset_prompt_cache="new_session", extra_fields_ignore=["x"])
    assert await service.signal(snapshot_manifest("id-1")) == ()


async def test_the_description_is_that_of_the_emulator(
    start: Callable[..., RunningEmulator], tmp_path: Path
) -> None:
    description = await client(start(replica_count=2).url).describe()
    assert description.bucket_url == f"file://{tmp_path}/bucket"
    assert description.hot_load_enabled
    assert description.desired_replica_count == 2


@pytest.mark.parametrize("status", [200, 400, 404, 500])
async def test_hints_go_out_until_the_first_4xx(
    start: Callable[..., RunningEmulator], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    emulator = start(hint_status_code=status)
    service = client(emulator.url, hint_body_template={"snapshot": "{identity}", "size": "{size}"})
    with caplog.at_level(logging.INFO, "hotload.clients.service"):
        taken = [await service.hint(**HINT) for _ in range(3)]
    assert taken == [status == 200] * 3
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (1 if 400 <= status < 500 else 0)
    assert KEY not in caplog.text


async def test_no_template_sends_no_hint(raw_server: ScriptedServer) -> None:
    assert not await client(raw_server.address).hint(**HINT)
    assert raw_server.requests == []


async def test_a_wrong_key_stops(start: Callable[..., RunningEmulator]) -> None:
    service = HotLoadClient(Access(base_url=start().url, api_key="another-key", **NAMES))
    for call in (
        service.observe(),
        service.signal(snapshot_manifest("id-1")),
        service.describe(),
        service.reset_ledger(),
    ):
        with pytest.raises(ServiceRefusedError) as caught:
            await call
        assert caught.value.status_code == 401


async def test_wrong_names_stop(start: Callable[..., RunningEmulator]) -> None:
    service = HotLoadClient(
        Access(base_url=start().url, api_key=KEY, **{**NAMES, "deployment_id": "absent"})
    )
    for call in (service.observe(), service.describe()):
        with pytest.raises(ServiceRefusedError) as caught:
            await call
        assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "use a key of this account"),
        (402, "settle the billing of account local"),
        (403, "give the key's owner rights on accounts/local/deployments/rollouts"),
        (404, "compare account, model and deployment"),
        (503, "compare base_url"),
    ],
)
async def test_an_error_names_block_and_remedy_in_the_words_of_the_check(
    raw_server: ScriptedServer, status: int, remedy: str
) -> None:
    raw_server.replies = [http(b'{"error": "no"}', status, JSON)] * 6
    access = Access(
        base_url=raw_server.address, api_key=KEY, block="hot-load-service/mine", **NAMES
    )
    service = HotLoadClient(access)
    lines = [line for line in await service.check() if not line.ok]
    assert [line.name for line in lines] == ["status", "description"]
    for line, call in zip(lines, (service.observe, service.describe), strict=True):
        with pytest.raises(ServiceError) as caught:
            await call()
        assert str(caught.value) == f"{line.found}. {line.advice}"
        assert str(caught.value).count("block hot-load-service/mine: ") == 1
        assert str(caught.value).count(remedy) == 1
        assert KEY not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    # The inference side of the same account says the same.
    (line,) = await InferenceClient(access).check()
    assert line.advice == lines[0].advice


async def test_check_has_nothing_to_say_about_a_good_service(
    start: Callable[..., RunningEmulator], tmp_path: Path
) -> None:
    lines = await client(start().url).check(f"file://{tmp_path}/bucket")
    assert [str(line) for line in lines if not line.ok] == []
    assert [line.name for line in lines][:3] == ["key", "status", "hot load"]


async def test_check_says_what_is_missing(
    start: Callable[..., RunningEmulator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = start()
    missing = [
        line.name for line in await client(emulator.url).check("s3://elsewhere") if not line.ok
    ]
    assert missing == ["bucket"]
    wrong = HotLoadClient(Access(base_url=emulator.url, api_key="another-key", **NAMES))
    lines = await wrong.check()
    assert [(line.name, line.ok, line.stops) for line in lines] == [
        ("key", True, True), ("status", False, True), ("description", False, True),
    ]  # fmt: skip
    assert "inference-only" in lines[1].advice
    assert lines[1].advice.startswith("For the account block: use a key")
    (line,) = await HotLoadClient(Access(base_url=emulator.url, **NAMES)).check()
    assert line.found == "check: no API key"
    assert "FIREWORKS_API_KEY" in line.advice
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    assert (await HotLoadClient(Access(base_url=emulator.url, **NAMES)).check())[0].ok


GOOD = ServiceDescription(
    name="accounts/local/deployments/rollouts",
    base_model="accounts/vendor/models/base",
    state="READY",
    hot_load_enabled=True,
    bucket_url="s3://bucket/x",
    bucket_type="S3",
    transition_type="ASYNC",
    desired_replica_count=3,
    min_replica_count=1,
)


@pytest.mark.parametrize(
    ("changed", "name", "stops"),
    [
        ({}, None, False),
        ({"hot_load_enabled": False}, "hot load", True),
        ({"bucket_url": "s3://bucket/y"}, "bucket", True),
        ({"bucket_url": None}, "bucket", True),
        ({"bucket_type": "FW_HOSTED"}, "bucket type", True),
        ({"bucket_type": "ANYTHING"}, None, False),
        ({"transition_type": "SYNC"}, "transition", False),
        ({"base_model": "accounts/vendor/models/other"}, "base model", False),
        ({"min_replica_count": 0}, "minimum replicas", False),
        ({"min_replica_count": None}, "minimum replicas", False),
        ({"state": "CREATING"}, "state", False),
        ({"state": "FAILED"}, "state", True),
        ({"state": "DELETED"}, "state", True),
        ({"state": "UPDATING"}, None, False),
        ({"state": None}, None, False),
    ],
)
def test_preflight_rows(changed: dict[str, Any], name: str | None, stops: bool) -> None:
    service = client(
        "http://localhost", hot_load_transition_type="ASYNC", base_model=GOOD.base_model
    )
    fields = {field: getattr(GOOD, field) for field in GOOD.__slots__} | changed
    lines = service.preflight(ServiceDescription(**fields), "s3://bucket/x")
    found = [(line.name, line.stops) for line in lines if not line.ok]
    assert found == ([(name, stops)] if name else [])
    assert all(line.advice for line in lines if not line.ok)


async def test_a_service_being_created_is_probed(raw_server: ScriptedServer) -> None:
    created = {"name": "x", "state": "CREATING", "enableHotLoad": True, "minReplicaCount": 1}
    raw_server.replies = [
        http(b'{"replicas": []}', 200, JSON),
        http(json.dumps(created).encode(), 200, JSON),
        http(b"", 503, JSON),
    ]
    lines = {line.name: line for line in await client(raw_server.address).check()}
    assert not lines["state"].ok
    assert not lines["state"].stops
    assert not lines["inference"].ok
    assert b'"prompt":[1,2]' in raw_server.requests[-1].content


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (http(b"<html>gateway</html>", 200, "text/html"), ServiceUnavailableError),
        (http(b"", 200, JSON), ServiceUnavailableError),
        (http(b"\xff\xfe", 200, JSON), ServiceUnavailableError),
        (http(b"[" * 100_000, 200, JSON), ServiceUnavailableError),
        (b"", ServiceUnavailableError),
        (b"garbage\r\n\r\n", ServiceUnavailableError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", ServiceUnavailableError),
        (http(b"x", 200, JSON, content_encoding="gzip"), ServiceUnavailableError),
        (http(b"{}", 200, JSON), ProtocolError),
        (http(b'{"replicas": {}}', 200, JSON), ProtocolError),
        (http(b'{"replicas": [1]}', 200, JSON), ProtocolError),
        (http(b"", 302, JSON, location="http://elsewhere/"), ProtocolError),
        (http(b"{}", 400, JSON), ServiceRefusedError),
        (http(b"", 401, JSON), ServiceRefusedError),
        (http(b"", 402, JSON), ServiceRefusedError),
        (http(b"", 403, JSON), ServiceRefusedError),
        (http(b"<html>nothing here</html>", 404, "text/html"), ServiceRefusedError),
        (http(b"", 408, JSON), ServiceUnavailableError),
        (http(b"", 429, JSON), ServiceUnavailableError),
        (http(b"", 500, JSON), ServiceUnavailableError),
        (http(b"", 503, JSON), ServiceUnavailableError),
    ],
    ids=lambda value: value[:60].decode("latin-1") if isinstance(value, bytes) else "",
)
async def test_what_a_status_may_be(
    raw_server: ScriptedServer, answer: bytes, error: type[ServiceError]
) -> None:
    raw_server.replies = [answer]
    with pytest.raises(ServiceError) as caught:
        await client(raw_server.address).observe()
    assert type(caught.value) is error
    assert len(raw_server.requests) == 1
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


async def test_an_empty_replica_list_is_a_status(raw_server: ScriptedServer) -> None:
    raw_server.replies = [http(b'{"replicas": []}', 200, JSON)]
    assert (await client(raw_server.address).observe()).replicas == ()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, SnapshotRejectedError),
        (409, SnapshotRejectedError),
        (422, SnapshotRejectedError),
        (401, ServiceRefusedError),
        (404, ServiceRefusedError),
        (429, ServiceUnavailableError),
        (502, ServiceUnavailableError),
    ],
)
async def test_what_a_signal_may_be_answered(
    raw_server: ScriptedServer, status: int, error: type[ServiceError]
) -> None:
    raw_server.replies = [http(b"Extra base model config options: rope", status, JSON)]
    with pytest.raises(ServiceError, match="Extra base model config options: rope") as caught:
        await client(raw_server.address).signal(snapshot_manifest("id-1"))
    assert type(caught.value) is error


async def test_the_body_of_a_good_signal_is_not_read(raw_server: ScriptedServer) -> None:
    raw_server.replies = [http(b"x" * 10, 200, JSON)]
    assert await client(raw_server.address).signal(snapshot_manifest("id-1", previous="id-0")) == ()
    (request,) = raw_server.requests
    assert request.headers["fireworks-model"] == "accounts/local/models/policy"
    assert request.headers["fireworks-deployment"] == "accounts/local/deployments/rollouts"
    assert request.body == {
        "identity": "id-1",
        "incremental_snapshot_metadata": {
            "previous_snapshot_identity": "id-0",
            "compression_format": "arc_v2",
            "checksum_format": "alder32",
        },
    }


async def test_an_endless_answer_ends(raw_server: ScriptedServer) -> None:
    heads = [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"]

    async def endless(request: Request) -> AsyncIterator[bytes]:
        yield heads[0]
        while True:
            yield b" " * 65536

    raw_server.replies = [endless]
    with pytest.raises(ProtocolError, match="larger than 8388608 bytes"):
        await client(raw_server.address).observe()
    heads[0] = b"HTTP/1.1 500 Oops\r\n\r\n"
    with pytest.raises(ServiceUnavailableError) as caught:
        await client(raw_server.address).observe()
    assert len(str(caught.value)) < 3000


async def test_silence_ends(raw_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotload.clients.service.client.GET_TIMEOUT_SECONDS", 0.2)
    raw_server.replies = [never]
    with pytest.raises(ServiceUnavailableError, match="observe: not finished within"):
        await client(raw_server.address).observe()


async def test_a_refused_connection_is_unavailable() -> None:
    with pytest.raises(ServiceUnavailableError):
        await client("http://127.0.0.1:1").observe()


@pytest.mark.parametrize("status", [200, 401, 400, 500])
async def test_a_key_that_the_server_repeats_is_shown_nowhere(
    raw_server: ScriptedServer, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = f'{{"error": "Bearer {KEY} is wrong", "at": "{"x" * 2000}{KEY}"}}'
    raw_server.replies = [http(told.encode(), status, JSON)]
    service = client(raw_server.address, hint_body_template={"f": "{file}"})
    account = InferenceAccount(base_url=raw_server.address, api_key=KEY, **NAMES)
    shown = []
    for block in (account, HotLoadService(account=account)):
        shown += [repr(block), str(block), repr(block.model_dump()), block.model_dump_json()]
    shown += [repr(service), str(service)]
    for call in (service.observe(), service.signal(snapshot_manifest("id-1")), service.describe()):
        try:
            shown.append(repr(await call))
        except ServiceError as error:
            shown += [str(error), repr(error), repr(error.__cause__)]
            shown += [] if error.__suppress_context__ else [repr(error.__context__)]
    await service.hint(**HINT)
    shown += [str(line) for line in await service.check()]
    assert KEY not in " ".join(shown)
    assert KEY not in caplog.text
    assert raw_server.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_a_key_in_a_replica_is_masked_before_it_is_parsed(raw_server: ScriptedServer) -> None:
    told = {"replicas": [{"readiness": True, "note": KEY}]}
    raw_server.replies = [http(json.dumps(told).encode(), 200, JSON)]
    (replica,) = (await client(raw_server.address).observe()).replicas
    assert KEY not in replica.raw
    assert "****" in replica.raw


@pytest.mark.parametrize("key", ["line\nend", "sp ace", "schlüssel", "tab\t"])
async def test_a_key_that_cannot_be_sent_is_refused_unseen(
    raw_server: ScriptedServer, key: str
) -> None:
    service = HotLoadClient(Access(base_url=raw_server.address, api_key=key, **NAMES))
    with pytest.raises(ServiceRefusedError, match="characters") as caught:
        await service.observe()
    assert key not in str(caught.value)


async def test_the_environment_names_service_and_key(
    raw_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREWORKS_BASE_URL", raw_server.address)
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    raw_server.replies = [http(b'{"replicas": []}', 200, JSON)]
    assert (await HotLoadClient(Access(**NAMES)).observe()).replicas == ()
    monkeypatch.setenv("FIREWORKS_BASE_URL", "nonsense")
    with pytest.raises(ServiceRefusedError, match="FIREWORKS_BASE_URL"):
        await HotLoadClient(Access(**NAMES)).observe()


@pytest.mark.parametrize("url", ["", "ftp://x", "https://", "https://u:p@x", "https://x?y=1", "x"])
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        InferenceAccount(base_url=url, api_key=KEY, **NAMES)


async def test_an_address_that_is_refused_is_not_called() -> None:
    with pytest.raises(ServiceRefusedError, match="base_url: expected an address without"):
        await client("https://u:p@x").observe()


def test_the_document_opens_a_client_with_every_field_of_its_own() -> None:
    access = Access(base_url="https://api.example", api_key=KEY, **NAMES)
    fields: dict[str, Any] = {
        "base_model": "accounts/vendor/models/base",
        "hot_load_transition_type": "SYNC",
        "reset_prompt_cache": "none",
        "extra_fields_ignore": ("x",),
        "hint_body_template": {"file": "{file}"},
    }
    account = InferenceAccount(**asdict(access))
    opened = HotLoadService(account=account, **fields).open()
    assert {name: getattr(opened, name) for name in fields} == fields
    assert fields.keys() | {"access", "is_one_of_several", "transport"} == {
        name for name in vars(opened) if name[0] != "_"
    }
    assert opened.access == access
    assert KEY not in f"{opened!r} {opened}"
    copy = pickle.loads(pickle.dumps(opened))
    assert vars(copy) == vars(opened)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "a\r\nx: y"])
def test_names_that_would_change_a_request_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        InferenceAccount(**{**NAMES, "account_id": name})


async def test_a_key_that_is_part_of_an_identity_changes_no_status(
    raw_server: ScriptedServer,
) -> None:
    replica = {"readiness": True, "current_snapshot_identity": "demo-000001-0a1b2c3d"}
    raw_server.replies = [http(json.dumps({"replicas": [replica]}).encode(), 200, JSON)]
    service = HotLoadClient(Access(base_url=raw_server.address, api_key="demo", **NAMES))
    observed = await service.observe()
    assert observed.replicas[0].current_identity == "demo-000001-0a1b2c3d"
    assert "demo" not in observed.replicas[0].raw


@pytest.mark.parametrize(
    ("state", "error", "refused"),
    [
        (
            {"error": f"asked\nwith {KEY}", "final": True},
            "asked with ********",
            {"id-2": "asked with ********"},
        ),
        ({"error": "disk", "final": "true"}, "disk", {}),
        ({"error": ["disk"]}, "", {}),
        ({"error": "x" * 9000, "final": False}, "x" * 2048, {}),
    ],
)
async def test_the_reason_of_an_error_is_read_without_the_key(
    raw_server: ScriptedServer, state: dict[str, Any], error: str, refused: dict[str, str]
) -> None:
    loading = {"stage": "error", "target_snapshot_identity": "id-2", **state}
    body = json.dumps({"replicas": [{"readiness": True, "loading_state": loading}]}).encode()
    raw_server.replies = [http(body, 200, JSON)]
    status = await client(raw_server.address).observe()
    assert (status.replicas[0].error, status.refused) == (error, refused)
    assert status.by_replica[0].startswith(
        f"1 replica: on base weights, ready, error for id-2{f': {error}' if error else ''}"[:800]
    )
