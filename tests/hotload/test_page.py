"""The page of a cycle stands alone, escapes what others wrote, and says its report's numbers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.dataset.logprob_drift import LogprobDrift, TrainedAgainst
from hotload.dataset.rollout_plan import PartNotes, RolloutManifest, RolloutPart, summarize
from hotload.dataset.sample_extracts import ShownMessage, choose_extracts
from hotload.identity import SnapshotKind
from hotload.options import Groups
from hotload.publish.publication import Publication, ServedSnapshot
from hotload.publish.snapshot import CheckpointContent
from hotload.quantities import duration, number, percent, size
from hotload.records import Record
from hotload.report.chart_shapes import Bar, histogram, nice_ticks, steps, timeline
from hotload.report.cycle_page import render_report
from hotload.report.cycle_report import CycleReport
from hotload.report.metrics import cycle_metrics, json_lines, prometheus_text
from hotload.report.sample_statistics import SampleStatistics
from hotload.reward.advantages import advantages
from hotload.rollout.counts import GroupCounts, SampleCounts, count_groups
from hotload.rollout.group_rules import judge_group
from hotload.rollout.trajectory import Problem, Provenance, ScoredGroup, Segment, Trajectory
from tests.factories import cycle_spec

SHA = "0" * 64
NOW, NEXT = "run-000003-0123abcd", "run-000004-0123abcd"
EVIL = "</pre><script>alert('x')</script><img src=http://evil.example/x.png>\x1b[31m\x00"
ENDED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def segment(tokens: int) -> Segment:
    return Segment((1, 2), tuple(range(tokens)), (-0.5,) * tokens, (True,) * tokens)


def sample(number: int, tokens: int = 2, **changes: Any) -> Trajectory:
    made = Trajectory(
        problem_id="p",
        sample_number=number,
        seed=number,
        provenance=Provenance(NOW, f"r{number}", "s", 1, (NOW,), NOW, "replica-0"),
        latency_seconds=1.0 + number,
        segments=(segment(tokens),),
        text="four",
        finish_reason="stop" if number else "length",
        prompt_token_count=4,
        cached_prompt_token_count=1,
        completion_token_count=tokens,
    )
    return replace(made, **changes)


SWAPPED = Provenance(NOW, "r1", "s", 2, (NOW, NEXT), NEXT)
CHAT = ({"role": "user", "content": EVIL}, {"role": "assistant", "content": ["part"], "tool": 1})
SAMPLES = (
    sample(0, text=EVIL),
    sample(
        1,
        provenance=SWAPPED,
        turn_count=2,
        completion_token_count=3,
        transcript=CHAT,
        segments=(segment(2), Segment((3,), (4, 5), (-1.5, 0.0), (True, False))),
    ),
    sample(2, 0, text="", failure="timeout", detail=EVIL),
)
UNIFORM = tuple(replace(sample(number), problem_id="q") for number in range(2))


def group(samples: tuple[Trajectory, ...], rewards: tuple[float | None, ...]) -> ScoredGroup:
    name = samples[0].problem_id
    mark = None if all(reward is not None for reward in rewards) else "partial"
    problem = Problem(name, EVIL, answer=EVIL)
    return ScoredGroup(problem, samples, rewards, advantages(rewards), mark=mark)


GROUPS = [
    group(SAMPLES, (1.0, 0.0, None)),
    replace(group(UNIFORM, (1.0, 1.0)), mark="uniform"),
]


def part_of(*groups: ScoredGroup) -> RolloutPart:
    marks = Counter(one.mark for one in groups if one.mark)
    rules = GroupCounts(groups_by_mark=marks, raw_samples=5)
    notes = PartNotes(**dict(count_groups(groups, rules, run_id="run")))
    return notes.part(file="part-00000-00.parquet", size_bytes=9, sha256=SHA, digest=SHA)


PART = part_of(*GROUPS)


def manifest_of(*parts: RolloutPart, groups: Sequence[ScoredGroup] = ()) -> RolloutManifest:
    return RolloutManifest(
        identity=NOW,
        policy_version=3,
        digest=SHA,
        parts=parts,
        summary=summarize(NOW, parts, parts_uri="", seconds=10.0),
        extracts=choose_extracts(groups),
        created_at=ENDED,
    )


def statistics(*groups: ScoredGroup) -> SampleStatistics:
    groups = groups or tuple(GROUPS)
    found = SampleStatistics.of(manifest_of(part_of(*groups), groups=groups))
    assert found is not None
    return found


def report(*groups: ScoredGroup, **changes: Any) -> CycleReport:
    snapshot = ServedSnapshot(
        identity=NOW,
        policy_version=3,
        kind=SnapshotKind.DELTA,
        previous="run-000002-0123abcd",
        reason=f"every replica serves {EVIL}",
        size_bytes=2_000_000,
        content_size_bytes=100_000_000,
        replica_count=2,
        seconds_by_stage={"publish": 2.0, "signal": 0.1, "converge": 3.0, "encode": 4.0},
        began_at=ENDED - timedelta(seconds=19),
        convergence=((0.0, 0), (1.0, 1), (3.0, 2)),
        warnings=(EVIL,),
    )
    rollouts = summarize(
        NOW,
        [part_of(*groups) if groups else PART],
        parts_uri="file:///bucket/_hotload/rollouts/x",
        seconds=10.0,
        window_trace=((0.0, 8, 8), (5.0, 4, 3), (10.0, 6, 5)),
    ).model_copy(
        update={
            "groups": GroupCounts(
                groups_by_mark={"partial": 1, "uniform": 1},
                dropped_groups={"uniform": 2},
                asked_again={"timeout": 3},
                failed_attempts={"truncated": 1, "429": 3, "404": 1, "cancelled": 1},
                raw_samples=9,
                raw_reward_count=4,
                raw_reward_sum=0.0,
                attempts=12,
            )
        }
    )
    made = CycleReport(
        name="run-000003",
        policy_version=3,
        content_sha256=SHA,
        outcome="published",
        snapshot=snapshot,
        rollouts=rollouts,
        seconds=20.0,
    )
    return made.model_copy(update=changes)


class Page(HTMLParser):
    """Collects what a browser would act on, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "line", "rect", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(made: CycleReport | None = None, found: SampleStatistics | None = None) -> str:
    return render_report(
        made or report(), found or statistics(), ended_at=ENDED, rollouts_ended_at=ENDED
    )


