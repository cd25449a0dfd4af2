"""Who may publish: decided from what is stored, a clock, and whether the holder's process lives."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.errors import StoreError
from hotload.publish.lease import Lease, Process, decide, why_lost

NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)
HERE = Process(host="host-a", pid=100, started="5")
THERE = Process(host="host-b", pid=100, started="5")
NOWHERE = Process(host=None, pid=100, started=None)


def lease(
    token: int = 7,
    *,
    process: Process = HERE,
    nonce: str = "0123456789abcdef",
    holder: str = "run-000001",
) -> Lease:
    return Lease(
        token=token,
        nonce=nonce,
        holder=holder,
        process=process,
        renewed_at=NOON,
        expires_at=NOON + timedelta(seconds=60),
    )


def seconds(count: float) -> datetime:
    return NOON + timedelta(seconds=count)


@pytest.mark.parametrize(
    ("found", "now", "is_running", "may_take"),
    [
        (None, 0, None, True),
        (lease(), 1, True, False),
        (lease(), 1, None, False),
        (lease(), 1, False, True),
        (lease(), 60, True, True),
        (lease(process=THERE), 59.9, False, False),
        (lease(process=THERE), 60, None, True),
        (lease(process=NOWHERE), 59.9, False, False),
        (lease().given_back(), 1, True, True),
        (lease().renewed(seconds(50), 60), 100, True, False),
    ],
)
def test_a_lease_is_taken_when_it_is_free_expired_or_its_process_is_gone(
    found: Lease | None, now: float, is_running: bool | None, may_take: bool
) -> None:
    me = Process(host="host-a", pid=200, started="9")
    decision = decide(found, now=seconds(now), me=me, cycle="run-000002", is_running=is_running)
    assert decision.may_take is may_take


def test_a_host_that_cannot_name_itself_believes_no_process() -> None:
    decision = decide(
        lease(process=NOWHERE), now=NOON, me=NOWHERE, cycle="run-000002", is_running=False
    )
    assert not decision.may_take


def test_the_reason_names_who_and_how_long() -> None:
    def decided(cycle: str, process: Process, is_running: bool | None) -> str:
        held = lease(process=process)
        return decide(held, now=seconds(20), me=HERE, cycle=cycle, is_running=is_running).reason

    assert (
        decided("run-000002", THERE, None)
        == "process 100 on another host holds it for 40 s more unless it renews it;"
        " start again after that"
    )
    assert (
        decided("run-000001", THERE, None) == "another run of this cycle, process 100 on another"
        " host, holds it for 40 s more unless it renews it;"
        " start again after that"
    )
    assert "'run-000001' is gone: process 100" in decided("run-000002", HERE, False)


@pytest.mark.parametrize(
    ("found", "now", "reason"),
    [
        (lease(), 59, None),
        (lease().renewed(seconds(50), 60), 100, None),
        (lease(), 60, "this cycle's own, token 7, ran out at 12:01:00 UTC and was not renewed"),
        (lease(8, holder="run-000002"), 1, "token 8 has taken over from token 7"),
        (lease(8), 1, "another run of this cycle, token 8, has taken over from token 7"),
        (lease(6), 1, "replaced"),
        (lease(nonce="f" * 16), 1, "replaced"),
        (lease().given_back(), 1, "this cycle gave it back"),
        (None, 1, "removed"),
    ],
)
def test_a_lease_is_lost_to_a_higher_token_to_time_or_to_whoever_replaces_it(
    found: Lease | None, now: float, reason: str | None
) -> None:
    said = why_lost(found, lease(), now=seconds(now))
    assert said is None if reason is None else reason in str(said)


@given(
    token=st.integers(1, 10**10 - 1),
    holder=st.text(max_size=256),
    process=st.sampled_from([HERE, THERE, NOWHERE]),
    released=st.booleans(),
)
def test_a_lease_comes_back_from_its_bytes(
    token: int, holder: str, process: Process, released: bool
) -> None:
    stored = lease(token, process=process).model_copy(
        update={"holder": holder, "released": released}
    )
    assert Lease.parse(stored.render(), token=token, path="leases/7.json") == stored


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[1]", b"\xff", lease(8).render(), lease().render()[:-20],
     lease().render().replace(b'"released": false', b'"released": false, "more": 1')],
    ids=["empty", "object", "list", "bytes", "other token", "cut", "field"],
)  # fmt: skip
def test_what_is_not_the_lease_of_its_token_is_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"leases/7\.json.*delete it when no cycle is running"):
        Lease.parse(data, token=7, path="leases/7.json")
