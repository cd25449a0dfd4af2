"""`python -m blocks check`, asked of blocks saved on a real Prefect server."""

import asyncio
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.__main__ import main
from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from tests.scripted_server import JSON, ScriptedServer, http

pytestmark = pytest.mark.usefixtures("prefect_api")
NAMES = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
SECRET = "s3cr3tNobodyMaySee"
DESCRIPTION = b"""{"name": "x", "state": "READY", "enableHotLoad": true, "minReplicaCount": 1,
 "hotLoadBucketUrl": "s3://bucket/x", "hotLoadBucketType": "S3"}"""


async def test_a_store_that_works_exits_0_and_one_that_does_not_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"secret": SECRET}
    await CheckpointStore(url=str(tmp_path), options=options).asave("works", overwrite=True)
    await CheckpointStore(url=str(tmp_path / "absent")).asave("lacks", overwrite=True)
    assert await asyncio.to_thread(main, ["check", "store", "works"]) == 0
    assert await asyncio.to_thread(main, ["check", "store", "lacks"]) == 1
    told = capsys.readouterr().out
    assert "MISSING  bucket: the directory does not exist" in told
    assert SECRET not in told


async def test_a_service_is_compared_with_its_store(
    raw_server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [http(b'{"replicas": []}', 200, JSON), http(DESCRIPTION, 200, JSON)]
    account = InferenceAccount(base_url=raw_server.address, api_key=SECRET, **NAMES)
    await account.asave("account", overwrite=True)
    service = HotLoadService(account=account)
    await service.asave("service", overwrite=True)
    await CheckpointStore(url="s3://bucket/x").asave("same", overwrite=True)
    await CheckpointStore(url="s3://bucket/y").asave("other", overwrite=True)
    raw_server.replies = list(answers)
    assert await asyncio.to_thread(main, ["check", "service", "service", "--store", "same"]) == 0
    raw_server.replies = list(answers)
    assert await asyncio.to_thread(main, ["check", "service", "service", "--store", "other"]) == 1
    told = capsys.readouterr().out
    assert "the service reads s3://bucket/x, the store writes s3://bucket/y" in told
    assert SECRET not in told


async def test_a_saved_block_comes_back_whole() -> None:
    """A block that a server has kept is the block that was saved, secrets and all."""
    store = CheckpointStore(url="s3://bucket/x", options={"secret": SECRET})
    await store.asave("kept", overwrite=True)
    loaded = await CheckpointStore.aload("kept")
    assert loaded.url == store.url
    assert loaded.options.get_secret_value() == {"secret": SECRET}
    account = InferenceAccount(api_key=SECRET, **NAMES)
    service = HotLoadService(account=account, hint_body_template={"a": ["{file}"]})
    await service.asave("kept", overwrite=True)
    again = await HotLoadService.aload("kept")
    assert again.account.api_key.get_secret_value() == SECRET
    assert again.hint_body_template == service.hint_body_template


async def test_an_unknown_block_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["check", "store", "nobody-saved-this"]) == 2
    assert "nobody-saved-this" in capsys.readouterr().err


async def test_a_server_that_is_not_there_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert await asyncio.to_thread(main, ["check", "store", "works"]) == 2
    assert "Prefect server: http://127.0.0.1:1/api does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "check", "check x y", "check store a --store b"])
def test_wrong_words_are_explained(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert "usage: python -m blocks" in capsys.readouterr().err


async def test_what_an_api_cannot_be_told_is_a_line(
    prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    account = InferenceAccount(
        account_id="local", model_id="policy", deployment_id="rollouts", dialect="coreweave"
    )
    service = HotLoadService(account=account, reset_prompt_cache="new_session")
    await service.asave("untold", overwrite=True)
    assert await asyncio.to_thread(main, ["check", "service", "untold"]) == 1
    assert "reset_prompt_cache: found 'new_session', which this API" in capsys.readouterr().out