def test_what_others_wrote_is_text_and_nothing_else() -> None:
    read = Page(page())
    assert read.open == []
    assert not {"script", "img", "link", "iframe", "a"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert not {"src", "href", "xlink:href"} & {name for name, _ in read.attributes}
    # It is there to be read, with controls made visible.
    assert "</pre><script>alert('x')</script>" in read.text
    assert "␛[31m␀" in read.text
    assert "\x1b" not in page()


def evil(value: Any) -> Any:
    """The value with every text in it, names of counts included, replaced by a hostile one."""
    if isinstance(value, dict):
        return {f"{name}{EVIL}": evil(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(evil, value))
    return EVIL if type(value) is str else value


def test_a_report_of_nothing_but_hostile_text() -> None:
    made = report(fallback_reason="x")

    def poisoned(record: Record) -> dict[str, Any]:
        fields = {name: getattr(record, name) for name in type(record).model_fields}
        return {
            name: each if name in {"seconds_by_stage", "outcome"} else evil(each)
            for name, each in fields.items()
            if not isinstance(each, Record)
        }

    groups = made.rollouts.groups.model_copy(update=poisoned(made.rollouts.groups))
    rollouts = made.rollouts.model_copy(update=poisoned(made.rollouts) | {"groups": groups})
    snapshot = made.snapshot.model_copy(update=poisoned(made.snapshot))
    # JSON may hold half a surrogate pair, which no UTF-8 can.
    said = (ShownMessage("", EVIL), ShownMessage(f"{EVIL}\ud800", f"{EVIL}\ud800"))
    texts = ("problem_id", "expected", "detail", "mark", "failure", "weights", "finish_reason")
    update = dict.fromkeys(texts, EVIL) | {"messages": said, "reward_parts": {EVIL: 1.0}}
    counted = statistics()
    shown = tuple(
        replace(one, extract=one.extract.model_copy(update=update)) for one in counted.shown
    )
    text = page(
        made.model_copy(update=poisoned(made) | {"snapshot": snapshot, "rollouts": rollouts}),
        replace(counted, shown=shown),
    )
    assert text.encode()
    read = Page(text)
    assert read.open == []
    assert not {"script", "img"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name == "src"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    # What was asked for is seen: title, heading, reason, both notes, footer, samples and counts.
    assert read.text.count("<script>alert") > 40


def test_nothing_is_loaded_from_anywhere() -> None:
    text = page()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in style
    assert 'name="viewport"' in text


@pytest.mark.parametrize(
    "told",
    [
        "delta of 2.0 MB , 2 % of the checkpoint, reached 2 replicas 3 s after the signal",
        "5 samples of 2 problems came back in 10 s, with a mean reward of 0.750",
        "Fetched by 2 replicas: 4.0 MB instead of 200 MB",
        "timeout 1 · 20 %",
        "4 samples; in 75 % of the groups all are equal",  # with the two that were dropped
        "groups dropped uniform 2",
        "samples asked for again timeout 3",
        "highest reward",
        "two versions of the weights",
        f"{NOW} → {NEXT}",
        "requests per sample 1.33",
        "Requests without an answer Sent again or given up; share of 12 requests",
        "HTTP 429 3 · 25 % truncated 1 · 8.3 % HTTP 404 1 · 8.3 % cancelled 1 · 8.3 %",
        "prompt tokens from the cache",
        "2026-01-02 03:04:05 UTC",
    ],
)
def test_the_page_says(told: str) -> None:
    assert told in Page(page()).text


def test_a_page_of_nothing() -> None:
    empty = report(
        rollouts=summarize(NOW, [], parts_uri="", seconds=0),
        snapshot=ServedSnapshot(
            identity=NOW,
            policy_version=2,
            kind=SnapshotKind.FULL,
            previous=None,
            reason="",
            size_bytes=0,
            content_size_bytes=0,
            replica_count=0,
        ),
        outcome="not due",
        seconds=0.0,
    )
    read = Page(render_report(empty, SampleStatistics(SampleCounts()), ended_at=ENDED))
    assert read.open == []
    assert "version 2 was sampled again on 0 replicas" in read.text
    assert "0 samples of 0 problems came back" in read.text
    for heading in ("Rewards", "Latency", "Throughput", "Replicas converge", "Samples without"):
        assert heading in Page(page()).text
        assert heading not in read.text
    assert "nan" not in read.text.casefold().split()


def test_requests_without_an_answer_are_told_in_the_table_too() -> None:
    told = {row["what"]: row["value"] for row in report().rows()}
    assert told["requests sent again or given up"] == (
        "3 × HTTP 429, 1 × truncated, 1 × HTTP 404, 1 × cancelled"
    )
    quiet = report(rollouts=summarize(NOW, [], parts_uri="", seconds=0))
    assert "requests sent again or given up" not in {row["what"] for row in quiet.rows()}
    assert "Requests without an answer" not in Page(page(quiet)).text


def test_a_fallback_is_told() -> None:
    read = Page(page(report(fallback_reason="a replica is <torn>", outcome="fell back")))
    assert "After a first attempt that failed, a delta" in read.text
    assert "First attempt: a replica is <torn>" in read.text
    assert "check, plan, first attempt" in read.text


def test_figures() -> None:
    found, total = statistics(), report().rollouts
    counts = found.counts
    assert (counts.scored_group_count, total.sample_count) == (2, 5)
    assert found.uniform_groups(PART.groups) == (1, 2)
    assert counts.latency_seconds.values == [1.0, 1.0, 2.0, 2.0]
    assert counts.completion_tokens.values == [2, 2, 2, 3]  # of its four tokens a tool said one
    assert (counts.prompt_token_count, counts.cached_prompt_token_count) == (5 * 4, 5)
    assert counts.trained_tokens.values == [2, 2, 2, 3]
    assert counts.turns.by_value == {1: 4, 2: 1}
    assert total.samples_by_identity == {NOW: 3, f"{NOW} → {NEXT}": 1}
    assert counts.versions_ahead.by_value == {0: 3, 1: 1}
    assert total.failed_samples == {"timeout": 1}
    assert found.entropy_nats == pytest.approx((8 * 0.5 + 1.5) / 9)
    assert found.latency_percentile(50) == 1.5
    three = [(each.reasons, each.extract.sample_number) for each in found.shown]
    assert three == [
        (("highest reward",), 1),
        (("lowest reward", "two versions of the weights", "most turns"), 1),
        (("failed",), 2),
    ]


def test_statistics_that_an_earlier_version_did_not_count_are_not_made_up() -> None:
    """Its manifest is read; the page says that they are not known, and the metrics leave out what
    rests on them.
    """
    earlier = PART.model_copy(update={"samples": None})
    told = json.loads(manifest_of(earlier, PART).render())
    del told["parts"][0]["samples"], told["extracts"]
    manifest = RolloutManifest.parse(json.dumps(told).encode(), path="p")
    assert SampleStatistics.of(manifest) is None
    made = report(rollouts=manifest.summary)
    read = Page(render_report(made, None, ended_at=ENDED))
    assert read.open == []
    assert "10 samples of 4 problems" in read.text
    assert "Not known: an earlier version of hotload wrote them" in read.text
    known, unknown = cycle_metrics(made, statistics()), cycle_metrics(made, None)
    assert {name.partition("_")[0] for name in known.keys() - unknown.keys()} == {
        "rollout/filtered", "rollout/filter", "rollout/entropy", "rollout/uniform",
        "rollout/cached", "rollout/trainable", "rollout/latency", "rollout/reward",
        "async/version",
    }  # fmt: skip
    assert unknown.items() <= known.items()


def test_metrics_by_their_names() -> None:
    metrics = cycle_metrics(report(), statistics())
    assert metrics["rollout/raw_reward"] == 0.0  # with the dropped groups
    assert metrics["rollout/filtered_reward"] == 0.75
    assert metrics["rollout/reward_std"] == pytest.approx(0.433, abs=0.001)
    assert (metrics["rollout/raw_samples"], metrics["rollout/filtered_samples"]) == (9, 4)
    assert metrics["rollout/trainable_tokens_total"] == 9
    assert metrics["async/version_offset_max"] == 1
    assert metrics["async/in_flight_samples_mean"] == 5.5
    assert metrics["async/concurrency_capacity_samples_mean"] == 0.5
    assert metrics["rollout/uniform_group_ratio"] == 0.75
    assert metrics["perf/step_time"] == 20.0
    assert metrics["perf/step_samples_per_s"] == 0.5
    assert metrics["perf/update_weights_density"] == 0.02
    assert metrics["publish/hotload_time_s"] == pytest.approx(3.1)
    assert metrics["publish/total_time_s"] == pytest.approx(5.1)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_version_that_was_not_due_sent_nothing() -> None:
    """Its snapshot is an earlier one: what that took was told by the cycle that published it."""
    told = report(outcome="not due")
    metrics = cycle_metrics(told, statistics())
    assert not [name for name in metrics if "weight" in name or name.startswith("publish/")]
    assert metrics["perf/step_samples_per_s"] == 0.5
    read = Page(page(told))
    assert read.open == []
    for said in (
        "2.0 MB", "Fetched by", "to converge", "encode and upload", "encode 4 s",
        "Replicas converge",
    ):  # fmt: skip
        assert said in Page(page()).text
        assert said not in read.text
    rows = {row["what"] for row in told.rows()}
    assert {row["what"] for row in report().rows()} - rows == {
        "bytes", "egress", "… publish", "… signal", "… converge", "… encode",
    }  # fmt: skip


def test_bytes_egress_and_money_are_told_everywhere_and_money_with_prices_alone() -> None:
    """2 MB to 2 replicas, a month of storage, and 5.1 s of waiting, at the declared prices."""
    published = Publication(
        content=CheckpointContent(kind=SnapshotKind.FULL, shards=(), side_files=()),
        snapshot=report().snapshot,
    )

    def told(**changes: Any) -> tuple[CycleReport, dict[str, str], dict[str, float], str]:
        made = CycleReport.of(cycle_spec(**changes), published, report().rollouts, 20.0)
        rows = {row["what"]: row["value"] for row in made.rows()}
        return made, rows, cycle_metrics(made, None), Page(page(made)).text

    prices = {"per_gb_egress": 250.0, "per_gb_month": 500.0, "per_hour_waited": 3600.0}
    made, rows, metrics, text = told(prices=prices)
    assert made.money == pytest.approx(1 + 1 + 5.1)
    assert (rows["egress"], rows["money"]) == ("4.0 MB to 2 replicas", "7.10")
    assert metrics["perf/update_weights_wire_bytes"] == 2_000_000
    assert metrics["perf/update_weights_egress_bytes"] == 4_000_000
    assert metrics["perf/update_weights_money"] == made.money
    assert "money 7.10" in text
    assert CycleReport.model_validate_json(made.model_dump_json()) == made

    made, rows, metrics, text = told()
    assert (made.money, "money" in text) == (None, False)
    assert "money" not in rows
    assert "perf/update_weights_money" not in metrics
    # What another cycle published is not paid for again.
    made, rows, metrics, text = told(prices=prices, policy_version=4)
    assert (made.outcome, made.money, "money" in text) == ("not due", None, False)
    assert not [name for name in metrics if "weights" in name]


def test_stages_that_did_not_happen_are_left_out() -> None:
    whole = report()
    bare = whole.snapshot.model_copy(update={"seconds_by_stage": {"publish": 2.0}})
    metrics = cycle_metrics(report(snapshot=bare), statistics())
    names = {name for name in metrics if name.startswith("publish/") or name.endswith("_time")}
    assert names == {
        "perf/step_time", "perf/rollout_batch_wall_time", "publish/save_time_s",
        "publish/hint_count",
    }  # fmt: skip


def resumed(*found: RolloutPart) -> CycleReport:
    """A cycle of two files, some of them `found`, and 10 s of sampling the others."""
    rollouts = summarize(NOW, [PART, PART], parts_uri="", seconds=10.0, found=found)
    return report(rollouts=rollouts)


def test_rates_are_those_of_what_this_run_sampled() -> None:
    half = resumed(PART)
    metrics = cycle_metrics(half, statistics())
    assert metrics["perf/step_samples_per_s"] == 0.5
    assert metrics["perf/step_tokens_per_s"] == 0.9
    text = Page(page(half)).text
    assert "10 samples of 4 problems came back, 5 of them in an earlier run of this cycle" in text
    assert "and the others in 10 s, with a mean reward" in text
    assert "tokens per second 0.900 0.500 samples per second" in text
    assert "10 s of sampling and scoring; 5 samples of an earlier run are not in the rates" in text
    assert cycle_metrics(resumed(), statistics())["perf/step_samples_per_s"] == 1.0


def test_a_run_that_sampled_nothing_has_no_rate() -> None:
    everything = resumed(PART, PART)
    assert not [name for name in cycle_metrics(everything, statistics()) if name.endswith("per_s")]
    text = Page(page(everything)).text
    assert "10 samples of 4 problems came back in an earlier run of this cycle, with" in text
    assert "tokens per second – mean reward" in text


def test_free_slots_are_none_while_the_window_is_overdrawn() -> None:
    trace = ((0.0, 10, 0), (5.0, 1, 10), (10.0, 1, 10))
    rollouts = report().rollouts.model_copy(update={"window_trace": trace})
    metrics = cycle_metrics(report(rollouts=rollouts), statistics())
    assert metrics["async/in_flight_samples_mean"] == 5.0
    assert metrics["async/concurrency_capacity_samples_mean"] == 5.0  # 10 and 0, half the time each


def test_uniform_groups_are_those_that_were_judged_so() -> None:
    """Over groups with a reward; a group of one and an incomplete one have none to compare."""

    def named(name: str, rewards: tuple[float | None, ...]) -> ScoredGroup:
        made = tuple(
            replace(sample(i, failure=None if reward is not None else "timeout"), problem_id=name)
            for i, reward in enumerate(rewards)
        )
        return judge_group(group(made, rewards), Groups()).group

    groups = [
        named("equal", (1.0, 1.0)),
        named("different", (1.0, 0.0)),
        named("one", (1.0,)),
        named("short", (1.0, None)),
        named("failed", (None, None)),
    ]
    found = statistics(*groups)
    rules = part_of(*groups).groups
    assert found.uniform_groups(rules) == (1, 4)
    dropped = rules.model_copy(update={"dropped_groups": {"uniform": 3}})
    assert found.uniform_groups(dropped) == (4, 7)


def test_no_more_samples_end_at_the_limit_than_have_an_answer() -> None:
    silent = tuple(sample(i, 0, text="", finish_reason="length") for i in (0, 1, 2))
    found = statistics(group((*silent, sample(3)), (0.0, 0.0, 0.0, 1.0)))
    assert "Completion tokens of all turns; 0 % ended at the limit" in Page(page(found=found)).text
    assert found.counts.length_limited_count == 0


def test_another_run_s_identity_counts_as_no_version() -> None:
    origin = Provenance(NOW, "r", "s", 1, ("other-000900-0123abcd",))
    part = part_of(group((sample(0, provenance=origin), sample(1)), (0.0, 1.0)))
    assert part.samples_by_identity == {"other-000900-0123abcd": 1, NOW: 1}
    assert part.samples is not None
    assert part.samples.versions_ahead.by_value == {0: 1}


def test_weights_that_were_assumed_or_none_are_told_as_such() -> None:
    half_told = Provenance(NOW, "r", "s", 1, (NOW,))
    assumed = sample(0, provenance=replace(half_told, observed=()))
    silent = sample(1, 0, failure="timeout", provenance=replace(half_told, observed=()))
    made = group((assumed, silent), (1.0, None))
    text = Page(page(report(made), statistics(made))).text
    assert f"{NOW} (assumed) 1 · 100 %" in text
    assert text.count("(assumed)") == 2  # beside the bar, and with the sample itself


DRIFT = LogprobDrift(
    token_count=1200, not_finite_count=3, k1=-0.00042, k3=0.001, mean_abs=0.02, max_abs=1.5
)


def test_what_the_trainer_told() -> None:
    told = TrainedAgainst(2, DRIFT)
    read = Page(render_report(report(), statistics(), ended_at=ENDED, trained=told))
    assert read.open == []
    assert "Trainer against sampler" in read.text
    assert "acknowledged last: samples of version 2" in read.text
    assert "k1 −0.00042 nats k3 0.001 nats mean of |d| 0.02 nats largest |d| 1.5 nats" in read.text
    assert "tokens compared 1,200 tokens without a number 3" in read.text
    metrics = cycle_metrics(report(), statistics(), told)
    without = cycle_metrics(report(), statistics())
    assert {name: metrics[name] for name in metrics.keys() - without.keys()} == {
        "async/trained_against_version": 2,
        "rollout/trainer_drift_k1": -0.00042,
        "rollout/trainer_drift_k3": 0.001,
        "rollout/trainer_drift_mean_abs": 0.02,
        "rollout/trainer_drift_max_abs": 1.5,
        "rollout/trainer_drift_tokens": 1200,
    }


def test_a_trainer_that_told_nothing_or_no_number() -> None:
    assert "Trainer against sampler" not in page()
    told = TrainedAgainst(2, LogprobDrift(token_count=0, not_finite_count=7))
    read = Page(render_report(report(), statistics(), ended_at=ENDED, trained=told))
    assert "tokens compared 0 tokens without a number 7" in read.text
    metrics = cycle_metrics(report(), statistics(), told)
    assert [name for name in metrics if "trainer_drift" in name] == ["rollout/trainer_drift_tokens"]


def test_what_is_not_trained_on_is_not_counted_as_filtered_or_accepted() -> None:
    """A group that is incomplete has rewards, and no advantages."""
    unused = replace(GROUPS[0], advantages_G=(None,) * 3, mark="incomplete")
    found = statistics(unused, GROUPS[1])
    told = report()
    counts = told.rollouts.groups.model_copy(update={"groups_by_mark": {"incomplete": 1}})
    told = report(rollouts=told.rollouts.model_copy(update={"groups": counts}))
    metrics = cycle_metrics(told, found)
    assert metrics["rollout/filtered_reward"] == 1.0
    assert metrics["rollout/filtered_samples"] == 2
    totals = json.loads(json_lines(told, metrics, rollouts_ended_at=ENDED).splitlines()[-2])
    assert totals["producer/rows_accepted_total"] == 1


def test_json_lines() -> None:
    metrics = cycle_metrics(report(), statistics())
    lines = [
        json.loads(line)
        for line in json_lines(report(), metrics, rollouts_ended_at=ENDED).splitlines()
    ]
    assert [line["at"][17:19] for line in lines] == ["55", "05", "05", "05"]
    assert [line.get("producer/in_flight_samples") for line in lines] == [8, 5, 0, None]
    assert lines[2]["producer/rows_dropped_total"] == 2
    assert lines[2]["producer/rows_accepted_total"] == 2
    assert lines[2]["producer/recoverable_errors_total"] == 4  # neither the 404 nor the cancelled
    assert {name for name in lines[2] if name.startswith("producer/")} == {
        "producer/elapsed_time_s",
        "producer/published_version",
        "producer/in_flight_samples",
        "producer/rows_accepted_total",
        "producer/rows_dropped_total",
        "producer/rows_refilled_total",
        "producer/recoverable_errors_total",
        "producer/trajectory_drops_total",
    }
    assert {line["policy_version"] for line in lines} == {3}
    assert lines[-1]["run_id"] == "run"
    assert lines[-1].items() >= metrics.items()


def test_prometheus_text() -> None:
    text = prometheus_text({"rollout/raw_reward": 0.5, "perf/x": 2}, {"run": 'a"b\\\n'})
    assert text == (
        "# TYPE hotload_perf_x gauge\n"
        'hotload_perf_x{run="a\\"b\\\\\\n"} 2\n'
        "# TYPE hotload_rollout_raw_reward gauge\n"
        'hotload_rollout_raw_reward{run="a\\"b\\\\\\n"} 0.5\n'
    )


def test_quantities() -> None:
    seconds = (0, 0.0001, 0.085, 2, 2.44, 9.97, 41.4, 59.7, 60, 200, 3900, 7200)
    assert [duration(each) for each in seconds] == [
        "0 s", "< 1 ms", "85 ms", "2 s", "2.4 s", "10 s", "41 s", "1 min", "1 min",
        "3 min 20 s", "1 h 5 min", "2 h",
    ]  # fmt: skip
    numbers = (0, -0.0001, -1.5, 12.34, 0.4279, 12345.6, 3.0, math.nan)
    assert [number(each) for each in numbers] == [
        "0", "−0.0001", "−1.50", "12.3", "0.428", "12,346", "3", "–",
    ]  # fmt: skip
    extremes = (0.0004, 0.0123, 1.234e-7, 9.999, 99.96, 0.9996, 1e30, -2.5e15)
    assert [number(each) for each in extremes] == [
        "0.0004", "0.012", "1.23e-07", "10.0", "100", "1.00", "1e+30", "−2.5e+15",
    ]  # fmt: skip
    sizes = (0, 999, 3400, 999_960, 1_200_000, 941_000_000, 999_950_000, 1.5e12)
    assert [size(each) for each in sizes] == [
        "0 B", "999 B", "3.4 kB", "1.0 MB", "1.2 MB", "941 MB", "1.0 GB", "1.5 TB",
    ]  # fmt: skip
    large = report().snapshot.model_copy(update={"size_bytes": 999_960})
    rows = {row["what"]: row["value"] for row in report(snapshot=large).rows()}
    assert rows["bytes"] == "1.0 MB of 100 MB (1 : 100.0)"
    assert [percent(part, 1000) for part in (0, 0.1, 41, 380, 1000)] == [
        "0 %", "< 0.1 %", "4.1 %", "38 %", "100 %",
    ]  # fmt: skip
    assert percent(1, 0) == "–"


def test_ticks_are_round() -> None:
    assert nice_ticks(63.4) == [0, 20, 40, 60]
    assert nice_ticks(7.3, 4) == [0, 2, 4, 6]
    assert nice_ticks(0) == [0]
    assert nice_ticks(math.nan) == [0]
    assert nice_ticks(12.5) == [0, 5, 10]
    assert nice_ticks(1, 2) == [0, 0.5, 1]
    assert nice_ticks(1, 2, least=1) == [0, 1]


@given(st.floats(1, 1e9), st.integers(1, 6))
def test_ticks_of_counts_are_whole(high: float, about: int) -> None:
    ticks = nice_ticks(high, about, least=1)
    assert all(tick == int(tick) for tick in ticks)
    assert 1 <= len(ticks) <= about + 1
    assert ticks[-1] <= high * 1.000001


def ticks(svg: str) -> list[str]:
    return re.findall(r'class="tick"[^>]*>([^<]*)<', svg)


def test_counts_beside_an_axis_are_whole() -> None:
    def served(count: int) -> list[str]:
        return ticks(steps([([(0.0, 0.0), (2.0, count)], "main line")], 2.0, count, "", duration))

    assert served(10)[:5] == ["2", "4", "6", "8", "10"]
    assert served(12)[:2] == ["5", "10"]
    assert served(1)[:1] == ["1"]
    assert ticks(histogram([0.0, 1.0], [1], "", number)) == ["1", "0", "0.500", "1"]
    assert ticks(histogram([0.0, 2.0], [5], "", number)) == ["5", "0", "1", "2"]


def test_an_area_begins_with_its_first_point() -> None:
    drawn = steps([([(1.0, 3.0), (1.5, 2.0)], "wash area")], 2.0, 3.0, "", duration)
    assert re.findall(r'd="([^"]*)"', drawn) == ["M500.0 16.0H750.0V60.0H1000V148H500.0Z"]


def test_drawings_keep_inside_the_picture() -> None:
    drawn = [
        timeline([Bar("a", 0, 3, "3 s"), Bar("b", 3, 3, "0 s")], 3.0, duration),
        histogram([0.0, 1.0, 2.0], [3, 0], "bins", number, marks=[(1.0, "median")]),
        histogram([1.0, 1.0], [3], "one", number),
        steps(
            [([(0.0, 0.0), (2.0, 3.0)], "main line"), ([], "wash area")], 2.0, 3.0, "s", duration
        ),
    ]
    for svg in drawn:
        assert Page(svg).open == []
        assert "nan" not in svg
        rectangles = re.findall(r'<rect x="([^"%]+)%" [^>]*?width="([^"%]+)%"', svg)
        assert len(rectangles) == svg.count("<rect")
        for x, width in rectangles:
            assert 0 <= float(x) <= 100
            assert float(x) + float(width) <= 100.5
