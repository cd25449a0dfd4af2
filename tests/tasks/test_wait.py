"""Waiting for replicas: what is fatal, what passes, and what the deadline says."""

import asyncio

import pytest

from hotload.clients.access import Access
from hotload.clients.service import HotLoadClient
from hotload.errors import (
    HotLoadError,
    LoadFailedError,
    NeedsFullSnapshotError,
    ProtocolError,
    ReadinessTimeoutError,
    ServiceRefusedError,
    ServiceUnavailableError,
)
from hotload.options import ReadinessPolicy
from hotload.publish.snapshot import SnapshotManifest
from tasks.wait import wait_for_replicas, wait_until_ready, wait_until_settled
from tests.flows.fleet import API_KEY, NAMES, REPLICAS
from tests.tasks.publishing import IMPATIENT, PATIENT, Publisher
from tests.waiting import until

HTML = "<html><body>502 Bad Gateway</body></html>"


@pytest.fixture
async def manifest(publisher: Publisher) -> SnapshotManifest:
    """Version 1, uploaded and not signalled."""
    return await publisher.carry(1, await publisher.plan(1))


async def ready(
    publisher: Publisher,
    manifest: SnapshotManifest,
    expected: int | None = REPLICAS,
    readiness: ReadinessPolicy = PATIENT,
) -> int:
    seen = await wait_until_ready.fn(publisher.service, manifest, readiness, expected)
    return seen.ready_count


# Before the first signal


async def test_the_first_replica_ends_the_wait(publisher: Publisher) -> None:
    publisher.fleet.fault(fault="empty_replicas", count=2)
    publisher.respond("status", 503, count=1)
    await wait_for_replicas.fn("run-000001", publisher.service, PATIENT, REPLICAS)
    assert publisher.fleet.orders() == []


async def test_a_list_that_is_too_short_is_waited_out(publisher: Publisher) -> None:
    declared = IMPATIENT.model_copy(update={"replica_count": REPLICAS + 1})
    with pytest.raises(ServiceUnavailableError, match=f"{REPLICAS} of {REPLICAS + 1} replicas"):
        await wait_for_replicas.fn("run-000001", publisher.service, declared, REPLICAS + 1)


async def test_a_replica_that_was_scaled_away_is_not_waited_for(
    publisher: Publisher, manifest: SnapshotManifest
) -> None:
    patient = IMPATIENT.model_copy(update={"weight_sync_timeout": 3600})
    publisher.fleet.change_replicas(action="remove", replica="replica-1")
    await wait_for_replicas.fn("run-000001", publisher.service, PATIENT, REPLICAS)
    await publisher.signal(manifest)
    seen = await wait_until_ready.fn(publisher.service, manifest, patient, REPLICAS)
    assert seen.ready_count == REPLICAS - 1


async def test_what_another_cycle_signalled_is_waited_out(
    publisher: Publisher, manifest: SnapshotManifest
) -> None:
    publisher.fleet.fault(fault="lagging_replica", replica="replica-0")
    await publisher.service.signal(manifest)
    with pytest.raises(ServiceUnavailableError, match=f"loading {manifest.identity}"):
        await wait_for_replicas.fn("run-000002", publisher.service, IMPATIENT, REPLICAS)
    # Its own cycle is let through: the plan judges what it signalled before it was killed.
    await wait_for_replicas.fn("run-000001", publisher.service, PATIENT, REPLICAS)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"fault": "empty_replicas"}, "the replica list is empty"),
        ({"fault": "respond", "operation": "status", "status": 503}, "HTTP 503"),
        ({"fault": "respond", "operation": "status", "status": 200, "body": HTML}, "expected JSON"),
        ({"fault": "respond", "operation": "status", "status": 200, "body": ""}, "found nothing"),
        ({"fault": "disconnect", "operation": "status"}, "Error: "),
    ],
    ids=["no replicas", "503", "HTML", "empty", "disconnected"],
)
async def test_no_replica_until_the_deadline(
    publisher: Publisher, fault: dict[str, object], words: str
) -> None:
    publisher.fleet.fault(**fault)
    with pytest.raises(ServiceUnavailableError, match=words) as caught:
        await wait_for_replicas.fn("run-000001", publisher.service, IMPATIENT, REPLICAS)
    assert "waited 0.2 s" in str(caught.value)
    assert publisher.fleet.log()["signals"] == []


@pytest.mark.parametrize("status", [401, 402, 403, 404])
async def test_a_refusal_ends_the_cycle_before_a_signal_and_is_waited_out_after_it(
    publisher: Publisher, manifest: SnapshotManifest, status: int
) -> None:
    publisher.respond("status", status)
    with pytest.raises(ServiceRefusedError, match=f"HTTP {status}"):
        await wait_for_replicas.fn("run-000001", publisher.service, IMPATIENT, REPLICAS)
    with pytest.raises(ReadinessTimeoutError, match=f"HTTP {status}"):
        await ready(publisher, manifest, readiness=IMPATIENT)


async def test_another_form_is_not_waited_out(
    publisher: Publisher, manifest: SnapshotManifest
) -> None:
    publisher.respond("status", 200, '{"replicas": {"a": 1}}')
    with pytest.raises(ProtocolError):
        await ready(publisher, manifest)


async def test_nobody_at_home(publisher: Publisher) -> None:
    nobody = HotLoadClient(Access(base_url="http://127.0.0.1:9", api_key=API_KEY, **NAMES))
    with pytest.raises(ServiceUnavailableError, match="ConnectError"):
        await wait_for_replicas.fn("run-000001", nobody, IMPATIENT, REPLICAS)


