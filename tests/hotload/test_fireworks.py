"""The wire of the hot-load service: what is sent, and what is believed of what comes back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.errors import ProtocolError
from hotload.publish import fireworks_api
from hotload.rollout import completions_api
from tests.factories import snapshot_manifest

DELTA = snapshot_manifest("run-000002-0123abcd", previous="run-000001-0123abcd")
FULL = snapshot_manifest("run-000002-0123abcd")


def test_a_delta_names_its_previous_and_the_documented_misspelling() -> None:
    body = fireworks_api.signal_body(DELTA, reset_prompt_cache="all", extra_fields_ignore=())
    assert body == {
        "identity": "run-000002-0123abcd",
        "incremental_snapshot_metadata": {
            "previous_snapshot_identity": "run-000001-0123abcd",
            "compression_format": "arc_v2",
            "checksum_format": "alder32",
        },
    }


def test_a_full_sends_no_metadata_and_only_what_says_something() -> None:
    body = fireworks_api.signal_body(FULL, reset_prompt_cache="none", extra_fields_ignore=["a"])
    assert body == {
        "identity": "run-000002-0123abcd",
        "reset_prompt_cache": "none",
        "validation": {"extra_fields_ignore": ["a"]},
    }


def test_a_status_is_read_as_documented() -> None:
    status = fireworks_api.parse_status(
        {
            "replicas": [
                {
                    "readiness": True,
                    "current_snapshot_identity": "a",
                    "loading_state": {"stage": "error", "target_snapshot_identity": "b"},
                    "loaded_adapters": [{"identity": "c", "status": "loaded"}],
                    "new_field": {},
                },
                {"readiness": "true", "current_snapshot_identity": None},
            ],
            "other": 1,
        }
    )
    first, second = status.replicas
    assert (first.readiness, first.current_identity) == (True, "a")
    assert (first.stage, first.target_identity) == ("error", "b")
    assert first.adapters == (("c", "loaded"),)
    assert (second.readiness, second.current_identity, second.stage) == (False, None, None)


@pytest.mark.parametrize(
    "data", [None, [], {}, {"replicas": None}, {"replicas": {}}, {"replicas": ["x"]}, "html"]
)
def test_a_status_of_another_form_is_the_providers_fault(data: Any) -> None:
    with pytest.raises(ProtocolError):
        fireworks_api.parse_status(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["readiness", "current_snapshot_identity", "loading_state", "loaded_adapters"]
        ),
        json_values,
    )
)
def test_no_replica_entry_is_more_than_it_says(entry: dict[str, Any]) -> None:
    (replica,) = fireworks_api.parse_status({"replicas": [entry]}).replicas
    assert replica.readiness == (entry.get("readiness") is True)


@pytest.mark.parametrize(
    ("model", "identity"),
    [
        ("accounts/a/models/m@run-1", "run-1"),
        ("a@b@run-1", "run-1"),
        ("accounts/a/models/m", None),
        ("accounts/a/models/m@", None),
        (None, None),
        (3, None),
    ],
)
def test_the_policy_version_is_the_text_after_the_last_at(model: Any, identity: Any) -> None:
    assert completions_api.served_identity(model) == identity


def test_a_hint_fills_its_template_at_any_depth() -> None:
    template = {"file": "{uri}", "list": ["{size}", 3], "{kind}": "{unknown}"}
    values = {"uri": "s3://b/{size}", "size": 7}
    body = fireworks_api.hint_body(template, values)
    assert body["list"] == ["7", 3]
    assert body["{kind}"] == "{unknown}"


def test_counts_of_protobuf_are_read() -> None:
    description = fireworks_api.parse_description(
        {"desiredReplicaCount": "3", "minReplicaCount": -1, "hotLoadBucketUrl": "s3://b/p/"}
    )
    assert (description.desired_replica_count, description.min_replica_count) == (3, None)
    assert (description.bucket_url, description.transition_type) == ("s3://b/p", "ASYNC")
