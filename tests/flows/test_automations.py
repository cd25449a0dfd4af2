"""The automation that deployments/ shows, on a real server."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.events.clients import get_events_client
from prefect.events.schemas.events import Event, RelatedResource, Resource
from pydantic import SecretStr

from flows.cycle import checkpoint_to_rollout
from hotload.errors import InvalidCheckpointError
from tests.flows.fleet import Fleet
from tests.flows.test_ways_in import python
from tests.scripted_server import ScriptedServer, http
from tests.waiting import until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


async def create_automations(file: Path, webhook_url: str) -> None:
    """Create those of deployments/, as its README says; `webhook_url` is told of trouble."""
    block = await Webhook(url=SecretStr(webhook_url)).asave("trouble", overwrite=True)
    made = await asyncio.to_thread(create_with, file, str(block))
    assert made.returncode == 0, made.stdout + made.stderr


def create_with(file: Path, block: str) -> subprocess.CompletedProcess[str]:
    """Put the block's id where the file wants it, and create what it holds."""
    text = Path("deployments/automations.yaml").read_text()
    file.write_text(text.replace("block_document_id: WEBHOOK", f"block_document_id: {block}"))
    return python("prefect", "automation", "create", "--from-file", str(file))


async def test_a_channel_is_told_of_a_cycle_that_failed(fleet: Fleet, tmp_path: Path) -> None:
    async with ScriptedServer().running() as receiver:
        receiver.replies = [http(b"ok")]
        await create_automations(tmp_path / "automations.yaml", receiver.address)
        with pytest.raises(InvalidCheckpointError):
            await checkpoint_to_rollout(fleet.spec(1, checkpoint=str(tmp_path / "nothing")))

        async def told() -> list[str]:
            return [one.body["text"] for one in receiver.requests]

        (text, *_) = await until(told)
    assert text.startswith("run 1: hotload.cycle.failed, ")
    assert "nothing" in text


@pytest.mark.heavy
async def test_three_fallbacks_of_a_run_pause_its_deployment(
    prefect_api: str, tmp_path: Path
) -> None:
    await create_automations(tmp_path / "automations.yaml", "http://127.0.0.1:9")
    async with get_client() as client:
        flow_id = await client.create_flow_from_name("falls-back")
        deployment_id = await client.create_deployment(flow_id, "often")
        fell_back = {
            "event": "hotload.cycle.fell-back",
            "resource": Resource({"prefect.resource.id": "hotload.run.often"}),
            "related": [
                RelatedResource(
                    {
                        "prefect.resource.id": f"prefect.deployment.{deployment_id}",
                        "prefect.resource.role": "deployment",
                    }
                )
            ],
        }
        async with get_events_client() as events:
            for count in (1, 2, 3):
                assert not (await client.read_deployment(deployment_id)).paused, count
                await events.emit(Event.model_validate(fell_back))

        async def is_paused() -> bool:
            return (await client.read_deployment(deployment_id)).paused

        assert await until(is_paused)
