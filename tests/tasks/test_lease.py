"""The publisher's lease on real stores and real processes."""

import asyncio
import signal
import subprocess
import sys
import textwrap
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hotload.clients.handoff.directory import claims_log
from hotload.clients.store import Store
from hotload.clients.store.publisher_leases import (
    check_lease,
    every_lease,
    is_running,
    lease_log,
    publisher_lease,
    this_process,
)
from hotload.errors import LeaseLostError, StoreError
from hotload.publish.lease import LEASES, Lease, Process
from tests.blocks.conftest import S3, make_store
from tests.flows.fleet import SERVICE
from tests.waiting import until

ELSEWHERE = Process(host="another host", pid=1, started="1")


@pytest.fixture(params=["file", "memory", S3])
def store(request: pytest.FixtureRequest) -> Store:
    return make_store(request.param, request)


def stored_lease(token: int, *, seconds_left: float, process: Process = ELSEWHERE) -> Lease:
    now = datetime.now(UTC)
    return Lease(
        token=token,
        nonce=uuid.uuid4().hex,
        service=SERVICE,
        holder="other-000001",
        process=process,
        renewed_at=now,
        expires_at=now + timedelta(seconds=seconds_left),
    )


async def write(store: Store, lease: Lease) -> None:
    await store.put_bytes(lease.render(), lease_log(store, SERVICE).path(lease.token))


async def read(store: Store, token: int) -> Lease:
    path = lease_log(store, SERVICE).path(token)
    data = await store.read_bytes(path, limit_bytes=9999)
    return Lease.parse(data, token=token, path=path)


async def test_tokens_grow_and_old_leases_are_removed(store: Store) -> None:
    for expected in (1, 2, 3):
        async with publisher_lease(store, SERVICE, "run-000001") as lease:
            assert lease.token == expected
            await check_lease(store, lease)
        assert await store.names(f"{LEASES}/{SERVICE}") == [f"{expected:010d}.json"]
        assert (await read(store, expected)).released


async def test_a_second_live_publisher_is_refused_by_name(store: Store) -> None:
    async with publisher_lease(store, SERVICE, "run-000001") as first:
        with pytest.raises(LeaseLostError, match=r"held by 'run-000001': process \d+ holds it"):
            async with publisher_lease(store, SERVICE, "run-000002"):
                pass
        await check_lease(store, first)


async def test_of_many_at_once_one_publishes(store: Store) -> None:
    inside = 0
    entered, release = asyncio.Event(), asyncio.Event()

    async def publish(number: int) -> None:
        nonlocal inside
        async with publisher_lease(store, SERVICE, f"run-{number:06d}"):
            inside += 1
            entered.set()
            await release.wait()

    cycles = [asyncio.ensure_future(publish(number)) for number in range(6)]
    done, waiting = set[asyncio.Future[None]](), set(cycles)
    while len(done) < 5:
        finished, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        done |= finished
    await entered.wait()
    assert inside == 1
    assert all(isinstance(cycle.exception(), LeaseLostError) for cycle in done)
    release.set()
    await asyncio.gather(*waiting)


async def test_an_expired_holder_elsewhere_is_taken_over_and_learns_it(
    store: Store,
) -> None:
    other = stored_lease(41, seconds_left=-1)
    await write(store, other)
    async with publisher_lease(store, SERVICE, "run-000001") as lease:
        assert lease.token == 42


async def test_an_unexpired_holder_elsewhere_is_not(store: Store) -> None:
    other = stored_lease(41, seconds_left=60)
    await write(store, other)
    with pytest.raises(LeaseLostError, match="on another host"):
        async with publisher_lease(store, SERVICE, "run-000001"):
            pass


async def test_one_that_was_taken_over_may_not_signal_and_does_not_renew(
    store: Store,
) -> None:
    async with publisher_lease(store, SERVICE, "run-000001", ttl_seconds=0.4) as lease:
        other = stored_lease(lease.token + 1, seconds_left=60)
        await write(store, other)
        with pytest.raises(LeaseLostError, match=r"'other-000001': token 2 has taken over"):
            await check_lease(store, lease)
    assert await read(store, 2) == other
    assert not (await read(store, 1)).released


