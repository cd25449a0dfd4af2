"""What crosses between a cycle and its nodes: values, checked when they come back."""

from pathlib import Path
from typing import Any

import pytest

from hotload.clients.nodes import NodeAnswer, NodeWork, foreseen_by_all, take_answer, write_answer
from hotload.clients.store import Store
from hotload.errors import (
    Finding,
    InvalidCheckpointError,
    NeedsFullSnapshotError,
    SelfCheckError,
    StoreError,
)
from hotload.publish.snapshot import Foreseen, ShardBatch
from hotload.records import FileDigest
from tests.factories import snapshot_manifest

SPEC = {
    "checkpoint": "/checkpoints/000012",
    "run_id": "run",
    "policy_version": 12,
    "work_dir": "/var/hotload",
    "problems": {"dataset": "/problems.jsonl"},
    "placement": {"x": (), "y": ()},
}
SHARD = FileDigest(file="a", size_bytes=3, sha256="0" * 64)
OTHER = FileDigest(file="a", size_bytes=3, sha256="1" * 64)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path.as_uri())


def work(step: str, **changes: Any) -> NodeWork:
    names = {"share": "x", "account_id": "acme", "deployment_id": "fleet"}
    given = {"step": step, "spec": SPEC, "files": ("a",), "digests": (SHARD,), **names, **changes}
    return NodeWork.model_validate(given)


async def crossed(store: Store, answer: NodeAnswer, of: NodeWork) -> NodeAnswer:
    await write_answer(store, "7", answer)
    return await take_answer(store, "7", of)


async def test_an_answer_crosses_once_and_is_gone(store: Store) -> None:
    foreseen = {"run-000011-00000000": Foreseen(delta_bytes=7)}
    read = NodeAnswer(digests=(SHARD,), foreseen=foreseen)
    assert await crossed(store, read, work("read")) == read
    with pytest.raises(StoreError, match=r"_hotload/nodes/7\.json"):
        await take_answer(store, "7", work("read"))
    carried = NodeAnswer(batches=(ShardBatch.as_written((SHARD,)),))
    assert await crossed(store, carried, work("carry")) == carried
    moved = NodeAnswer(trouble="disk is full")
    assert await crossed(store, moved, work("keep")) == moved


async def test_a_delta_restores_another_header_than_was_validated(store: Store) -> None:
    carried = NodeAnswer(batches=(ShardBatch.as_written((OTHER,)),))
    on_base = work("carry", plan=snapshot_manifest("run-000012-00000000", previous="base").plan)
    assert await crossed(store, carried, on_base) == carried
    with pytest.raises(StoreError, match="other shards"):
        await crossed(store, NodeAnswer(), on_base)


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        ("read", NodeAnswer()),
        ("read", NodeAnswer(digests=(SHARD, SHARD))),
        ("carry", NodeAnswer()),
        ("carry", NodeAnswer(batches=(ShardBatch.as_written((OTHER,)),))),
    ],
)
async def test_an_answer_about_other_shards_is_refused(
    store: Store, step: str, answer: NodeAnswer
) -> None:
    with pytest.raises(StoreError, match="other shards"):
        await crossed(store, answer, work(step))


async def test_the_errors_that_end_a_step_cross(store: Store) -> None:
    finding = Finding("unreadable", "a", None, "no such file", "a file", "operator")
    invalid = InvalidCheckpointError((finding,))
    with pytest.raises(InvalidCheckpointError) as refused:
        await crossed(store, NodeAnswer.of_error(invalid), work("read"))
    assert refused.value.findings == (finding,)
    lost = SelfCheckError("a", "w: checksum is 1, expected 2")
    with pytest.raises(NeedsFullSnapshotError, match="the delta of 'a' failed its own check"):
        await crossed(store, NodeAnswer.of_error(lost), work("carry"))


def test_a_delta_is_foreseen_where_every_node_has_the_base() -> None:
    one = NodeAnswer(foreseen={"p": Foreseen(delta_bytes=2), "q": Foreseen(delta_bytes=9)})
    two = NodeAnswer(foreseen={"p": Foreseen(delta_bytes=3)})
    three = NodeAnswer(foreseen={"p": Foreseen(obstacle="dtype of w changed")})
    assert foreseen_by_all({"x": one, "y": two}) == {"p": Foreseen(delta_bytes=5)}
    assert foreseen_by_all({"x": one, "y": three})["p"].obstacle == "dtype of w changed"
    assert foreseen_by_all({}) == {}
