"""Lines of a run: their names, what supersedes what, and who may publish."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.errors import IdentityConflictError, InvalidIdentityError
from hotload.identity import (
    NamedVersion,
    SnapshotKind,
    cycle_name,
    cycle_of,
    is_of_run,
    line_of,
    read_cycle_name,
    read_identity,
    snapshot_identity,
    version_of,
)
from hotload.options import Cadence
from hotload.publish.chain import Chain, ChainState, PublishAttempt, plan_full, plan_next
from hotload.publish.lines import NO_LINES, Lines
from hotload.publish.readiness import ReplicaStatus, ServiceStatus, Standing, standing_of
from hotload.publish.retention import (
    ManifestState,
    StoredSnapshot,
    cycles_beyond,
    decide_retention,
    why_kept,
)
from hotload.publish.snapshot import CheckpointContent, SnapshotManifest, SnapshotPlan
from hotload.records import FileDigest
from hotload.report.run_page import links, render_run
from hotload.rollout.counts import GroupCounts, count_groups
from tests.factories import cycle_spec, provenance, scored_group, trajectory
from tests.hotload.test_run_page import RUN, history, row

# Names

RUN_IDS = st.one_of(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", fullmatch=True),
    # Such as look like a cycle of another run, or like a line of one.
    st.builds("{}-{:06d}.{}".format, st.just("run"), st.integers(0, 9999), st.integers(0, 12)),
    st.builds("{}-{:06d}".format, st.just("run"), st.integers(0, 9999)),
)
VERSIONS = st.integers(0, 10**9 - 1)
LINES = st.integers(0, 999)
NAMED = st.builds(NamedVersion, RUN_IDS, LINES, VERSIONS)


def identity(version: NamedVersion, attempt: int = 0) -> str:
    return snapshot_identity(
        version.run_id,
        version.policy_version,
        content_sha256="0" * 64,
        kind=SnapshotKind.FULL,
        previous=None,
        attempt=attempt,
        line=version.line,
    )


@given(NAMED, st.integers(0, 9))
def test_names_are_read_back(version: NamedVersion, attempt: int) -> None:
    name, made = (
        cycle_name(version.run_id, version.policy_version, version.line),
        identity(version, attempt),
    )
    assert len(made) <= 128
    assert read_cycle_name(name) == version
    assert read_identity(made) == version
    assert (line_of(made), version_of(made), cycle_of(made)) == (*version[1:], name)
    assert version_of(made, version.run_id) == version.policy_version
    assert re.fullmatch(re.escape(name) + "-[0-9a-f]{8}", made)


@given(NAMED, NAMED)
def test_no_two_cycles_have_one_name(one: NamedVersion, other: NamedVersion) -> None:
    names = {cycle_name(each.run_id, each.policy_version, each.line) for each in (one, other)} | {
        identity(each) for each in (one, other)
    }
    assert len(names) == 2 * len({one, other})
    assert is_of_run(identity(one), identity(other)) is (one.run_id == other.run_id)


def test_line_0_has_the_names_it_had() -> None:
    assert cycle_name("grpo7", 12) == "grpo7-000012"
    assert cycle_name("grpo7", 12, 3) == "grpo7-000012.3"
    facts = {"content_sha256": "a" * 64, "previous": None, "attempt": 1}
    assert (
        snapshot_identity("grpo7", 12, kind=SnapshotKind.FULL, **facts) == "grpo7-000012-9a6f2917"
    )


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("run-000003.1-000005", NamedVersion("run-000003.1", 0, 5)),
        ("run-000003-000005.2", NamedVersion("run-000003", 2, 5)),
        ("run.1-000003", NamedVersion("run.1", 0, 3)),
        *((f"run-000003{end}", None) for end in (".0", ".01", ".1000", ".", ".1.2", ".-1", ".x")),
    ],
)
def test_a_run_id_that_looks_like_a_line_is_none(name: str, version: NamedVersion | None) -> None:
    assert read_cycle_name(name) == version
    assert read_identity(f"{name}-0123abcd") == version


@pytest.mark.parametrize("line", [-1, 1000])
def test_a_line_that_cannot_be(line: int) -> None:
    with pytest.raises(InvalidIdentityError, match="line: expected 0 to 999"):
        cycle_name("run", 3, line)
    with pytest.raises(ValueError, match="line"):
        cycle_spec(line=line)


# Which version is the run's


@given(
    st.dictionaries(st.integers(1, 6), st.integers(0, 12), max_size=5),
    st.integers(0, 14),
    st.integers(0, 7),
)
def test_a_version_is_of_one_line(firsts: dict[int, int], version: int, line: int) -> None:
    lines = Lines(firsts)
    standing = [
        one
        for one in (0, *firsts)
        if (one == 0 or firsts[one] <= version) and not lines.is_superseded(one, version)
    ]
    assert standing == [lines.line_at(version)]
    before = lines.until(line)
    assert before.current <= line
    assert before.line_at(version) <= line
    assert lines.until(lines.current) == lines


def test_a_line_begins_at_its_first_version() -> None:
    lines = Lines.of([(0, 1), (1, 4), (1, 3), (0, 4), (2, 6)])
    assert lines == Lines({1: 3, 2: 6})
    assert [lines.line_at(version) for version in (2, 3, 5, 6, 9)] == [0, 1, 1, 2, 2]


# Who may publish

CONTENT = CheckpointContent(
    kind=SnapshotKind.FULL,
    shards=(FileDigest(file="a.safetensors", size_bytes=10, sha256="ab" * 32),),
    side_files=(),
)
OTHER = CONTENT.model_copy(
    update={"shards": (FileDigest(file="a.safetensors", size_bytes=10, sha256="cd" * 32),)}
)


def manifest(version: int, line: int = 0, run_id: str = "run") -> SnapshotManifest:
    full = plan_full(CONTENT, "first", run_id=run_id, policy_version=version, line=line)
    return SnapshotManifest.of(full, CONTENT, (), datetime(2026, 1, 1, tzinfo=UTC))


def plan(
    version: int,
    line: int,
    *,
    served: SnapshotManifest | None,
    lines: Lines = NO_LINES,
    content: CheckpointContent = CONTENT,
    attempts: tuple[PublishAttempt, ...] = (),
    may_go_back: bool = False,
    **cadence: int,
) -> SnapshotPlan:
    return plan_next(
        Chain(ChainState.CHAINED if served else ChainState.NEED_FULL, served),
        attempts,
        content,
        run_id="run",
        policy_version=version,
        cadence=Cadence.model_validate(cadence),
        line=line,
        lines=lines,
        may_go_back=may_go_back,
    )


def test_a_new_line_follows_what_is_served() -> None:
    served = manifest(4)
    first = plan(3, 1, served=served, content=OTHER)
    assert (first.kind, first.previous, first.line) == ("delta", served.identity, 1)
    assert first.identity.startswith("run-000003.1-")
    whole = plan(3, 1, served=None, content=OTHER)
    assert (whole.kind, whole.line) == ("full", 1)


@pytest.mark.parametrize(
    ("served", "lines"),
    [
        (manifest(3, 1), NO_LINES),
        (None, Lines({1: 3})),
        (manifest(4), Lines({1: 3})),
        (manifest(9, run_id="other"), Lines({1: 3})),
    ],
)
def test_an_older_line_may_not_publish(served: SnapshotManifest | None, lines: Lines) -> None:
    with pytest.raises(InvalidIdentityError, match=r"line 1 .* version 3, .* line 0: stop .* 2`"):
        plan(5, 0, served=served, lines=lines)
    assert plan(5, 0, served=served, lines=lines, may_go_back=True).line == 0
    assert plan(5, 1, served=served, lines=lines).line == 1


def test_within_a_line_versions_only_grow() -> None:
    with pytest.raises(InvalidIdentityError, match=r"serves version 4 .* raise `line` to 2"):
        plan(3, 1, served=manifest(4, 1), lines=Lines({1: 3}))
    stored = (PublishAttempt(manifest(3, 1), signalled=False),)
    with pytest.raises(IdentityConflictError, match=r"other content .* raise `line` to 2"):
        plan(3, 1, served=manifest(3, 1), attempts=stored, content=OTHER)


def test_the_first_of_a_line_is_published_whether_due_or_not() -> None:
    first = plan(3, 1, served=manifest(4), weight_sync_interval=4)
    assert (first.line, first.policy_version) == (1, 3)
    skipped = plan(5, 1, served=manifest(3, 1), weight_sync_interval=4)
    assert skipped.identity == manifest(3, 1).identity


@pytest.mark.parametrize(
    ("own", "served", "standing"),
    [
        (manifest(4), manifest(3, 1), Standing.SUPERSEDED),
        (manifest(2), manifest(3, 1), Standing.SUPERSEDED),
        (manifest(3, 1), manifest(4), Standing.NOT_SERVED),
        (manifest(3, 1), manifest(4, 1), Standing.SUPERSEDED),
        (manifest(3, 2), manifest(9, 1), Standing.NOT_SERVED),
        (manifest(4), manifest(3, 1, "run-000004"), Standing.NOT_SERVED),
    ],
)
def test_how_a_publication_stands_beside_a_line(
    own: SnapshotManifest, served: SnapshotManifest, standing: Standing
) -> None:
    status = ServiceStatus((ReplicaStatus(True, served.identity),))
    version = own.policy_version
    assert standing_of(own.identity, status, run_id="run", policy_version=version) is standing


# What a store keeps


def stored(version: int, line: int = 0, **changes: object) -> StoredSnapshot:
    return replace(StoredSnapshot.of(manifest(version, line)), **changes)


def kept(snapshots: list[StoredSnapshot], keep: int, **served: list[str]) -> set[tuple[int, int]]:
    decided = decide_retention(
        snapshots, served=served, pins=(), keep_versions=keep, grace_seconds=3600
    )
    versions = [row.snapshot.version for row in decided.rows if row.is_kept]
    return {(one.line, one.policy_version) for one in versions if one}


def test_the_last_versions_are_counted_along_the_line() -> None:
    snapshots = [stored(version) for version in (1, 2, 3, 4)] + [stored(3, 1), stored(4, 1)]
    assert kept(snapshots, 9) == {(0, 1), (0, 2), (1, 3), (1, 4)}
    assert kept(snapshots, 3) == {(0, 2), (1, 3), (1, 4)}
    assert kept(snapshots, 1) == {(1, 4)}


def test_what_is_superseded_stays_where_it_is_needed() -> None:
    follows = stored(3, 1, kind=SnapshotKind.DELTA, needs=(stored(4).identity,))
    assert kept([stored(3), stored(4), follows], 1) == {(0, 4), (1, 3)}
    served = {stored(3).identity: ["east"]}
    decided = decide_retention(
        [stored(3), stored(3, 1)], served=served, pins=(), keep_versions=1, grace_seconds=3600
    )
    assert all(row.is_kept for row in decided.rows)


def test_attempts_of_two_lines_are_not_those_of_one_cycle() -> None:
    snapshots = [stored(3), stored(3, 1, attempt=1)]
    assert why_kept(snapshots[1].identity, snapshots, served={}, pins=()) is None
    snapshots = [stored(3, 1, state=ManifestState.READ), stored(3, 1, attempt=1)]
    assert "later attempt" in str(why_kept(snapshots[1].identity, snapshots, served={}, pins=()))


def test_old_cycles_are_counted_along_the_line() -> None:
    names = [f"run-{version:06d}" for version in (1, 2, 3, 4)] + ["run-000003.1", "run-000004.1"]
    assert cycles_beyond(names, 9) == ("run-000003", "run-000004")
    assert cycles_beyond(names, 2) == tuple(names[:4])


# What a person sees, and what is counted


def test_the_page_of_a_run_follows_its_line() -> None:
    new = [
        row(
            version,
            line=1,
            kind="delta",
            identity=f"run-{version:06d}.1-0123abcd",
            previous=previous,
        )
        for version, previous in ((6, RUN[-1].identity), (7, "run-000006.1-0123abcd"))
    ]
    made = history(*RUN, *new)
    assert [one.order for one in made.standing] == [(0, 3), (0, 4), (0, 5), (1, 6), (1, 7)]
    text = render_run(made)
    assert text.count("superseded") == 3
    assert "served <b>version 7 of line 1</b>" in text
    assert links(made.versions)[new[-1].identity].length == 4


def test_versions_of_two_lines_are_no_steps_apart() -> None:
    def ahead(before: str, after: str) -> dict[int, int]:
        sample = trajectory(provenance=provenance(before, after))
        counts = count_groups([scored_group(sample)], GroupCounts(), run_id="run")
        assert counts.samples is not None
        return counts.samples.versions_ahead.by_value

    assert ahead("run-000003.1-00000000", "run-000005.1-00000000") == {2: 1}
    assert ahead("run-000004-00000000", "run-000003.1-00000000") == {}