async def renewed(store: Store, first: Lease) -> Lease:
    """The lease once it was renewed."""

    async def look() -> Lease | None:
        again = await read(store, first.token)
        return None if again.renewed_at == first.renewed_at else again

    again = await until(look)
    assert again is not None
    return again


async def test_a_lease_is_renewed_while_it_is_held(store: Store) -> None:
    async with publisher_lease(store, SERVICE, "run-000001", ttl_seconds=4) as lease:
        first = await read(store, lease.token)
        again = await renewed(store, first)
        assert again.expires_at > first.expires_at
        await check_lease(store, lease)


async def test_a_lease_that_was_not_renewed_in_time_is_lost(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path))
    async with publisher_lease(store, SERVICE, "run-000001") as lease:
        mine = await read(store, lease.token)
        past = mine.model_copy(update={"expires_at": mine.renewed_at - timedelta(seconds=1)})
        await write(store, past)
        with pytest.raises(LeaseLostError) as caught:
            await check_lease(store, lease)
    assert str(caught.value) == (
        "the lease is lost: this cycle's own, token 1, ran out at"
        f" {past.expires_at:%H:%M:%S} UTC and was not renewed; nobody has taken it: start the cycle"
        " again, it goes on"
    )


async def test_another_run_of_the_same_cycle_is_said_to_be_one(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path))
    async with publisher_lease(store, SERVICE, "run-000001") as lease:
        with pytest.raises(
            LeaseLostError, match=r"'run-000001': another run of this cycle, process \d+, holds it"
        ):
            async with publisher_lease(store, SERVICE, "run-000001"):
                pass
        mine = await read(store, lease.token)
        await write(store, mine.model_copy(update={"token": 2, "nonce": uuid.uuid4().hex}))
        with pytest.raises(
            LeaseLostError, match="'run-000001': another run of this cycle, token 2, has taken over"
        ):
            await check_lease(store, lease)


async def test_a_token_of_another_process_is_not_ours(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path))
    await write(store, stored_lease(3, seconds_left=60))
    with pytest.raises(LeaseLostError, match="'other-000001': its object, token 3, was replaced"):
        await check_lease(store, stored_lease(3, seconds_left=60))


async def test_an_unreadable_lease_stops_everybody(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path))
    await store.put_bytes(b"not json", lease_log(store, SERVICE).path(5))
    with pytest.raises(StoreError, match="not a lease"):
        async with publisher_lease(store, SERVICE, "run-000001"):
            pass


async def test_an_error_inside_gives_the_lease_back(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        async with publisher_lease(store, SERVICE, "run-000001") as lease:
            raise ZeroDivisionError
    assert (await read(store, lease.token)).released


async def test_unfinished_uploads_of_earlier_publishers_are_removed(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path))
    await store.put_bytes(b"x", "a")
    (tmp_path / "_hotload/partial/1-dead").write_bytes(b"half")
    async with publisher_lease(store, SERVICE, "run-000001"):
        assert not (tmp_path / "_hotload/partial/1-dead").exists()


@dataclass(frozen=True, eq=False)
class SlowToTidy(Store):
    """Tidies until the lease was renewed, and keeps what the lease was then."""

    leases: list[Lease] = field(default_factory=list)

    async def abort_orphaned_uploads(self, prefix: str = "") -> int:
        first = await read(self, 1)
        self.leases.extend([first, await renewed(self, first)])
        return await super().abort_orphaned_uploads(prefix)


async def test_the_lease_is_renewed_while_earlier_uploads_are_removed(tmp_path: Path) -> None:
    store = SlowToTidy(url=str(tmp_path))
    async with publisher_lease(store, SERVICE, "run-000001", ttl_seconds=4):
        first, again = store.leases
    assert again.expires_at > first.expires_at


