"""Signals: marked before they are sent, sent once, never by one who lost the lease; and hints."""

from datetime import UTC, datetime, timedelta

import pytest

from hotload.clients.access import Access
from hotload.clients.service import HotLoadClient
from hotload.clients.store.publisher_leases import lease_log, publisher_lease
from hotload.errors import (
    ChainBrokenError,
    LeaseLostError,
    LoadFailedError,
    ServiceRefusedError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.identity import SnapshotKind
from hotload.options import ReadinessPolicy
from hotload.publish.lease import Lease, Process
from hotload.publish.snapshot import ShardBatch, SnapshotManifest
from tasks.announce import hint_shards, reset_ledger, signal_snapshot
from tasks.wait import wait_until_ready
from tests.flows.fleet import API_KEY, NAMES, REPLICAS, SERVICE
from tests.tasks.publishing import Publisher


@pytest.fixture
async def full(publisher: Publisher) -> SnapshotManifest:
    """Version 1, uploaded and not signalled."""
    return await publisher.carry(1, await publisher.plan(1))


@pytest.fixture
async def delta(publisher: Publisher) -> SnapshotManifest:
    """Version 2 on a served version 1, uploaded and not signalled."""
    await publisher.publish(1)
    return await publisher.carry(2, await publisher.plan(2))


def marked(publisher: Publisher) -> set[str]:
    return {path.stem for path in (publisher.fleet.bucket / "_hotload/signals").rglob("*.json")}


def signalled(publisher: Publisher) -> list[str]:
    return [note["identity"] for note in publisher.fleet.log()["signals"]]


async def test_it_is_sent_once_however_often_it_is_asked_for(
    publisher: Publisher, full: SnapshotManifest
) -> None:
    for _ in range(3):
        assert await publisher.signal(full) == ()
    assert signalled(publisher) == [full.identity]
    assert marked(publisher) == {full.identity}


async def test_a_lost_answer_is_not_followed_by_a_second_signal(
    publisher: Publisher, delta: SnapshotManifest
) -> None:
    publisher.respond("signal", 503, accepted=True, count=1)
    with pytest.raises(ServiceUnavailableError):
        await publisher.signal(delta)
    assert await publisher.signal(delta) == ()
    assert signalled(publisher).count(delta.identity) == 1


async def test_the_mark_is_there_before_the_signal_is_sent(
    publisher: Publisher, delta: SnapshotManifest
) -> None:
    publisher.respond("signal", 503, count=1)
    with pytest.raises(ServiceUnavailableError):
        await publisher.signal(delta)
    assert delta.identity in marked(publisher)
    assert delta.identity not in signalled(publisher)
    plan = await publisher.plan(2)
    assert plan.kind is SnapshotKind.FULL
    assert plan.identity != delta.identity
    assert f"the signal for {delta.identity} may have been sent" in plan.reason


async def test_a_full_whose_signal_is_in_doubt_is_signalled_again(
    publisher: Publisher, full: SnapshotManifest
) -> None:
    publisher.respond("signal", 503, count=1)
    with pytest.raises(ServiceUnavailableError):
        await publisher.signal(full)
    assert (await publisher.plan(1)).identity == full.identity
    await publisher.signal(full)
    assert publisher.fleet.log()["signals"][-1]["result"] == "accepted"


async def test_a_delta_is_not_sent_to_replicas_elsewhere(
    publisher: Publisher, delta: SnapshotManifest
) -> None:
    await reset_ledger.fn(publisher.service)
    with pytest.raises(ChainBrokenError, match="base weights on 2"):
        await publisher.signal(delta)
    assert delta.identity not in signalled(publisher) + list(marked(publisher))
    plan = await publisher.plan(2)
    assert plan.kind is SnapshotKind.FULL
    assert plan.reason == "not every replica serves one snapshot of ours"


async def test_who_lost_the_lease_sends_nothing(
    publisher: Publisher, full: SnapshotManifest
) -> None:
    now = datetime.now(UTC)
    async with publisher_lease(publisher.store, SERVICE, "first") as lease:
        thief = Lease(
            token=lease.token + 1,
            nonce="0123456789abcdef",
            service=SERVICE,
            holder="second",
            process=Process(host="elsewhere", pid=1, started="1"),
            renewed_at=now,
            expires_at=now + timedelta(seconds=60),
        )
        path = lease_log(publisher.store, SERVICE).path(thief.token)
        await publisher.store.put_bytes(thief.render(), path)
        with pytest.raises(LeaseLostError, match="second"):
            await signal_snapshot.fn(publisher.service, publisher.store, full, lease)
    assert signalled(publisher) == []


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, SnapshotRejectedError),
        (401, ServiceRefusedError),
        (402, ServiceRefusedError),
        (403, ServiceRefusedError),
        (404, ServiceRefusedError),
        (409, SnapshotRejectedError),
        (429, ServiceUnavailableError),
        (500, ServiceUnavailableError),
    ],
)
async def test_what_a_refused_full_means(
    publisher: Publisher, full: SnapshotManifest, status: int, error: type[Exception]
) -> None:
    publisher.respond("signal", status)
    with pytest.raises(error, match=str(status)):
        await publisher.signal(full)


