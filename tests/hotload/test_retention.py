"""What a store keeps: every rule by table, and invariants over stores that nobody wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hotload.cli.retention_table import retention_lines
from hotload.identity import SnapshotKind
from hotload.publish.retention import (
    ManifestState,
    OldCycle,
    Retention,
    StoredSnapshot,
    chain_of,
    cycles_beyond,
    decide_retention,
    monthly_cost,
    why_kept,
)
from hotload.spec import RetentionSpec
from tests.factories import snapshot_manifest

DAY = 86_400.0
SIZE = 1000


def name(version: int, attempt: int = 0, run: str = "run") -> str:
    return f"{run}-{version:06d}-{attempt:08x}"


def stored(
    version: int, *, previous: str | None = None, run: str = "run", attempt: int = 0, **fields: Any
) -> StoredSnapshot:
    """A snapshot with a manifest, full unless it follows another."""
    made: dict[str, Any] = {
        "identity": name(version, attempt, run),
        "state": ManifestState.READ,
        "size_bytes": SIZE,
        "run_id": run,
        "policy_version": version,
        "kind": SnapshotKind.DELTA if previous else SnapshotKind.FULL,
        "chain_length": 1 if previous else 0,
        "attempt": attempt,
        "needs": (previous,) if previous else (),
    }
    return StoredSnapshot(**made | fields)


def chain(first: int, last: int, run: str = "run") -> list[StoredSnapshot]:
    """A full snapshot of version `first`, and deltas up to `last`."""
    links = [stored(first, run=run)]
    for version in range(first + 1, last + 1):
        previous = links[-1]
        needs = tuple(dict.fromkeys((previous.identity, name(first, run=run))))
        links.append(
            stored(
                version,
                previous=previous.identity,
                run=run,
                needs=needs,
                chain_length=version - first,
            )
        )
    return links


def without_manifest(version: int, age: float, **fields: Any) -> StoredSnapshot:
    return StoredSnapshot(name(version), ManifestState.MISSING, SIZE, age_seconds=age, **fields)


def decide(
    snapshots: list[StoredSnapshot],
    *,
    served: tuple[str, ...] = (),
    pins: tuple[str, ...] = (),
    keep: int = 1,
) -> Retention:
    return decide_retention(
        snapshots,
        served=dict.fromkeys(served, ("rollouts",)),
        pins=pins,
        keep_versions=keep,
        grace_seconds=DAY,
    )


def reasons(retention: Retention) -> dict[int, str]:
    """Why the versions stay that stay."""
    return {
        int(row.snapshot.identity.split("-")[1]): row.reason
        for row in retention.rows
        if row.is_kept
    }


def removed(retention: Retention) -> list[int]:
    return [int(one.identity.split("-")[1]) for one in retention.removed]


# The rules


def test_the_last_versions_stay_with_what_they_need_and_the_rest_goes() -> None:
    retention = decide([*chain(1, 3), *chain(4, 7)], keep=2)
    assert reasons(retention) == {
        4: f"needed by {name(7)}",
        5: f"needed by {name(6)}",
        6: "one of the last 2 versions of its run",
        7: "one of the last 2 versions of its run",
    }
    assert removed(retention) == [3, 2, 1]  # a delta before what it follows
    assert (retention.kept_bytes, retention.removed_bytes) == (4 * SIZE, 3 * SIZE)
    assert not retention.obstacles
    assert not retention.notes


def test_what_is_served_stays_and_says_where() -> None:
    retention = decide_retention(
        [*chain(1, 4), *chain(5, 6)],
        served={name(2): ("east", "west")},
        pins=(),
        keep_versions=1,
        grace_seconds=DAY,
    )
    assert reasons(retention)[2] == "served by east, west"
    assert removed(retention) == [4]  # 3 follows what is served


def test_a_delta_on_what_is_served_stays_so_that_it_is_never_sent_twice() -> None:
    retention = decide([*chain(1, 5), stored(9)], served=(name(3),))
    assert "must not be sent twice" in reasons(retention)[4]
    assert removed(retention) == [5]


def test_what_is_pinned_stays_and_a_pin_of_what_is_gone_is_named() -> None:
    retention = decide([*chain(1, 4), stored(9)], pins=(name(2), name(77)))
    assert reasons(retention)[2] == "pinned"
    assert removed(retention) == [4, 3]
    assert retention.notes == (f"pinned, and not in the store: {name(77)}; unpin it",)


def test_every_run_has_last_versions_of_its_own() -> None:
    snapshots = [stored(1), stored(2), stored(1, run="old"), stored(2, run="old")]
    gone = {one.identity for one in decide(snapshots).removed}
    assert gone == {name(1), name(1, run="old")}


def test_attempts_of_a_kept_version_stay_and_later_ones_of_a_needed_version_too() -> None:
    """The next attempt is numbered after the last: no identity is used again."""
    failed = stored(4, previous=name(3), attempt=0)
    anchor = stored(4, attempt=1)
    refused = stored(4, attempt=2)
    later = [stored(n, previous=name(4, 1), needs=(name(4, 1),)) for n in (5, 6)]
    retention = decide([*chain(1, 3), failed, anchor, refused, *later])
    kept = {row.snapshot.identity for row in retention.rows if row.is_kept}
    # The failed delta does not hold on to the chain before it for ever.
    assert kept == {anchor.identity, refused.identity, name(6)}
    retention = decide([*chain(1, 3), failed, anchor], keep=1)
    assert not retention.removed


@pytest.mark.parametrize(
    ("snapshot", "fate"),
    [
        (without_manifest(9, DAY - 1), "unfinished, written 24 h ago"),
        (without_manifest(9, DAY), None),
        (without_manifest(9, 0.0, was_signalled=True), None),
    ],
)
def test_objects_without_a_manifest_go_when_they_are_old_or_were_to_go(
    snapshot: StoredSnapshot, fate: str | None
) -> None:
    retention = decide([stored(1), snapshot])
    assert reasons(retention).get(9) == fate
    assert removed(retention) == ([] if fate else [9])
    assert not retention.obstacles


def test_a_manifest_of_a_newer_version_stays_with_all_it_names_and_is_named() -> None:
    newer = StoredSnapshot(name(4), ManifestState.NEWER, SIZE, needs=(name(3),))
    retention = decide([*chain(1, 3), newer, stored(9), stored(5)])
    assert set(reasons(retention)) == {1, 2, 3, 4, 9}
    assert removed(retention) == [5]
    assert any(name(4) in note and "newer version" in note for note in retention.notes)


def test_an_unreadable_manifest_holds_every_snapshot_back_and_is_named() -> None:
    broken = StoredSnapshot(name(4), ManifestState.UNREADABLE, SIZE, detail="not JSON")
    retention = decide([*chain(1, 3), broken, stored(9), without_manifest(2, 9 * DAY)])
    assert not retention.removed
    (obstacle,) = retention.obstacles
    assert name(4) in obstacle
    assert "not JSON" in obstacle
    assert "delete that snapshot" in obstacle


@pytest.mark.parametrize(
    ("snapshots", "words"),
    [
        ([stored(1), stored(2)], "this store has nothing"),
        ([stored(1), stored(2), without_manifest(7, 9 * DAY)], "whose manifest is gone"),
    ],
)
def test_what_is_served_and_not_known_here_holds_every_snapshot_back(
    snapshots: list[StoredSnapshot], words: str
) -> None:
    retention = decide(snapshots, served=(name(7),))
    assert not retention.removed
    assert words in retention.obstacles[0]


@pytest.mark.parametrize("gap", [2, 3, 4])
def test_a_kept_chain_that_has_lost_a_manifest_holds_every_snapshot_back(gap: int) -> None:
    # Replicas load the objects all the same, and what they followed is no longer written anywhere.
    snapshots = chain(1, 5)
    snapshots[gap - 1] = without_manifest(gap, 9 * DAY, was_signalled=True)
    retention = decide([*snapshots, stored(9, run="other")])
    assert not retention.removed
    assert f"needs {name(gap)}, whose manifest is gone" in retention.obstacles[0]
    assert why_kept(name(gap - 1), snapshots, served={}, pins=())
    aged = [*snapshots, *chain(6, 7)]
    assert sorted(removed(decide(aged))) == [1, 2, 3, 4, 5]  # nothing that is kept leads there


def test_weights_that_somebody_else_named_are_no_obstacle() -> None:
    assert removed(decide([stored(1), stored(2)], served=("base-of-the-vendor",))) == [1]


def test_a_chain_that_is_broken_already_is_named() -> None:
    retention = decide([stored(5, previous=name(4))])
    assert retention.notes == (
        f"{name(5)} needs {name(4)}, which is not in the store: its chain is broken",
    )


def test_a_circle_in_manifests_ends() -> None:
    circle = [stored(1, previous=name(2)), stored(2, previous=name(1))]
    assert not decide(circle).removed
    assert len(decide([*circle, stored(3)]).removed) == 2
    assert chain_of(name(1), {one.identity: one for one in circle}) == (name(2), name(1))


def test_what_a_manifest_needs_is_what_it_follows_and_its_anchor() -> None:
    manifest = snapshot_manifest(
        name(3), previous=name(2), anchor=name(1), chain_length=2, policy_version=3
    )
    assert StoredSnapshot.of(manifest).needs == (name(2), name(1))
    assert StoredSnapshot.of(snapshot_manifest(name(1))).needs == ()


# By hand


@pytest.mark.parametrize(
    ("version", "served", "pins", "reason"),
    [
        (3, (), (), None),
        (3, (name(3),), (), "served by rollouts"),
        (3, (), (name(3),), "pinned; unpin it first"),
        (3, (name(2),), (), f"follows {name(2)}, which is served: must not be sent twice"),
        (2, (), (), f"needed by {name(3)}"),
        (1, (), (), f"needed by {name(2)} and 1 more; delete those first"),
    ],
)
def test_by_hand_only_what_nothing_needs_goes(
    version: int, served: tuple[str, ...], pins: tuple[str, ...], reason: str | None
) -> None:
    by_service = dict.fromkeys(served, ("rollouts",))
    assert why_kept(name(version), chain(1, 3), served=by_service, pins=pins) == reason


def test_by_hand_a_later_attempt_stays_while_an_earlier_one_does() -> None:
    attempts = [stored(1), replace(stored(1), identity=name(9), attempt=1)]
    kept = why_kept(name(9), attempts, served={}, pins=())
    assert kept == f"a later attempt of the cycle of {name(1)}; delete that first"
    assert why_kept(name(1), attempts, served={}, pins=()) is None


def test_by_hand_what_cannot_be_read_goes_and_nothing_else_until_then() -> None:
    broken = StoredSnapshot(name(4), ManifestState.UNREADABLE, SIZE, detail="not JSON")
    newer = StoredSnapshot(name(5), ManifestState.NEWER, SIZE)
    snapshots = [stored(1), broken, newer]
    assert why_kept(name(4), snapshots, served={}, pins=()) is None
    assert name(4) in str(why_kept(name(1), snapshots, served={}, pins=()))
    assert "newer version" in str(why_kept(name(5), snapshots, served={}, pins=()))


# Reports, and money


def test_the_oldest_ended_cycles_of_each_run_are_chosen() -> None:
    names = [f"a-{n:06d}" for n in (1, 2, 10)] + ["b-000001", "a-000001-000003", "latest"]
    assert cycles_beyond(names, 2) == ("a-000001",)
    assert cycles_beyond(names, 3) == ()
    assert cycles_beyond(names, 1) == ("a-000001", "a-000002")


def test_the_table_says_bytes_reasons_and_money() -> None:
    decided = decide([*chain(1, 2), stored(3, size_bytes=5 * 10**9)])
    old = OldCycle("run-000001", ("_hotload/reports/run-000001.json",), 10**9)
    retention = Retention(decided.rows, ("a doubt",), ("a note",), (old,))
    lines = list(retention_lines(retention, 0.02, is_done=False))
    assert lines[0].split() == ["snapshot", "kind", "bytes", "fate"]
    assert "5.0 GB  stays  one of the last 1 versions of its run" in lines[1]
    assert lines[-3:] == [
        "to be removed: 2 snapshots, the files of 1 old cycle, 1.0 GB, 0.02 a month; "
        "kept: 1 snapshot, 5.0 GB, 0.10 a month",
        "in doubt: a doubt",
        "note: a note",
    ]
    done = list(retention_lines(retention, None, is_done=True))
    assert (
        "removed: 2 snapshots, the files of 1 old cycle, 1.0 GB; kept: 1 snapshot, 5.0 GB" in done
    )
    assert monthly_cost(2_500_000_000, 0.02) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"price_per_gb_month": -0.01},
        {"price_per_gb_month": float("nan")},
        {"keep_versions": 0},
        {"keep_reports": 0},
        {"grace_hours": 0},
        {"services": ()},
        {"keep": 3},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RetentionSpec.model_validate(wrong)


# Stores that nobody wrote


@st.composite
def stores(draw: st.DrawFn) -> list[StoredSnapshot]:
    """Chains of two runs with failed attempts, in doubt here and there, in any order."""
    snapshots: list[StoredSnapshot] = []
    for run in ("a", "b"):
        heads: list[StoredSnapshot] = []
        for version in range(draw(st.integers(0, 12))):
            is_delta = bool(heads) and draw(st.booleans())
            head = draw(st.sampled_from(heads)) if is_delta else None
            attempts = draw(st.integers(1, 3))
            for attempt in range(attempts):
                previous = head if attempt == 0 else None
                heads.append(
                    stored(
                        version,
                        previous=previous.identity if previous else None,
                        run=run,
                        attempt=attempt,
                        chain_length=previous.chain_length + 1 if previous else 0,
                    )
                )
        snapshots += heads
    odd = st.sampled_from([ManifestState.NEWER, ManifestState.UNREADABLE])
    for version in draw(st.sets(st.integers(20, 24), max_size=2)):
        needs = draw(st.sets(st.sampled_from([one.identity for one in snapshots] or ["x"])))
        snapshots.append(StoredSnapshot(name(version), draw(odd), SIZE, needs=tuple(sorted(needs))))
    for version in draw(st.sets(st.integers(30, 33), max_size=3)):
        age = draw(st.sampled_from([0.0, DAY - 1, DAY, 9 * DAY]))
        snapshots.append(without_manifest(version, age, was_signalled=draw(st.booleans())))
    return draw(st.permutations(snapshots))


@given(stores(), st.data())
def test_nothing_that_is_kept_lacks_an_ancestor_and_nothing_needed_goes(
    snapshots: list[StoredSnapshot], data: st.DataObject
) -> None:
    names = [one.identity for one in snapshots]
    some = st.sets(st.sampled_from([*names, "elsewhere"]), max_size=4)
    served, pins = data.draw(some), data.draw(some)
    keep = data.draw(st.integers(1, 5))
    retention = decide(snapshots, served=tuple(served), pins=tuple(pins), keep=keep)

    assert sorted(row.snapshot.identity for row in retention.rows) == sorted(names)
    kept = {row.snapshot.identity for row in retention.rows if row.is_kept}
    there = {one.identity: one for one in snapshots}
    for identity in kept:
        assert set(there[identity].needs) & there.keys() <= kept
    assert not {one.identity for one in retention.removed} & (served | pins)
    in_doubt = [one for one in snapshots if one.state is ManifestState.UNREADABLE]
    assert not (in_doubt and retention.removed)
    for one in retention.removed:
        assert one.state in (ManifestState.READ, ManifestState.MISSING)
        if one.state is ManifestState.MISSING:
            assert one.was_signalled or one.age_seconds >= DAY
        newer = [
            other
            for other in snapshots
            if other.run_id == one.run_id
            and (other.policy_version or 0) > (one.policy_version or 0)
        ]
        assert one.state is ManifestState.MISSING or newer  # the newest version always stays
    # Killed after any number of removals, what is left of the chains is whole.
    left = set(names)
    for one in retention.removed:
        left.remove(one.identity)
        for identity in left:
            if there[identity].state is ManifestState.READ:
                assert one.identity not in there[identity].needs
    # What is left decides the same once more.
    rest = [there[identity] for identity in left]
    assert not decide(rest, served=tuple(served), pins=tuple(pins), keep=keep).removed
