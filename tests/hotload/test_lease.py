"""Who may publish: decided from what is stored, a clock, and whether the holder's process lives."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.errors import StoreError
from hotload.publish.lease import Lease, Process, decide, loss

NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)
HERE = Process(host="host-a", pid=100, started="5")
THERE = Process(host="host-b", pid=100, started="5")
NOWHERE = Process(host=None, pid=100, started=None)


def lease(token: int = 7, *, process: Process = HERE, nonce: str = "0123456789abcdef") -> Lease:
    return Lease(
        token=token,
        nonce=nonce,
        holder="run-000001",
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
    assert decide(found, now=seconds(now), me=me, is_running=is_running).may_take is may_take


def test_a_host_that_cannot_name_itself_believes_no_process() -> None:
    decision = decide(lease(process=NOWHERE), now=NOON, me=NOWHERE, is_running=False)
    assert not decision.may_take


def test_the_reason_names_who_and_how_long() -> None:
    waiting = decide(lease(process=THERE), now=seconds(20), me=HERE, is_running=None)
    assert (
        waiting.reason == "process 100 on another host holds it for 40 s more unless it renews it"
    )
    gone = decide(lease(), now=seconds(20), me=HERE, is_running=False)
    assert "'run-000001' is gone: process 100" in gone.reason


@pytest.mark.parametrize(
    ("found", "now", "reason"),
    [
        (lease(), 59, None),
        (lease().renewed(seconds(50), 60), 100, None),
        (lease(), 60, "expired"),
        (lease(8), 1, "token 8 has taken over from token 7"),
        (lease(6), 1, "replaced"),
        (lease(nonce="f" * 16), 1, "replaced"),
        (lease().given_back(), 1, "given back"),
        (None, 1, "removed"),
    ],
)
def test_a_lease_is_lost_to_a_higher_token_to_time_or_to_whoever_replaces_it(
    found: Lease | None, now: float, reason: str | None
) -> None:
    said = loss(found, lease(), now=seconds(now))
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
