"""Ranks of a trainer publish while cycles begin at the signal: killed, committed, fallen back."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flows.cycle import checkpoint_to_rollout
from flows.plan import preview_publication
from hotload.clients.access import Access
from hotload.clients.publish import ShardPublisher, Store, read_copy
from hotload.clients.publish.served_shard import ServedShard
from hotload.clients.service import HotLoadClient
from hotload.directory.files import sha256_file
from hotload.directory.shards import read_checkpoint
from hotload.errors import InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import API_KEY, NAMES, Fleet

ROOT = Path(__file__).parents[2]


class Rank:
    """A process that publishes half of a version, from the weights of its checkpoint."""

    def __init__(self, fleet: Fleet, version: int, rank: int, attempt: int | None = None) -> None:
        command = [sys.executable, "-m", "tests.flows.rank_process", fleet.bucket.as_uri()]
        command += map(str, (*fleet.checkpoints[version - 1 : version + 1], version, rank))
        command += [] if attempt is None else ["--attempt", str(attempt)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.attempt = int(self.said())

    def said(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, word: str = "") -> str:
        """Let it commit or go; returns what it then says."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        said = self.said()
        assert self.process.wait() == 0
        return said

    def stop(self) -> None:
        """Kill it, if it still runs."""
        with self.process:
            self.process.kill()


@pytest.fixture
def ranks() -> Iterator[ExitStack]:
    """Processes that are gone when the test is."""
    with ExitStack() as stack:
        yield stack


async def cycle(fleet: Fleet, version: int, **changes: Any) -> CycleReport:
    return await checkpoint_to_rollout(fleet.spec(version, **{"checkpoint": "ranks", **changes}))


def publish(fleet: Fleet, version: int, served: dict[str, ServedShard], **changes: Any) -> str:
    """Publish a version by one rank; returns its identity."""
    store = Store(fleet.bucket.as_uri())
    with ShardPublisher(store, "run", version, 0, 1, served, **changes) as publisher:
        for file in publisher.share:
            publisher.put(file, fleet.checkpoints[version] / file)
        return publisher.commit()


def assert_is(fleet: Fleet, report: CycleReport, version: int) -> None:
    """Every replica serves these weights, bit for bit, and they are the next baseline."""
    identity = report.snapshot.identity
    assert fleet.served() == {identity}
    baseline = fleet.root / "work" / "local" / "rollouts" / "baseline" / identity
    for shard in read_checkpoint(fleet.checkpoints[version]).shards:
        expected = sha256_file(fleet.checkpoints[version] / shard.file)
        assert sha256_file(baseline / shard.file) == expected
    assert report.rollouts.samples_by_identity == {identity: 8}
    assert fleet.log()["client_bugs"] == []


async def test_two_ranks_of_which_one_is_killed_between_upload_and_commit(
    fleet: Fleet, ranks: ExitStack
) -> None:
    first = await checkpoint_to_rollout(fleet.spec(1))

    def start(rank: int, attempt: int | None = None) -> Rank:
        started = Rank(fleet, 2, rank, attempt)
        ranks.callback(started.stop)
        return started

    zero = start(0)
    one = start(1, zero.attempt)
    assert (zero.said(), one.said()) == ("put", "put")
    zero.stop()
    assert one.end() == ""
    with pytest.raises(InvalidCheckpointError, match="1 attempt, none committed"):
        await cycle(fleet, 2)
    assert fleet.served() == {first.snapshot.identity}

    again = start(0, zero.attempt)  # its weights are the same: it goes on
    assert again.said() == "put"
    identity = again.end("commit")
    report = await cycle(fleet, 2)
    assert report.snapshot.identity == identity
    assert (report.outcome, report.snapshot.kind) == ("published", SnapshotKind.DELTA)
    assert "encode" not in report.seconds_by_stage  # nothing was left but the signal
    assert_is(fleet, report, 2)


async def test_a_version_of_ranks_is_carried_by_the_cycle_where_its_delta_cannot_be(
    fleet: Fleet,
) -> None:
    first = await checkpoint_to_rollout(fleet.spec(1))
    served = read_copy(fleet.checkpoints[1])

    fleet.fault(fault="torn_apply", replica="replica-1", count=1)
    await asyncio.to_thread(publish, fleet, 2, served)
    second = await cycle(fleet, 2)
    assert (second.outcome, second.snapshot.kind) == ("fell back", SnapshotKind.FULL)
    assert_is(fleet, second, 2)

    # The copy has followed; of the next version's previous, the store says the full one's name.
    access = Access(base_url=fleet.url, api_key=API_KEY, **NAMES)
    service = HotLoadClient(access, hint_body_template={"file": "{file}", "uri": "{uri}"})
    identity = await asyncio.to_thread(publish, fleet, 3, served, service=service)
    hinted = {(note["body"]["file"], note["body"]["uri"]) for note in fleet.log()["hints"]}
    where = f"{fleet.bucket.as_uri()}/{identity}"
    assert hinted == {(file, f"{where}/{file}") for file in served}
    (fleet.bucket / f"_hotload/snapshots/{identity}.json").unlink()  # as if rank 0 died just then
    third = await cycle(fleet, 3)
    assert (third.snapshot.identity, third.snapshot.kind) == (identity, SnapshotKind.DELTA)
    assert third.snapshot.previous == second.snapshot.identity
    assert_is(fleet, third, 3)

    # Written on what is no longer served: the worker makes the delta itself, from its baseline.
    stale = read_copy(fleet.checkpoints[1])
    previous = first.snapshot.identity
    identity = await asyncio.to_thread(publish, fleet, 4, stale, previous=previous)
    [preview] = (await preview_publication(fleet.spec(4, checkpoint="ranks"))).values()
    assert preview.plan is not None
    assert preview.plan.previous == third.snapshot.identity
    fourth = await cycle(fleet, 4)
    assert fourth.snapshot.identity not in (identity, third.snapshot.identity)
    assert fourth.snapshot.previous == third.snapshot.identity
    assert_is(fleet, fourth, 4)

    state = await checkpoint_to_rollout(fleet.spec(4, checkpoint="ranks"), return_state=True)
    assert state.name == "AlreadyServed"
