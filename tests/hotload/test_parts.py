"""Tables keep their schemas, and a rollout's plan says what a part holds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import polars as pl
import pytest
from pandera.errors import SchemaErrors

from hotload.dataset.rollout_plan import (
    PartNotes,
    PartPlan,
    RolloutManifest,
    RolloutPart,
    plan_rollout,
    share_parts,
    summarize,
)
from hotload.dataset.table import check_rollouts, rollouts_frame
from hotload.errors import StoreError
from hotload.rollout.counts import GroupCounts, count_groups, unnamed_samples
from hotload.rollout.trajectory import Problem, ScoredGroup, Trajectory
from hotload.spec import CycleSpec
from tests.factories import (
    cycle_spec,
    provenance,
    rollout_manifest,
    scored_group,
    segment,
    trajectory,
)

SHA = "0" * 64


def sample(number: int, *observed: str, **fields: Any) -> Trajectory:
    tokens = () if fields.get("failure") else (5, 6)
    origin = provenance(*observed, identity="now")
    return trajectory(segment(tokens), number=number, provenance=origin, **fields)


def group(*samples: Trajectory, problem_id: str = "p") -> ScoredGroup:
    return scored_group(*(replace(each, problem_id=problem_id) for each in samples))


GROUPS = [
    group(sample(0, "now"), sample(1, "old", "now"), sample(2, failure="timeout")),
    group(sample(0), sample(1, "old"), problem_id="q"),
]


def part_of(groups: Sequence[ScoredGroup]) -> RolloutPart:
    notes = PartNotes(**dict(count_groups(groups, GroupCounts(), run_id="run")))
    return notes.part(file="part-00000-00.parquet", size_bytes=9, sha256=SHA, digest=SHA)


def test_rollouts_and_what_they_come_to() -> None:
    frame = check_rollouts(rollouts_frame(GROUPS, run_id="run", policy_version=4))
    assert frame["reward"].to_list() == [0.0, 1.0, None, 0.0, 1.0]
    assert frame["token_ids"].to_list() == [[5, 6], [5, 6], [], [5, 6], [5, 6]]
    assert frame["weights"].to_list() == ["expected", "straddling", "none", "assumed", "other"]
    part = part_of(GROUPS)
    assert part.failed_samples == {"timeout": 1}
    assert part.samples_by_identity == {
        "now": 1,
        "old → now": 1,
        "now (assumed)": 1,
        "old": 1,
    }
    assert (part.group_count, part.sample_count, part.completion_token_count) == (2, 5, 8)
    summary = summarize("now", [part, part], parts_uri="file:///x", seconds=2.0)
    assert (summary.group_count, summary.sample_count, summary.mean_reward) == (4, 10, 0.5)
    assert summary.failed_samples == {"timeout": 2}
    assert summarize("now", [], parts_uri="", seconds=0).mean_reward is None


def test_a_row_names_the_version_that_was_confirmed_when_it_was_sent() -> None:
    def stamped(identity: str) -> ScoredGroup:
        of = sample(0)
        origin = replace(of.provenance, identity=identity)
        return group(replace(of, provenance=origin), problem_id=identity)

    names = ["run-000004-0123abcd", "run-000005-0123abcd", "other-000009-0123abcd", "base"]
    frame = rollouts_frame([stamped(name) for name in names], run_id="run", policy_version=4)
    assert frame["policy_version"].to_list() == [4, 5, 4, 4]


def test_an_empty_part_keeps_the_schema() -> None:
    frame = check_rollouts(rollouts_frame([], run_id="run", policy_version=0))
    assert frame.height == part_of([]).sample_count == part_of([]).reward_sum == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (pl.lit(1.0).alias("sampling_logprobs"), "sampling_logprobs"),
        (pl.lit(None, pl.String).alias("failure"), "failure says why"),
        (pl.lit(float("nan")).alias("reward"), "finite"),
        (pl.lit("sure").alias("weights"), "weights"),
        (pl.lit(0, pl.Int32).alias("sample_number"), "twice"),
        (pl.lit(-1.0).alias("latency_seconds"), "latency_seconds"),
        (pl.col("token_ids").list.head(1), "differ in length"),
        (pl.lit(1).alias("more"), "more"),
    ],
)
def test_rollouts_that_break_the_schema(change: pl.Expr, told: str) -> None:
    frame = rollouts_frame(GROUPS, run_id="run", policy_version=4).with_columns(change)
    with pytest.raises(SchemaErrors, match=told):
        check_rollouts(frame)


def spec(**changes: Any) -> CycleSpec:
    fields: dict[str, Any] = {
        "problems": {"dataset": "/d", "prompt_groups_per_step": 4},
        "sampling": {"problems_per_task": 3},
    }
    return cycle_spec(**fields | changes)


PROBLEMS = [Problem(str(i), "x") for i in range(10)]


def test_the_plan_of_a_rollout() -> None:
    plan = plan_rollout(spec(), "run-000003-00000000", PROBLEMS)
    assert [[problem.id for problem in part.problems] for part in plan.parts] == [
        ["2", "3", "4"],
        ["5"],
    ]
    assert plan.path(plan.parts[1].file(2)) == (
        "_hotload/rollouts/run-000003-00000000/part-00001-02.parquet"
    )
    names = ["part-00001-10.parquet", "part-00001-02.parquet", "part-00000-01.parquet"]
    names += ["manifest.json", "part-00001-x.parquet", "part-00001-03.parquet.tmp"]
    assert list(plan.parts[1].pieces(names)) == [2, 10]
    earlier = plan_rollout(spec(), "run-000002-00000000", PROBLEMS)
    assert earlier.directory == "_hotload/rollouts/run-000002-00000000/000003"
    many = [Problem(str(i), "x") for i in range(1001)]
    dataset = {"dataset": "/d"}
    assert len(plan_rollout(spec(problems=dataset), "i", many).parts) <= 50
    few = plan_rollout(spec(problems={**dataset, "max_rows": 2}), "i", many)
    assert [len(part.problems) for part in few.parts] == [2]


def test_rows_in_place_of_dropped_ones_are_each_part_s_own() -> None:
    sampling = {"problems_per_task": 3, "groups": {"on_uniform": "refill"}}
    plan = plan_rollout(spec(sampling=sampling), "run-000003-00000000", PROBLEMS)
    reserves = [[problem.id for problem in part.reserve] for part in plan.parts]
    # The rows after the last chosen one, round the end of the file, dealt to the parts in turn.
    assert reserves == [["6", "8", "0"], ["7", "9", "1"]]
    keeps = plan_rollout(spec(), "run-000003-00000000", PROBLEMS)
    assert all(part.reserve == () for part in keeps.parts)
    all_rows = spec(sampling=sampling, problems={"dataset": "/d"})
    assert all(part.reserve == () for part in plan_rollout(all_rows, "i", PROBLEMS).parts)


def test_a_digest_says_what_is_asked_for_whatever_the_pace() -> None:
    plan = plan_rollout(spec(), "i", PROBLEMS)

    def digest(**changes: object) -> str:
        return plan_rollout(spec(**changes), "i", PROBLEMS).parts[0].digest

    pace = {"problems_per_task": 3, "sample_timeout": 9, "concurrency": {"max_concurrency": 2}}
    pace["processes"] = 4
    pace["nodes"] = ["a", "b"]
    pace["max_head_offpolicy_versions"] = 2
    assert digest(sampling=pace) == plan.parts[0].digest
    place = {"timeout_seconds": 1, "environment": ["HOME"]}
    assert digest(reward=place) == plan.parts[0].digest
    for changes in (
        {"sampling": {"problems_per_task": 3, "seed": 1}},
        {"sampling": {"problems_per_task": 3, "completions_per_prompt": 5}},
        {"sampling": {"problems_per_task": 3, "groups": {"on_uniform": "refill"}}},
        {"reward": {"name": "contains"}},
        {"policy_version": 4},
    ):
        assert digest(**changes) != plan.parts[0].digest
    other = [replace(problem, answer="y") for problem in PROBLEMS]
    assert plan_rollout(spec(), "i", other).parts[0].digest != plan.parts[0].digest


def test_the_manifest_there_and_back() -> None:
    manifest = rollout_manifest("now", [part_of(GROUPS)])
    assert RolloutManifest.parse(manifest.render(), path="p") == manifest
    for data in (
        b"",
        b"{}",
        manifest.render().replace(b'"schema_number": 2', b'"schema_number": 1'),
    ):
        with pytest.raises(StoreError, match="not a rollout manifest"):
            RolloutManifest.parse(data, path="p")


@pytest.mark.parametrize(
    ("by_identity", "count"),
    [({}, 0), ({"id": 3}, 0), ({"id (assumed)": 3}, 0), ({"id": 3, "id (assumed)": 2}, 2)],
)
def test_samples_of_unknown_weights_count_beside_named_ones(
    by_identity: dict[str, int], count: int
) -> None:
    summary = summarize("id", [], parts_uri="", seconds=1.0)
    assert unnamed_samples(summary.model_copy(update={"samples_by_identity": by_identity})) == count


def test_parts_are_shared_out_by_weight_in_order() -> None:
    parts = [PartPlan(number, (Problem(str(number), "p"),) * 2, "") for number in range(8)]
    (alone,) = share_parts(parts, [1.0])
    assert alone == {*range(8)}
    shares = share_parts(parts, [3.0, 1.0])
    assert [len(share) for share in shares] == [6, 2]
    assert shares[0] | shares[1] == {*range(8)}
    assert shares == share_parts(parts, [300.0, 100.0])
    assert share_parts(parts[:1], [1.0, 2.0]) == [frozenset(), {0}]
