"""Before anything is published: would a sample be answered?"""

from typing import Any

import pytest

from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.errors import ServiceRefusedError
from hotload.options import Sampling
from hotload.rollout.engines.known import EngineName
from tasks.preflight import UNROUTED_REQUESTS, preflight_rollouts
from tests.flows.fleet import API_KEY, NAMES
from tests.tasks.publishing import IMPATIENT, Publisher

OTHER_MODEL = {"model_id": "policy-typo"}


async def ask(
    publisher: Publisher,
    *,
    is_adapter: bool = False,
    engine: EngineName = "fireworks",
    **changes: Any,
) -> int:
    """Ask as a cycle does; returns how many requests came of it."""
    before = len(publisher.fleet.log()["requests"])
    access = Access(**{"base_url": publisher.fleet.url, "api_key": API_KEY, **NAMES, **changes})
    try:
        await preflight_rollouts.fn(
            "run-000001",
            publisher.service,
            InferenceClient(access, engine=engine),
            IMPATIENT,
            Sampling(),
            is_adapter=is_adapter,
        )
    finally:
        publisher.fleet.clear_faults()
        asked = publisher.fleet.log()["requests"][before:]
        assert not any(each["session"] for each in asked)
    return len(asked)


async def test_one_token_is_all_it_takes(publisher: Publisher) -> None:
    assert await ask(publisher) == 1  # of base weights, before the first snapshot
    await publisher.publish(1)
    assert await ask(publisher) == 1
    assert [each["completion_tokens"] for each in publisher.fleet.log()["requests"]] == [1, 1]


async def test_404_throughout_is_refused_where_a_snapshot_is_served(publisher: Publisher) -> None:
    manifest = await publisher.publish(1)
    publisher.respond("inference", 404)
    with pytest.raises(ServiceRefusedError) as refused:
        await ask(publisher)
    text = str(refused.value)
    assert f"to {UNROUTED_REQUESTS} requests, and yet 2 replicas: on {manifest.identity}" in text
    assert "compare account, model and deployment" in text
    # One that is asked for a little later than all of them is no wrong address.
    publisher.respond("inference", 404, count=UNROUTED_REQUESTS - 1)
    assert await ask(publisher) == UNROUTED_REQUESTS


async def test_before_the_first_snapshot_404_may_be_in_order(publisher: Publisher) -> None:
    """Unless it is another name or address that is asked than the status came from."""
    publisher.respond("inference", 404)
    assert await ask(publisher) == 1
    with pytest.raises(ServiceRefusedError, match="on base weights"):
        await ask(publisher, **OTHER_MODEL)
    nowhere = f"{publisher.fleet.url}/another"
    with pytest.raises(ServiceRefusedError, match="on base weights"):
        await ask(publisher, base_url=nowhere)
    # An adapter that is not loaded has no name to be asked by.
    assert await ask(publisher, is_adapter=True, **OTHER_MODEL) == 1


async def test_404_while_no_replica_is_ready_passes(publisher: Publisher) -> None:
    await publisher.publish(1)
    publisher.respond("inference", 404)
    publisher.fleet.fault(fault="empty_replicas")
    assert await ask(publisher) == 1


async def test_404_of_another_engine_ends_it_at_once(publisher: Publisher) -> None:
    """It is no swap there, whatever the replicas serve."""
    nowhere = f"{publisher.fleet.url}/another"
    with pytest.raises(ServiceRefusedError, match=r"HTTP 404.*--served-model-name") as refused:
        await ask(publisher, engine="vllm", base_url=nowhere)
    assert "requests" not in str(refused.value)


async def test_another_engine_that_is_no_such_one_ends_it(publisher: Publisher) -> None:
    """The vendor's service refuses a field of vLLM's."""
    with pytest.raises(ServiceRefusedError, match="HTTP 400"):
        await ask(publisher, engine="vllm")


@pytest.mark.parametrize("status", [400, 408, 412, 425, 429, 500, 503])
async def test_other_answers_are_the_samples_matter(publisher: Publisher, status: int) -> None:
    publisher.respond("inference", status)
    assert await ask(publisher) == 1
    assert await ask(publisher, base_url="http://127.0.0.1:1") == 0


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_a_key_that_is_refused_ends_it_at_once(publisher: Publisher, status: int) -> None:
    publisher.respond("inference", status)
    with pytest.raises(ServiceRefusedError, match=f"HTTP {status}"):
        await ask(publisher)
    assert len(publisher.fleet.log()["requests"]) == 1
