"""CycleSpec: what a person may declare, and what is refused with a reason."""

from typing import Any

import pytest
from pydantic import ValidationError

from hotload.options import REFUSED_FIELDS
from hotload.spec import CycleSpec

SPEC: dict[str, Any] = {
    "checkpoint": "file:///checkpoints/run%207/000012",
    "run_id": "run",
    "policy_version": 12,
    "work_dir": "/var/hotload",
    "problems": {"dataset": "/problems.jsonl"},
}


def test_defaults_are_those_of_the_contract() -> None:
    spec = CycleSpec.model_validate(SPEC)
    assert spec.name == "run-000012"
    assert spec.checkpoint == "/checkpoints/run 7/000012"
    assert (spec.cadence.weight_sync_interval, spec.cadence.full_every) == (1, 20)
    assert (spec.readiness.weight_sync_timeout, spec.readiness.poll_interval_seconds) == (600, 5)
    assert spec.readiness.min_ready_fraction == 1.0
    assert (spec.sampling.completions_per_prompt, spec.sampling.max_completion_tokens) == (4, 1024)
    assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.top_k) == (1, 1, 0)
    assert spec.snapshot.spec_dtype_style == "torch"
    assert spec.sampling.concurrency.prefill_queue_target == 0.5


def test_a_checkpoint_may_be_what_ranks_commit() -> None:
    spec = CycleSpec.model_validate(SPEC | {"checkpoint": "ranks"})
    assert (spec.checkpoint, spec.is_of_ranks) == ("ranks", True)
    assert not CycleSpec.model_validate(SPEC).is_of_ranks


def placed(placement: dict[str, tuple[str, ...]]) -> CycleSpec:
    return CycleSpec.model_validate(SPEC | {"placement": placement})


def test_shards_are_dealt_in_turn_as_ranks_share_them() -> None:
    files = ["c", "a", "b", "d", "e"]
    assert placed({"x": (), "y": ()}).shares_of(files) == {"x": ("a", "c", "e"), "y": ("b", "d")}
    assert placed({"x": (), "y": ()}).shares_of(["a"]) == {"x": ("a",)}
    assert CycleSpec.model_validate(SPEC).placement == {}


def test_a_pattern_places_its_shards_and_the_rest_is_dealt_to_nodes_without_one() -> None:
    files = ["model-1", "model-2", "model-3", "head"]
    both = placed({"x": ("model-[12]",), "y": ("model-*",)})
    assert both.shares_of(files) == {"x": ("model-1", "model-2", "head"), "y": ("model-3",)}
    others = placed({"x": ("model-1",), "y": (), "z": ("nothing",)})
    assert others.shares_of(files) == {"x": ("model-1",), "y": ("head", "model-2", "model-3")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"placement": {"../x": ()}}, "String should match pattern"),
        ({"placement": {"x": ("",)}}, "at least 1 character"),
        ({"placement": {"x": ()}, "checkpoint": "ranks"}, "the ranks have put their shards"),
    ],
)
def test_a_placement_that_cannot_be_kept_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        CycleSpec.model_validate(SPEC | changes)


def test_an_earlier_version_lies_on_this_machine_and_on_no_node() -> None:
    back = placed({"x": ()}).going_back("/restored/000003", "run", 3, 1)
    assert (back.policy_version, back.placement) == (3, {})


@pytest.mark.parametrize("field", [*REFUSED_FIELDS, "dcp_save_interval"])
def test_a_field_without_meaning_here_is_refused_with_the_reason(field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field} has no meaning here"):
        CycleSpec.model_validate(SPEC | {field: 1})


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"run_id": "a/b"},
        {"run_id": ".."},
        {"policy_version": -1},
        {"policy_version": 10**9},
        {"checkpoint": "relative/path"},
        {"checkpoint": "s3://key:secret@bucket/checkpoint"},
        {"checkpoint": "s3://bucket/checkpoint?versionId=7"},
        {"checkpoint_store": ""},
        {"checkpoint": "file://host/checkpoint"},
        {"checkpoint": "rank"},
        {"work_dir": "."},
        {"work_dir": "ranks"},
        {"problems": {"dataset": "problems.jsonl"}},
        {"problems": {"dataset": "s3://key:secret@bucket/x"}},
        {"problems": {"dataset": "https://host/x?token=secret"}},
        {"problems": {"dataset": "s3:///x"}},
        {"problems": {"dataset": "simplecache::s3://bucket/x"}},
        {"problems": {"dataset": "/x", "answer_field": ""}},
        {"problems": {"dataset": "/x", "prompt_field": ""}},
        {"cadence": {"full_every": 0}},
        {"readiness": {"min_ready_fraction": 0}},
        {"readiness": {"poll_interval_seconds": 0}},
        {"sampling": {"completions_per_prompt": 0}},
        {"sampling": {"temperature": 2.1}},
        {"sampling": {"concurrency": {"min_window": 9, "max_window": 8}}},
        {"snapshot": {"compression_format": "arc_v2"}},
        {"reward": {"name": "os.system('x')"}},
        {"reward": {"name": "../module:function"}},
        {"other_services": ["default"]},
        {"service": "a", "other_services": ["b", "b"]},
        {"other_services": [""]},
        {"required": "most"},
        {"rollout_weights": {"default": 0}},
        {"rollout_weights": {"default": -1}},
        {"rollout_weights": {"default": "nan"}},
        {"rollout_weights": {"": 1}},
    ],
)
def test_what_is_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CycleSpec.model_validate(SPEC | change)


@pytest.mark.parametrize(
    ("dataset", "location"),
    [
        ("file:///data/a%20b.jsonl", "/data/a b.jsonl"),
        ("s3://bucket/rows.jsonl", "s3://bucket/rows.jsonl"),
        ("hf://datasets/o/n@v1/main/train-*.parquet", "hf://datasets/o/n@v1/main/train-*.parquet"),
    ],
)
def test_a_dataset_may_lie_anywhere(dataset: str, location: str) -> None:
    spec = CycleSpec.model_validate(SPEC | {"problems": {"dataset": dataset}})
    assert spec.problems.dataset == location


@pytest.mark.parametrize("run_id", ["a/b", "..", "-a"])
def test_a_run_id_is_refused_by_its_name(run_id: str) -> None:
    with pytest.raises(ValidationError) as refused:
        CycleSpec.model_validate(SPEC | {"run_id": run_id})
    assert [error["loc"] for error in refused.value.errors()] == [("run_id",)]


def test_the_old_name_of_a_fixed_window_is_understood() -> None:
    spec = CycleSpec.model_validate(SPEC | {"sampling": {"concurrency": {"max_concurrency": 64}}})
    assert spec.sampling.concurrency.mode == "fixed"
    assert spec.sampling.concurrency.initial_window == 64


def test_the_form_describes_every_field() -> None:
    schema = CycleSpec.model_json_schema()
    parts = {"CycleSpec": schema, **schema["$defs"]}
    undescribed = [
        f"{name}.{field}"
        for name, part in parts.items()
        for field, value in part.get("properties", {}).items()
        # A nested form shows the description of its model.
        if not (value | parts.get(value.get("$ref", "").rpartition("/")[2], {})).get("description")
    ]
    assert undescribed == []


def test_a_spec_survives_json() -> None:
    spec = CycleSpec.model_validate(SPEC)
    assert CycleSpec.model_validate_json(spec.model_dump_json()) == spec