HOLDER = """
    import asyncio, sys
    from hotload.clients.store import Store, publisher_lease

    async def main():
        async with publisher_lease(Store(url=sys.argv[1]), "local/rollouts", "killed-000001"):
            print("holding", flush=True)
            await asyncio.Event().wait()

    asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_killed_publisher_on_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path))
    program = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    holder = subprocess.Popen(program, stdout=subprocess.PIPE)  # noqa: ASYNC220 - does not wait
    try:
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == b"holding\n"
        with pytest.raises(LeaseLostError, match="killed-000001"):
            async with publisher_lease(store, SERVICE, "run-000002"):
                pass
        # Not reaped yet, so the process is a zombie: still listed, no longer alive.
        holder.send_signal(signal.SIGKILL)
        assert await asyncio.to_thread(holder.stdout.read) == b""
        killed = (await read(store, 1)).process
        while is_running(killed):  # noqa: ASYNC110 - nothing announces the death of a process
            await asyncio.sleep(0)
        async with publisher_lease(store, SERVICE, "run-000002") as lease:
            assert lease.token == 2
        holder.wait()
        assert is_running(killed) is False
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


def test_this_process_runs_and_one_with_its_number_and_another_start_does_not() -> None:
    me = this_process()
    assert is_running(me)
    assert not is_running(me.model_copy(update={"started": "1"}))


def test_an_entry_s_path_names_its_number_and_other_names_are_no_entries(tmp_path: Path) -> None:
    log = lease_log(Store(str(tmp_path)), SERVICE)
    for number in (1, 10, 10**10 - 1):
        assert log.number_of(log.path(number).rpartition("/")[2]) == number
    others = [
        "",
        "x.json",
        "0000000009.json.tmp",
        "00000000099.json",
        "0000000000.json",
        "٠٠٠٠٠٠٠٠٠١.json",
    ]
    assert [log.number_of(name) for name in others] == [None] * len(others)
    assert claims_log(log.store, "claims/part").number_of("000000.json") == 0


# Several services of one store


async def test_services_are_held_apart_and_what_another_uploads_is_left_alone(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    async with publisher_lease(store, "acme/us", "run-000001"):
        (tmp_path / "_hotload/partial").mkdir(parents=True, exist_ok=True)
        half = tmp_path / "_hotload/partial/1-dead"
        half.write_bytes(b"half")
        async with publisher_lease(store, "acme/eu", "run-000002") as other:
            await check_lease(store, other)
            assert half.exists()
        with pytest.raises(LeaseLostError, match="run-000001"):
            async with publisher_lease(store, "acme/us", "run-000002"):
                pass
    async with publisher_lease(store, "acme/eu", "run-000002"):
        assert not half.exists()


async def test_a_removal_waits_for_every_service_and_they_for_it(store: Store) -> None:
    async with publisher_lease(store, "acme/us", "run-000001"):
        with pytest.raises(LeaseLostError, match="run-000001"):
            async with every_lease(store, ["acme/eu"]):
                pass
    async with every_lease(store, ["acme/eu"]) as leases:
        assert {lease.service for lease in leases} >= {"acme/us", "acme/eu"}
        for service in ("acme/us", "acme/eu"):
            with pytest.raises(LeaseLostError, match="held by 'retention'"):
                async with publisher_lease(store, service, "run-000001"):
                    pass
        with pytest.raises(LeaseLostError, match="snapshots are being removed"):
            async with publisher_lease(store, "acme/new", "run-000001"):
                pass
    async with publisher_lease(store, "acme/new", "run-000001"):
        pass


async def test_a_publisher_of_an_earlier_version_holds_up_every_service(store: Store) -> None:
    lease = stored_lease(1, seconds_left=60).model_copy(update={"service": ""})
    await store.put_bytes(lease.render(), lease_log(store, "").path(1))
    with pytest.raises(LeaseLostError, match="earlier version of hotload"):
        async with publisher_lease(store, "acme/us", "run-000002"):
            pass
    await store.put_bytes(lease.given_back().render(), lease_log(store, "").path(1))
    async with publisher_lease(store, "acme/us", "run-000002"):
        pass
