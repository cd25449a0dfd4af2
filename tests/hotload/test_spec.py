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
        {"checkpoint": "s3://bucket/checkpoint"},
        {"checkpoint": "file://host/checkpoint"},
        {"work_dir": "."},
        {"problems": {"dataset": "problems.jsonl"}},
        {"cadence": {"full_every": 0}},
        {"readiness": {"min_ready_fraction": 0}},
        {"readiness": {"poll_interval_seconds": 0}},
        {"sampling": {"completions_per_prompt": 0}},
        {"sampling": {"temperature": 2.1}},
        {"sampling": {"concurrency": {"min_window": 9, "max_window": 8}}},
        {"snapshot": {"compression_format": "arc_v2"}},
        {"reward": {"name": "os.system('x')"}},
        {"reward": {"name": "../module:function"}},
    ],
)
def test_what_is_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CycleSpec.model_validate(SPEC | change)


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