async def test_a_refused_delta_calls_for_a_full(
    publisher: Publisher, delta: SnapshotManifest
) -> None:
    publisher.respond("signal", 400, message="unknown parent")
    with pytest.raises(LoadFailedError, match="unknown parent"):
        await publisher.signal(delta)


async def test_409_for_what_is_served_already_is_success(
    publisher: Publisher, full: SnapshotManifest
) -> None:
    publisher.respond("signal", 409, accepted=True, count=1)
    assert await publisher.signal(full) == ()


@pytest.mark.parametrize(
    "message",
    [
        "Extra inputs are not permitted, field: 'reset_prompt_cache'",
        "Extra inputs are not permitted, field: 'reset_prompt_cache', value: 'none'",
        "reset_prompt_cache: Extra inputs are not permitted",
    ],
)
async def test_an_unhonoured_cache_policy_is_a_warning(
    publisher: Publisher, full: SnapshotManifest, message: str
) -> None:
    publisher.respond("signal", 400, message=message, count=1)
    service = HotLoadClient(
        Access(base_url=publisher.fleet.url, api_key=API_KEY, **NAMES), reset_prompt_cache="none"
    )
    async with publisher_lease(publisher.store, SERVICE, "test") as lease:
        warnings = await signal_snapshot.fn(service, publisher.store, full, lease)
    assert "all, is in force instead of none" in warnings[0]
    readiness = ReadinessPolicy(poll_interval_seconds=0.01, weight_sync_timeout=15)
    seen = await wait_until_ready.fn(service, full, readiness, REPLICAS)
    assert seen.ready_count == REPLICAS


def hinting(publisher: Publisher) -> HotLoadClient:
    template = {"identity": "{identity}", "file": "{file}", "uri": "{uri}"}
    return HotLoadClient(
        Access(base_url=publisher.fleet.url, api_key=API_KEY, **NAMES),
        hint_body_template=template,
    )


async def test_every_file_is_hinted(publisher: Publisher) -> None:
    plan, batch = await publisher.plan(1), ShardBatch.as_written(publisher.content(1).shards)
    shards = batch.shards
    hinted_batch = await hint_shards.fn(hinting(publisher), publisher.store, plan, batch)
    assert hinted_batch.hint_count == len(shards)
    hinted = [note["body"] for note in publisher.fleet.log()["hints"]]
    assert hinted[0]["uri"] == f"{publisher.store.url}/{plan.identity}/{shards[0].file}"
    assert [body["file"] for body in hinted] == [shard.file for shard in shards]


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
async def test_a_hint_that_fails_fails_nothing(publisher: Publisher, status: int) -> None:
    plan, batch = await publisher.plan(1), ShardBatch.as_written(publisher.content(1).shards)
    publisher.respond("hint", status)
    hinted = await hint_shards.fn(hinting(publisher), publisher.store, plan, batch)
    assert hinted.hint_count == 0
    assert publisher.struck() == (1 if status < 500 else len(batch.shards))
