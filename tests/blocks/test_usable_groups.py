"""The groups of a window in steps, what a step records in the store, and a name for a version."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from hotload.clients.handoff import RolloutReader, usable_groups
from hotload.clients.handoff.usable_groups import UsableGroups, read_recorded, step_groups
from hotload.clients.store import Store
from hotload.clients.store.records import write_manifest
from hotload.clients.store.step_records import (
    promote,
    read_promotions,
    read_steps,
    write_step,
)
from hotload.errors import (
    IdentityConflictError,
    InvalidIdentityError,
    StoreError,
    StoreUnavailableError,
)
from hotload.rollout.counts import GroupCounts
from hotload.training.step_record import TrainedGroups
from tests.blocks.sampled_groups import POSITIONS, sampled
from tests.factories import snapshot_manifest, step_record
from tests.waiting import PATIENCE_SECONDS

IDENTITY = "run-000003-0123abcd"
DIRECTORY = f"_hotload/rollouts/{IDENTITY}"
SHA = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}")


def groups_of(store: Store, *trained: str, nonce: str = "n" * 32) -> UsableGroups:
    reader = RolloutReader(
        store, "run", 3, consumer="loop", groups_per_batch=2, poll_seconds=0.001, nonce=nonce
    )
    return UsableGroups(reader, POSITIONS, trained)


async def all_steps(groups: UsableGroups, count: int) -> list[str]:
    steps = []
    while await groups.has_more():
        step = await groups.take(count)
        await groups.acknowledge({})
        steps.append("".join(step.problem_ids))
    return steps


async def test_steps_have_as_many_usable_groups_and_are_in_order(store: Store) -> None:
    await sampled(store, 3, "dAb", "Cef", "hg")
    groups = groups_of(store)
    assert await all_steps(groups, 2) == ["bd", "ef", "gh"]
    # All is acknowledged, what teaches nothing as well.
    assert not await groups_of(store, nonce="m" * 32).has_more()


async def test_the_rest_makes_a_smaller_step_and_nothing_makes_none(store: Store) -> None:
    await sampled(store, 3, "abcD")
    assert await all_steps(groups_of(store), 2) == ["ab", "c"]
    await sampled(store, 3, "ABC")
    groups = groups_of(store)
    assert not await groups.has_more()
    with pytest.raises(ValueError, match="no further usable group"):
        await groups.take(2)


async def test_a_killed_consumer_goes_on_at_once_and_uses_no_group_twice(store: Store) -> None:
    await sampled(store, 3, "abcd")
    killed = groups_of(store)
    assert (await killed.take(2)).problem_ids == ("a", "b")
    # Recorded and not acknowledged; its leases would hold another consumer up for an hour.
    again = groups_of(store, "a", "b")
    assert await all_steps(again, 2) == ["cd"]
    assert not await groups_of(store, nonce="m" * 32).has_more()


async def test_the_reward_is_of_all_samples_also_of_groups_that_were_dropped(store: Store) -> None:
    groups = groups_of(store)
    assert groups.raw_rewards() == {}
    # Two samples of each problem here, and two of a dropped one that were both right.
    rules = GroupCounts(raw_samples=6, raw_reward_count=6, raw_reward_sum=4.0)
    await sampled(store, 3, "ab", rules=rules)
    await groups.take(2)
    assert groups.raw_rewards() == {"rollout/raw_reward": 4 / 6, "rollout/raw_samples": 6.0}


async def test_a_reader_that_is_told_looks_at_once(store: Store) -> None:
    reader = RolloutReader(store, "run", 3, consumer="loop", poll_seconds=3600)
    waiting = asyncio.create_task(reader.next(1))
    await asyncio.sleep(0)
    await sampled(store, 3, "a")
    async with asyncio.timeout(PATIENCE_SECONDS):
        reader.look_now()
        delivery = await waiting
    assert delivery is not None
    assert delivery.problem_ids == ("a",)


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path]:
    """Let the store's disk fail so often, in whatever is read next; the files that failed."""
    failed: list[Path] = []
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if len(failed) < times:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    return failed


