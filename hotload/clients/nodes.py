"""What crosses between a cycle and the nodes that its shards are placed on: values alone.

Work goes as the parameter of a flow run. Its answer comes back through the store, and is removed
once it was read:

_hotload/nodes/<flow run>.json     the answer to the work of that run
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from hotload.clients.store.store import Store
from hotload.errors import Finding, InvalidCheckpointError, NeedsFullSnapshotError, StoreError
from hotload.identity import SnapshotKind
from hotload.options import NodeName
from hotload.publish.snapshot import Foreseen, ShardBatch, SnapshotPlan
from hotload.records import FileDigest, FileName, Record
from hotload.spec import CycleSpec

NODES = "_hotload/nodes"
ANSWER_LIMIT_BYTES = 64 << 20


class NodeWork(Record):
    """One step of a node's share of a cycle.

    `read` digests its shards, and foresees a delta on each of `identities`; `carry` encodes and
    uploads them by `plan`; `keep` moves its baseline on to `identities`. Its files lie below the
    node's own directory for `share`, under the account and deployment of the cycle's workspace.
    """

    step: Literal["read", "carry", "keep"]
    spec: CycleSpec
    share: NodeName
    account_id: str
    deployment_id: str
    files: tuple[FileName, ...]
    identities: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    """What else the replicas of a service know: bases that stay."""
    plan: SnapshotPlan | None = None
    digests: tuple[FileDigest, ...] = ()
    """Of its shards, as validated."""


class NodeAnswer(Record):
    """What came of a node's work: what the step makes, or the error that ends it anywhere."""

    digests: tuple[FileDigest, ...] = ()
    foreseen: dict[str, Foreseen] = Field({})
    """A delta on each base that lies there whole."""
    batches: tuple[ShardBatch, ...] = ()
    trouble: str | None = None
    """Why the baseline did not move on."""
    findings: tuple[Finding, ...] = ()
    needs_full: str | None = Field(None, min_length=1)

    @classmethod
    def of_error(cls, error: InvalidCheckpointError | NeedsFullSnapshotError) -> NodeAnswer:
        """Make the answer of a step that no other node could do either."""
        if isinstance(error, InvalidCheckpointError):
            return cls(findings=error.findings)
        return cls(needs_full=str(error))

    def unwrap(self) -> NodeAnswer:
        """Return the answer itself, if it is no error.

        Raises:
            InvalidCheckpointError, NeedsFullSnapshotError: what ended the step there.
        """
        if self.findings:
            raise InvalidCheckpointError(self.findings)
        if self.needs_full is not None:
            raise NeedsFullSnapshotError(self.needs_full)
        return self


def foreseen_by_all(answers: Mapping[str, NodeAnswer]) -> dict[str, Foreseen]:
    """Add up what nodes foresee of a delta on each base that is whole on every one of them."""
    told = [answer.foreseen for answer in answers.values()]
    bases = set.intersection(*map(set, told)) if told else set()
    return {
        base: Foreseen(
            obstacle=next((one[base].obstacle for one in told if one[base].obstacle), None),
            delta_bytes=sum(one[base].delta_bytes for one in told),
        )
        for base in bases
    }


async def write_answer(store: Store, run: str, answer: NodeAnswer) -> None:
    """Leave the answer to a flow run's work in the store.

    Raises:
        StoreError: the store refuses.
    """
    await store.put_bytes(answer.model_dump_json().encode(), f"{NODES}/{run}.json")


async def take_answer(store: Store, run: str, work: NodeWork) -> NodeAnswer:
    """Read the answer to a flow run's work, and remove it.

    Raises:
        StoreError: there is none, or it is not about the shards of that work.
        InvalidCheckpointError, NeedsFullSnapshotError: what ended the step there.
    """
    path = f"{NODES}/{run}.json"
    data = await store.read_bytes(path, limit_bytes=ANSWER_LIMIT_BYTES)
    await store.delete_file(path)
    answer = NodeAnswer.parse_stored(data, path).unwrap()
    if work.step == "read" and sorted(one.file for one in answer.digests) != sorted(work.files):
        raise StoreError(path, "answers about other shards than were asked about")
    if work.step == "carry":
        _check_carried(path, answer, work)
    return answer


def _check_carried(path: str, answer: NodeAnswer, work: NodeWork) -> None:
    carried = {one.file: one.content_sha256 for batch in answer.batches for one in batch.shards}
    validated = {one.file: one.sha256 for one in work.digests}
    # What a delta restores has the headers of its base; the encoder held its targets to `digests`.
    is_delta = work.plan is not None and work.plan.kind is SnapshotKind.DELTA
    if carried.keys() != validated.keys() or not (is_delta or carried == validated):
        raise StoreError(path, "carried other shards than were validated")
