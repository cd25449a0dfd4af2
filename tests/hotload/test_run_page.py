"""The page of a run says what its rows say, escapes what others wrote, and does without what is
missing."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hotload.errors import StoreError
from hotload.publish.snapshot import SnapshotManifest
from hotload.report.chart_shapes import Dot, Line, curves, dots, layers, time_ticks
from hotload.report.run_history import (
    RunHistory,
    RunVersion,
    last_metrics,
    reports_of,
)
from hotload.report.run_page import Link, links, render_run
from tests.hotload.test_page import EVIL, Page, report

ENDED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def identity(version: int) -> str:
    return f"run-{version:06d}-0123abcd"


def row(version: int, **changes: Any) -> RunVersion:
    fields: dict[str, Any] = {
        "policy_version": version,
        "identity": identity(version),
        "kind": "delta" if version % 3 else "full",
        "previous": identity(version - 1) if version % 3 else None,
        "outcome": "published",
        "fallback_reason": None,
        "size_bytes": 2_000_000 if version % 3 else 100_000_000,
        "content_size_bytes": 100_000_000,
        "replica_count": 2,
        "seconds": 300.0,
        "publish_seconds": 20.0,
        "signal_seconds": 1.0,
        "converge_seconds": 9.0,
        "rollout_seconds": 200.0,
        "sample_count": 100,
        "failed_sample_count": version,
        "request_count": 120,
        "failed_request_count": 6,
        "mean_reward": 0.1 * version,
        "reward_std": 0.25,
        "drift_k3": 0.0004,
        "drift_version": max(version - 1, 0),
        "ended_at": ENDED,
    }
    return RunVersion.model_validate(fields | changes)


def history(*rows: RunVersion) -> RunHistory:
    return RunHistory(run_id="run").adding(rows)


def page(*rows: RunVersion, unfinished: tuple[SnapshotManifest, ...] = ()) -> Page:
    text = render_run(history(*rows), unfinished)
    read = Page(text)
    assert read.open == []
    assert not {"nan", "inf", "none", "null"} & set(read.text.casefold().split())
    assert not {"script", "img", "link", "iframe", "a"} & set(read.tags)
    assert "default-src 'none'" in text
    return read


RUN = [row(version) for version in range(3, 9)]


@pytest.mark.parametrize(
    "said",
    [
        "When the last cycle ended, on 2026-01-02 at 03:04 UTC, 2 replicas served version 8",
        ", 2 deltas after the full snapshot of version 6.",
        "versions 6 6 published",
        "last mean reward 0.800 ± 0.250",
        "sent 208 MB of 600 MB in checkpoints",
        "median cycle 5 min last 5 min",
        "fallbacks 0 0 % of the published",
        "without a reward 5.5 % of 600 samples",
        "8 served delta 2 2.0 MB 0.800 ± 0.250 8 % 5 min run-000008-0123abcd",
        "6 full 100 MB 0.600 ± 0.250 6 % 5 min run-000006-0123abcd",
    ],
)
def test_the_page_says(said: str) -> None:
    assert said in page(*RUN).text


def test_what_is_served_rests_on_its_chain_alone() -> None:
    served = [dict(read)["class"] for read in rows_of(render_run(history(*RUN)))]
    assert served == ["served"] * 3 + [None] * 3  # the newest first
    assert links(RUN)[identity(8)] == Link("6", 2)
    # The full snapshot of the first chain was published before these rows.
    assert links(RUN[1:])[identity(5)] == Link("4", None)


def rows_of(text: str) -> list[dict[str, str | None]]:
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    return [
        {"class": "served" if 'class="served"' in part.partition(">")[0] else None}
        for part in body.split("<tr")[1:]
    ]


def test_a_fallback_is_told_with_its_reason() -> None:
    fallen = row(8, kind="full", previous=None, outcome="fell back", fallback_reason="torn base")
    read = page(*RUN[:-1], fallen)
    assert "Version 8 fell back to a full snapshot: torn base" in read.text
    assert "8 served fell back full" in read.text
    assert "full after a fallback" in read.text
    many = [row(i, kind="full", previous=None, outcome="fell back") for i in range(9)]
    assert page(*many).text.count("fell back to a full snapshot") == 5
    assert "4 earlier fallbacks." in page(*many).text


def test_a_version_that_was_not_due_is_in_no_chain() -> None:
    skipped = row(9, identity=identity(8), outcome="not due", kind="delta", previous=identity(7))
    read = page(*RUN, skipped)
    assert "2 replicas served version 8 , 2 deltas after" in read.text
    assert "9 not due – – 0.900" in read.text
    assert "8 served delta 2" in read.text
    assert "versions 7 6 published" in read.text
    # Of a run of which only that is known.
    assert "2 replicas served version 8 ." in page(skipped).text


@pytest.mark.parametrize("count", [1, 3, 250])
def test_values_that_are_missing_leave_gaps(count: int) -> None:
    bare = {"mean_reward": None, "reward_std": None, "drift_k3": None, "drift_version": None}
    nothing = bare | {
        "ended_at": None, "size_bytes": 0, "content_size_bytes": 0, "sample_count": 0,
        "failed_sample_count": 0, "request_count": 0, "failed_request_count": 0, "seconds": 0,
        "publish_seconds": 0, "signal_seconds": 0, "converge_seconds": 0, "rollout_seconds": 0,
    }  # fmt: skip
    empty = page(*(row(i, **nothing) for i in range(count)))
    for heading in ("Reward", "Bytes sent", "Failures", "Trainer against sampler"):
        assert heading not in empty.words
    some = page(*(row(i, **(bare if i % 2 else {})) for i in range(count)))
    assert "Reward" in some.words
    shown = [word for word in some.words if word.startswith("run-")]
    assert len(shown) == min(count, 200) + 1
    assert ("50 older versions are in the charts alone." in some.text) == (count == 250)


def test_what_others_wrote_is_text_and_nothing_else() -> None:
    evil = row(
        8, identity=EVIL, previous=EVIL, outcome="fell back", fallback_reason=EVIL, kind="delta"
    )
    made = RunHistory(run_id=EVIL).adding([evil])
    text = render_run(made, ())
    read = Page(text)
    assert read.open == []
    assert not {"script", "img"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name == "src"]
    assert (
        read.text.count("</pre><script>alert('x')</script>") == 6
    )  # title, heading, identity thrice, reason
    assert "\x1b" not in text
    assert "␛[31m␀" in read.text


def test_a_snapshot_whose_cycle_goes_on_is_shown() -> None:
    manifest = SnapshotManifest(
        identity=identity(9), run_id="run", policy_version=9, kind="full", previous=None,
        anchor=identity(9), chain_length=0, attempt=0, reason="", content_sha256="0" * 64,
        codec="none", checksum="none", shards=(), side_files=(), created_at=ENDED,
    )  # fmt: skip
    assert "9 cycle not ended full 0 B" in page(*RUN, unfinished=(manifest,)).text


def test_a_row_is_made_of_report_and_metrics() -> None:
    metrics = {
        "at": ENDED.isoformat(),
        "rollout/reward_std": 0.4,
        "rollout/trainer_drift_k3": 0.001,
        "async/trained_against_version": 2,
    }
    made = RunVersion.of(report(), metrics)
    assert (made.policy_version, made.kind, made.size_bytes) == (3, "delta", 2_000_000)
    assert (made.publish_seconds, made.converge_seconds, made.rollout_seconds) == (2.0, 3.0, 10.0)
    assert (made.sample_count, made.failed_sample_count) == (5, 1)
    assert (made.request_count, made.failed_request_count) == (12, 6)
    assert (made.mean_reward, made.reward_std, made.drift_k3) == (0.75, 0.4, 0.001)
    assert (made.drift_version, made.ended_at) == (2, ENDED)
    bare = RunVersion.of(report(outcome="not due", fallback_reason="x" * 1000), {})
    assert (bare.publish_seconds, bare.reward_std, bare.ended_at) == (0, None, None)
    assert len(bare.fallback_reason or "") == 300
    with pytest.raises(ValidationError):
        RunVersion.of(report(), {"rollout/reward_std": math.inf})


def test_a_history_keeps_one_row_of_a_version_and_is_read_back() -> None:
    made = history(*RUN).adding([row(5, mean_reward=0.9), row(1)])
    assert [one.policy_version for one in made.versions] == [1, 3, 4, 5, 6, 7, 8]
    assert made.versions[3].mean_reward == 0.9
    assert RunHistory.parse_stored(made.render(), "x") == made


def test_names_of_reports() -> None:
    names = [
        "a-000001.json", "a-000001.html", "a-000001-000002.json", "b.c-1234567.json", "a-1.json",
        "a-00000x.json", "ab-000003.json", "a-000007.2.json", "a-000007.0.json",
    ]  # fmt: skip
    assert reports_of(names) == [
        ("a", 0, 1), ("a", 2, 7), ("a-000001", 0, 2), ("ab", 0, 3), ("b.c", 0, 1234567)
    ]  # fmt: skip


def test_the_last_line_of_metrics() -> None:
    assert last_metrics(b'{"a": 1}\n{"a": 2}\n\n') == {"a": 2}
    for data in (b"", b"[1]", b'{"a": 1}\n{"a"', b"[" * 100_000, b"\xff"):
        with pytest.raises(StoreError, match="last line"):
            last_metrics(data)


def test_moments_are_round_in_their_unit() -> None:
    assert time_ticks(63.4) == [0, 20, 40, 60]
    assert time_ticks(1200, 3) == [0, 600, 1200]
    assert time_ticks(4 * 3600, 4) == [0, 3600, 7200, 10800, 14400]
    assert time_ticks(0) == [0]


@given(
    st.lists(
        st.tuples(
            st.none() | st.floats(allow_nan=False, allow_infinity=False),
            st.none() | st.floats(0, allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_any_numbers_can_be_drawn(values: list[tuple[float | None, float | None]]) -> None:
    versions = range(len(values))
    means, spread = [mean for mean, _ in values], [std for _, std in values]
    drawn = [
        curves(versions, [Line(means, "main", spread)], "", str),
        curves(versions, [Line(spread, "main")], "", str, low=0),
        dots(versions, [Dot(std, "", "main") if std else None for std in spread], "", str),
        layers(versions, {"main": [std or 0 for std in spread]}, "", str),
    ]
    for svg in drawn:
        assert Page(svg).open == []
        assert "nan" not in svg
        assert "inf" not in svg


def test_the_rows_are_small() -> None:
    made = history(*(row(version) for version in range(1000)))
    assert len(made.render()) < 700_000
    assert len(json.loads(made.render())["versions"]) == 1000
