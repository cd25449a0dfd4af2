"""What a status means: before a plan, and for the identity that is waited for."""

import pytest

from hotload.identity import SnapshotKind
from hotload.publish.preflight import is_answer_due
from hotload.publish.readiness import (
    ReplicaStatus,
    ServiceStatus,
    Standing,
    Verdict,
    assess,
    standing_of,
    what_is_missing,
)

NEW, OLD = "run-000002-00000000", "run-000001-00000000"
READY = ReplicaStatus(True, NEW, "completed", NEW)
SWAPPING = ReplicaStatus(False, NEW, "completed", NEW)
BEHIND = ReplicaStatus(True, OLD, "downloading", NEW)
FAILED = ReplicaStatus(True, OLD, "error", NEW, raw="{...}")
STALE = ReplicaStatus(True, NEW, "error", OLD)
ODD = ReplicaStatus(True, OLD, "defragmenting", NEW)
LEFT = ReplicaStatus(True, None, "idle")
SILENT = ReplicaStatus(True, None)
STARTING = ReplicaStatus(False, None, "idle")


ADAPTED = ReplicaStatus(True, None, "idle", adapters=((NEW, "loaded"),))
ADAPTING = ReplicaStatus(True, None, "idle", adapters=((NEW, "loading"),))


@pytest.mark.parametrize(
    ("replicas", "is_due", "is_due_elsewhere", "is_due_of_adapter"),
    [
        ((), False, False, False),
        ((STARTING, SWAPPING), False, False, False),
        ((BEHIND, BEHIND), False, False, False),
        ((LEFT, SILENT), False, True, False),
        ((STARTING, LEFT), False, True, False),
        ((SWAPPING, READY), True, True, False),
        ((BEHIND, STALE), True, True, False),
        ((FAILED, ODD), True, True, False),
        ((LEFT, ADAPTING), False, True, False),
        ((LEFT, ADAPTED), False, True, True),
    ],
)
def test_when_a_404_is_a_wrong_address(
    replicas: tuple[ReplicaStatus, ...],
    is_due: bool,
    is_due_elsewhere: bool,
    is_due_of_adapter: bool,
) -> None:
    def due(*, is_adapter: bool, is_same: bool) -> bool:
        return is_answer_due(
            ServiceStatus(replicas), is_adapter=is_adapter, is_asked_as_status_was=is_same
        )

    assert due(is_adapter=False, is_same=True) is is_due
    assert due(is_adapter=False, is_same=False) is is_due_elsewhere
    for is_same in (True, False):
        assert due(is_adapter=True, is_same=is_same) is is_due_of_adapter


@pytest.mark.parametrize(
    ("replicas", "expected", "fraction", "verdict"),
    [
        ((LEFT, LEFT), None, 1.0, Verdict.LOST),
        ((LEFT, BEHIND), None, 1.0, Verdict.WAITING),
        ((LEFT, READY), None, 1.0, Verdict.WAITING),
        ((LEFT, ODD), None, 1.0, Verdict.WAITING),
        ((LEFT, SILENT), None, 1.0, Verdict.WAITING),
        ((LEFT, STARTING), None, 1.0, Verdict.WAITING),
        ((READY, READY), None, 1.0, Verdict.READY),
        ((READY, BEHIND), None, 1.0, Verdict.WAITING),
        ((READY, SWAPPING), None, 1.0, Verdict.WAITING),
        ((READY, ODD), None, 1.0, Verdict.WAITING),
        ((READY, FAILED), None, 1.0, Verdict.FAILED),
        ((READY, STALE), None, 1.0, Verdict.READY),
        ((), None, 1.0, Verdict.WAITING),
        ((), 3, 0.1, Verdict.WAITING),
        ((READY, READY), 3, 1.0, Verdict.WAITING),
        ((READY, READY, READY), 3, 1.0, Verdict.READY),
        ((READY, READY, BEHIND), 3, 2 / 3, Verdict.READY),
        ((READY, BEHIND, BEHIND), 3, 2 / 3, Verdict.WAITING),
        ((READY, FAILED, READY), 3, 2 / 3, Verdict.FAILED),
    ],
)
def test_every_expected_replica_by_exact_identity(
    replicas: tuple[ReplicaStatus, ...], expected: int | None, fraction: float, verdict: Verdict
) -> None:
    seen = assess(
        ServiceStatus(replicas),
        NEW,
        SnapshotKind.DELTA,
        min_ready_fraction=fraction,
        expected_replica_count=expected,
    )
    assert seen.verdict is verdict, seen.detail


