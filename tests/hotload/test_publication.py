"""When sampling may begin: enough services serve, and those that are sampled have ended."""

import pytest

from hotload.publish.publication import (
    ServedSnapshot,
    ServicePublication,
    may_sample,
    services_needed,
)
from hotload.spec import RequiredServices

SERVED = ServedSnapshot(
    identity="run-000001-0123abcd",
    policy_version=1,
    kind="full",
    previous=None,
    reason="",
    size_bytes=1,
    content_size_bytes=1,
    replica_count=1,
)


@pytest.mark.parametrize(
    ("required", "count", "needed"),
    [("all", 3, 3), ("any", 3, 1), ("quorum", 3, 2), ("quorum", 4, 3), ("quorum", 1, 1)],
)
def test_how_many_have_to_serve(required: RequiredServices, count: int, needed: int) -> None:
    assert services_needed(required, count) == needed


@pytest.mark.parametrize(
    ("ended", "needed", "sampled", "expected"),
    [
        ({"a": True}, 1, ["a"], True),
        ({"a": True}, 2, ["a"], False),
        ({"a": True, "b": True}, 2, ["a"], True),
        ({"b": True}, 1, ["a"], False),
        ({"a": False, "b": True}, 1, ["a"], False),
        ({"a": True}, 1, ["a", "b"], False),
        ({"a": True, "b": False}, 1, ["a", "b"], True),
    ],
)
def test_when_sampling_may_begin(
    ended: dict[str, bool], needed: int, sampled: list[str], expected: bool
) -> None:
    """`ended` says of each service that has ended whether it serves."""
    known = {
        name: ServicePublication(service=name, snapshot=SERVED if serves else None, failure="why")
        for name, serves in ended.items()
    }
    assert may_sample(known, needed=needed, sampled=sampled) is expected
