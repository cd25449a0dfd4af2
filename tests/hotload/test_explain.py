"""A stuck chain in words: who serves what, what is missing, what to do next."""

from __future__ import annotations

from datetime import timedelta

import pytest

from hotload.identity import SnapshotKind
from hotload.publish.explain import explain_service
from hotload.publish.lease import Lease, Process
from hotload.publish.readiness import ReplicaStatus, ServiceStatus
from hotload.publish.retention import ManifestState, StoredSnapshot
from tests.factories import CREATED_AT, snapshot_manifest

FULL, DELTA, NEXT = "run-000001-00000001", "run-000002-00000002", "run-000003-00000003"
STORED = [
    StoredSnapshot.of(snapshot_manifest(FULL)),
    StoredSnapshot.of(snapshot_manifest(DELTA, previous=FULL)),
]
FOREIGN = "their-base"
LEASE = Lease(
    token=1,
    nonce="n" * 16,
    holder="run-000003",
    process=Process(host=None, pid=1, started=None),
    renewed_at=CREATED_AT,
    expires_at=CREATED_AT + timedelta(seconds=60),
)


def on(identity: str | None, stage: str = "idle", target: str | None = None) -> ReplicaStatus:
    return ReplicaStatus(True, identity, stage, target)


def unlike(state: ManifestState, detail: str = "") -> list[StoredSnapshot]:
    """The full one as it is, what follows it in doubt."""
    return [STORED[0], StoredSnapshot(DELTA, state, 1, detail=detail)]


@pytest.mark.parametrize(
    ("replicas", "stored", "seen", "next_step", "needs_person"),
    [
        ((), STORED, "no replica is listed", "bring a replica up", True),
        ((on(DELTA),) * 2, STORED, f"2 of 2 replicas hold {DELTA}, which follows {FULL}; 1 delta",
         "nothing to do: the next version can follow it", False),
        ((on(FULL),), STORED, f"1 of 1 replicas hold {FULL}", "nothing to do", False),
        ((on(DELTA), on(None, "error", DELTA)), STORED, f"{DELTA} on 1, base weights on 1",
         "nothing to do: the next cycle publishes a full snapshot by itself", False),
        ((on(FULL), on(FULL, "downloading", DELTA)), STORED, f"hold {FULL}",
         f"wait until {DELTA} is loaded", False),
        ((on(None),) * 2, STORED, f"newest in the store is {DELTA}",
         "start the last cycle again", True),
        ((on(None),), [], "base weights on 1", "the store holds no snapshot", False),
        ((on(FOREIGN),), STORED, f"hold {FOREIGN}", f"--adopt {FOREIGN}", True),
        ((on(NEXT),), STORED, f"hold {NEXT}", "whether this is the store", True),
        ((on(DELTA),), unlike(ManifestState.MISSING), "hold", "whether this is the store", True),
        ((on(DELTA),), unlike(ManifestState.NEWER), "newer version",
         "run the cycles with that version", True),
        ((on(DELTA),), unlike(ManifestState.UNREADABLE, "no JSON"), "cannot be read: no JSON",
         "the next cycle sets it aside", False),
        ((on(DELTA),), STORED[1:], f"the store lacks {FULL}", "force_full: true", True),
    ],
)  # fmt: skip
def test_what_is_seen_and_what_is_next(
    replicas: tuple[ReplicaStatus, ...],
    stored: list[StoredSnapshot],
    seen: str,
    next_step: str,
    needs_person: bool,
) -> None:
    told = explain_service(ServiceStatus(replicas), stored)
    assert seen in "; ".join(told.seen)
    assert next_step in told.next_step
    assert told.needs_person is needs_person


def test_a_lease_that_is_held_comes_first() -> None:
    told = explain_service(ServiceStatus((on(None),)), STORED, holder=LEASE)
    assert told.seen[-1].startswith("a lease is held by 'run-000003' until 00:01:00 UTC")
    assert told.next_step.endswith("start the cycle again after 00:01:00 UTC")
    assert not told.needs_person


def test_a_signal_that_no_replica_knows_is_named_once_it_may_matter() -> None:
    stored = [*STORED, StoredSnapshot.of(snapshot_manifest(NEXT, previous=DELTA))]
    served = ServiceStatus((on(DELTA),))
    told = explain_service(served, stored, signalled=[FULL, DELTA, NEXT])
    assert f"{NEXT} may have been signalled, and no replica knows it" in told.seen[1]
    assert len(explain_service(served, stored, signalled=[FULL, DELTA]).seen) == 1
    on_next = ServiceStatus((on(DELTA, "downloading", NEXT),))
    assert len(explain_service(on_next, stored, signalled=[NEXT]).seen) == 1
    assert len(explain_service(ServiceStatus((on(None),)), stored, signalled=[NEXT]).seen) == 2


def test_an_adapter_that_is_served_is_not_followed() -> None:
    adapter = StoredSnapshot.of(snapshot_manifest(NEXT, kind=SnapshotKind.LORA))
    replica = ReplicaStatus(True, None, "idle", adapters=((NEXT, "loaded"),))
    told = explain_service(ServiceStatus((replica,)), [adapter])
    assert f"hold {NEXT}" in told.seen[0]
    assert told.next_step == "nothing to do: the next version is whole again"


def test_every_replica_in_words_and_bounded() -> None:
    odd = ReplicaStatus(False, FULL, "defragmenting", DELTA)
    status = ServiceStatus((on(FULL),) * 2 + (on(None, "error", DELTA), odd))
    assert status.by_replica == (
        f"2 replicas: on {FULL}, ready",
        f"1 replica: on base weights, ready, error for {DELTA}",
        f"1 replica: on {FULL}, not ready, stage defragmenting",
    )
    many = ServiceStatus(tuple(on("x" * 9999 + str(number)) for number in range(99)))
    assert len(many.by_replica) == 1
    many = ServiceStatus(tuple(on(f"{number}") for number in range(99)))
    assert len(many.by_replica) == 17
    assert many.by_replica[-1] == "… and 83 more that differ"
