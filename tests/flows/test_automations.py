"""The automation that deployments/ shows, on a real server."""

from __future__ import annotations

import pytest
from prefect.client.orchestration import get_client
from prefect.events.clients import get_events_client
from prefect.events.schemas.events import Event, RelatedResource, Resource

from tests.flows.test_ways_in import python
from tests.waiting import until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


async def test_three_fallbacks_of_a_run_pause_its_deployment(prefect_api: str) -> None:
    made = python("prefect", "automation", "create", "--from-file", "deployments/automations.yaml")
    assert made.returncode == 0, made.stdout + made.stderr
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
