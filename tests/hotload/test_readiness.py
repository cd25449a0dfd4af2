"""assess: what a status means."""

import pytest

from hotload.identity import SnapshotKind
from hotload.publish.readiness import ReplicaStatus, ServiceStatus, Verdict, assess

NEW, OLD = "run-000002-00000000", "run-000001-00000000"
READY = ReplicaStatus(True, NEW, "completed", NEW)
SWAPPING = ReplicaStatus(False, NEW, "completed", NEW)
BEHIND = ReplicaStatus(True, OLD, "downloading", NEW)
FAILED = ReplicaStatus(True, OLD, "error", NEW, raw="{...}")
STALE = ReplicaStatus(True, NEW, "error", OLD)
ODD = ReplicaStatus(True, OLD, "defragmenting", NEW)


@pytest.mark.parametrize(
    ("replicas", "expected", "fraction", "verdict"),
    [
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