@pytest.mark.parametrize(
    ("replicas", "expected", "words"),
    [
        ((), None, "empty"),
        ((READY,), 3, "1 replicas are listed, 3 expected"),
        ((READY, BEHIND), None, f"{OLD} on 1"),
        ((SWAPPING,), None, "not ready"),
    ],
)
def test_the_detail_tells_the_cases_apart(
    replicas: tuple[ReplicaStatus, ...], expected: int | None, words: str
) -> None:
    seen = assess(ServiceStatus(replicas), NEW, SnapshotKind.FULL, expected_replica_count=expected)
    assert words in seen.detail


def test_an_adapter_is_ready_when_loaded_everywhere() -> None:
    loaded = ReplicaStatus(True, None, adapters=((NEW, "loaded"),))
    loading = ReplicaStatus(True, None, adapters=((NEW, "loading"),))
    failed = ReplicaStatus(True, None, adapters=((NEW, "failed"),))

    def verdict(*replicas: ReplicaStatus) -> Verdict:
        return assess(ServiceStatus(replicas), NEW, SnapshotKind.LORA).verdict

    assert verdict(loaded, loaded) is Verdict.READY
    assert verdict(loaded, loading) is Verdict.WAITING
    assert verdict(loaded, failed) is Verdict.FAILED


@pytest.mark.parametrize(
    ("loaded", "expected_count", "is_free"),
    [
        (["run-000002-00000000"], 1, True),
        (["run-000003-00000000"], 1, False),
        (["run-000002-000003-00000000"], 1, False),  # version 3 of a run named run-000002
        (["somebody-elses"], 1, False),
        ([None, "run-000002-00000000"], 2, True),
        ([None, None], 3, False),
        ([], 1, False),
    ],
)
def test_a_cycle_plans_beside_its_own_load_only(
    loaded: list[str | None], expected_count: int, is_free: bool
) -> None:
    replicas = [
        ReplicaStatus(True, OLD, "downloading" if target else "completed", target or OLD)
        for target in loaded
    ]
    missing = what_is_missing(ServiceStatus(tuple(replicas)), "run-000002", expected_count)
    assert (missing is None) is is_free


LATER = "run-000003-00000000"
ON_THE_WAY = ReplicaStatus(True, NEW, "downloading", LATER)


@pytest.mark.parametrize(
    ("replicas", "standing"),
    [
        ((READY, READY), Standing.SERVED),
        ((READY, BEHIND), Standing.NOT_SERVED),
        ((), Standing.NOT_SERVED),
        ((LEFT, LEFT), Standing.NOT_SERVED),
        ((ReplicaStatus(True, LATER), ReplicaStatus(True, LATER)), Standing.SUPERSEDED),
        ((ReplicaStatus(True, LATER), ON_THE_WAY), Standing.SUPERSEDED),
        ((ReplicaStatus(True, LATER), READY), Standing.SUPERSEDED),
        ((ReplicaStatus(True, LATER), LEFT), Standing.NOT_SERVED),
        ((ReplicaStatus(True, "other-000009-00000000"),) * 2, Standing.NOT_SERVED),
        ((ReplicaStatus(True, OLD), ReplicaStatus(True, OLD)), Standing.NOT_SERVED),
    ],
)
def test_how_an_earlier_publication_stands(
    replicas: tuple[ReplicaStatus, ...], standing: Standing
) -> None:
    status = ServiceStatus(replicas)
    assert standing_of(NEW, status, run_id="run", policy_version=2) is standing
    # An adopted base has a name of its own, and a version all the same.
    if standing is Standing.SUPERSEDED:
        assert standing_of("base", status, run_id="run", policy_version=2) is not Standing.SERVED