# After the signal


async def test_every_replica_ends_the_wait(
    publisher: Publisher, manifest: SnapshotManifest
) -> None:
    await publisher.signal(manifest)
    assert await ready(publisher, manifest) == REPLICAS
    assert await ready(publisher, manifest, None) == REPLICAS


async def test_what_passes_is_waited_out(publisher: Publisher, manifest: SnapshotManifest) -> None:
    await publisher.signal(manifest)
    publisher.respond("status", 500, count=1)
    publisher.respond("status", 200, HTML, count=1)
    publisher.fleet.fault(fault="disconnect", operation="status", count=1)
    publisher.fleet.fault(fault="empty_replicas", count=1)
    publisher.fleet.fault(fault="stale_error", target="run-000000-12345678", count=1)
    publisher.fleet.fault(fault="stale_error", count=1)
    publisher.fleet.fault(fault="odd_stage", count=1)
    patient = IMPATIENT.model_copy(update={"weight_sync_timeout": 15})
    seen = await wait_until_ready.fn(publisher.service, manifest, patient, REPLICAS)
    assert seen.ready_count == REPLICAS
    assert seen.trace[-1][1] == REPLICAS


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"fault": "empty_replicas"}, "list is empty|no replicas"),
        ({"fault": "lagging_replica", "replica": "replica-1"}, "base weights on 1"),
        ({"fault": "first_ready_only"}, "base weights on 1"),
        ({"fault": "respond", "operation": "status", "status": 503}, "could not be read"),
        ({"fault": "respond", "operation": "status", "status": 200, "body": HTML}, "expected JSON"),
        ({"fault": "disconnect", "operation": "status"}, "could not be read"),
    ],
    ids=["no replicas", "one lags", "first only", "503", "HTML", "disconnected"],
)
async def test_the_deadline_says_what_was_missing(
    publisher: Publisher, manifest: SnapshotManifest, fault: dict[str, object], words: str
) -> None:
    if fault["fault"] in ("lagging_replica", "first_ready_only"):
        publisher.fleet.fault(**fault)
    await publisher.signal(manifest)
    publisher.fleet.fault(**fault)
    with pytest.raises(ReadinessTimeoutError, match=words) as caught:
        await ready(publisher, manifest, readiness=IMPATIENT)
    assert isinstance(caught.value, NeedsFullSnapshotError)
    assert manifest.identity in str(caught.value)


async def test_too_few_replicas_are_not_enough(
    publisher: Publisher, manifest: SnapshotManifest
) -> None:
    await publisher.signal(manifest)
    declared = IMPATIENT.model_copy(update={"replica_count": REPLICAS + 1})
    with pytest.raises(ReadinessTimeoutError, match="2 replicas are listed, 3 expected"):
        await wait_until_ready.fn(publisher.service, manifest, declared, REPLICAS + 1)


async def test_replicas_that_left_the_load_are_an_answer(
    publisher: Publisher, manifest: SnapshotManifest
) -> None:
    patient = IMPATIENT.model_copy(update={"weight_sync_timeout": 3600})
    for number in range(REPLICAS):
        publisher.fleet.fault(fault="lagging_replica", replica=f"replica-{number}")
    await publisher.signal(manifest)
    waiting = asyncio.create_task(
        wait_until_ready.fn(publisher.service, manifest, patient, REPLICAS)
    )
    # It is seen by two looks: a fault that changes nothing counts them.
    publisher.fleet.fault(fault="odd_stage", stage="downloading", count=2 * REPLICAS)
    await until(lambda: asyncio.to_thread(lambda: publisher.struck() >= 2 * REPLICAS))
    for number in range(REPLICAS):
        publisher.fleet.change_replicas(action="restart", replica=number, on_base=True)
    with pytest.raises(LoadFailedError, match="no replica knows it, and none is loading"):
        await waiting


async def test_a_full_snapshot_waits_for_the_loads_that_still_run(publisher: Publisher) -> None:
    await publisher.publish(1)
    publisher.fleet.fault(fault="lagging_replica", replica="replica-0")
    delta = await publisher.carry(2, await publisher.plan(2))
    await publisher.signal(delta)
    patient = IMPATIENT.model_copy(update={"weight_sync_timeout": 3600})
    waiting = asyncio.create_task(wait_until_settled.fn("run-000002", publisher.service, patient))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    publisher.fleet.clear_faults()
    await waiting
    # A load that never ends keeps the full snapshot from nobody.
    publisher.fleet.fault(fault="lagging_replica", replica="replica-0")
    await publisher.signal(await publisher.carry(3, await publisher.plan(3)))
    await wait_until_settled.fn("run-000003", publisher.service, IMPATIENT)


async def test_an_error_for_this_snapshot_is_fatal_at_once(publisher: Publisher) -> None:
    await publisher.publish(1)
    delta = await publisher.carry(2, await publisher.plan(2))
    publisher.fleet.fault(fault="torn_apply", replica="replica-1", count=1)
    await publisher.signal(delta)
    patient = IMPATIENT.model_copy(update={"weight_sync_timeout": 3600})
    with pytest.raises(LoadFailedError, match=delta.identity) as caught:
        await wait_until_ready.fn(publisher.service, delta, patient, REPLICAS)
    assert isinstance(caught.value, HotLoadError)
    plan = await publisher.plan(2)
    assert (plan.kind, plan.attempt) == ("full", 1)
    assert plan.identity != delta.identity
    assert f"a replica reported an error for {delta.identity}" in plan.reason