@pytest.mark.parametrize("is_polled", [False, True], ids=["next", "poll"])
async def test_a_store_that_does_not_answer_for_a_while_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, is_polled: bool
) -> None:
    """A step in the making cannot be repeated, so what waits for its groups asks again."""
    monkeypatch.setattr(usable_groups, "LONG_AGAIN_SECONDS", (0.0,) * 7)
    await sampled(store, 3, "ab", "c")
    for times in range(7):
        groups = groups_of(store, nonce=str(times) * 32)
        failed = failing(monkeypatch, times)
        if is_polled:
            while not groups.has_ended:
                await groups.poll(1)
        else:
            assert (await groups.take(3)).problem_ids == ("a", "b", "c")
        assert len(failed) == times
        assert groups.waiting.keys() == ({"a", "b", "c"} if is_polled else set())
        await groups._reader.give_back()
    failing(monkeypatch, 1000)
    with pytest.raises(StoreUnavailableError, match="Input/output"):
        await groups_of(store).has_more()


async def test_what_waits_to_be_taken_is_not_acknowledged(store: Store) -> None:
    await sampled(store, 3, "abc")
    groups = groups_of(store)
    await groups.take(2)
    assert await groups.has_more()
    await groups.acknowledge({("a", 0, 0): [-0.5, -0.5], ("b", 1, 0): [-0.4, -0.5]})
    assert await all_steps(groups_of(store), 2) == ["c"]


async def test_a_recorded_step_reads_the_same_rows_again(store: Store) -> None:
    parts = await sampled(store, 3, "dA", "bc")
    groups = groups_of(store)
    step = await groups.take(3)
    assert [one.part_sha256 for one in step.groups] == [parts[1].sha256, parts[0].sha256]
    again = await read_recorded(store, step_record(groups=step.groups, sampled_version=3))
    assert step_groups(again).frame.equals(step.frame)
    gone = TrainedGroups(part_sha256=SHA, problem_ids=("a",), sampled_version=3)
    with pytest.raises(StoreError, match="no part has the digest 000000000000"):
        await read_recorded(store, step_record(groups=(gone,)))
    stray = TrainedGroups(part_sha256=parts[0].sha256, problem_ids=("z",), sampled_version=3)
    with pytest.raises(StoreError, match="has no group of 'z'"):
        await read_recorded(store, step_record(groups=(stray,)))


# Records.


async def test_a_step_is_recorded_once(store: Store) -> None:
    first = step_record()
    second = step_record(first)
    for each in (first, second, first):  # the answer to the first may have been lost
        await write_step(store, each)
    assert await read_steps(store, "run") == [first, second]
    assert await read_steps(store, "other") == []
    with pytest.raises(IdentityConflictError, match="another loop of this run has recorded step 2"):
        await write_step(store, step_record(first, learning_rate=5e-5))
    assert await read_steps(store, "run") == [first, second]


async def test_a_name_is_given_once_and_to_what_was_published(store: Store) -> None:
    first = step_record()
    await write_step(store, first)
    await write_step(store, step_record(first))
    with pytest.raises(InvalidIdentityError, match="version 2 was not published"):
        await promote(store, "run", "result")
    identity = "run-000001-0123abcd"
    await write_manifest(store, snapshot_manifest(identity))
    given = await promote(store, "run", "result", 1)
    assert (given.step, given.identity) == (1, identity)
    assert await promote(store, "run", "result", 1) == given
    assert await read_promotions(store, "run") == [given]
    with pytest.raises(InvalidIdentityError, match="no step exported version 7: exported 1, 2"):
        await promote(store, "run", "best", 7)
    await write_manifest(store, snapshot_manifest("run-000002-0123abcd"))
    with pytest.raises(IdentityConflictError, match="'result' stands for version 1"):
        await promote(store, "run", "result")
