"""The groups of several open windows: the oldest first, none twice, none waited for in vain."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hotload.clients.handoff import RolloutReader
from hotload.clients.handoff.usable_groups import GroupsAhead, StepGroups, UsableGroups
from hotload.clients.store import Store
from hotload.rollout.counts import GroupCounts
from hotload.training.windows import OpenWindow
from tests.blocks.sampled_groups import POSITIONS, sampled

SHA = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}")


def ahead_of(store: Store, *counts: int, trained: str = "") -> GroupsAhead:
    """Windows of versions 0, 1, …, with so many problems each."""
    ahead = GroupsAhead(poll_seconds=0.001)
    for version, count in enumerate(counts):
        reader = RolloutReader(
            store, "run", version, consumer="loop", poll_seconds=0.001, nonce="n" * 32, line=0
        )
        window = OpenWindow(policy_version=version, epoch=0, first=0, count=count)
        ahead.open(window, UsableGroups(reader, POSITIONS, trained if version == 0 else ""))
    return ahead


def told(step: StepGroups) -> str:
    """Versions and problems, as they are trained."""
    return " ".join(f"{part.sampled_version}{''.join(part.problem_ids)}" for part in step.groups)


async def steps_of(ahead: GroupsAhead, *sizes: int) -> list[str]:
    steps = []
    while await ahead.has_more():
        steps.append(", ".join([told(chunk) async for chunk in ahead.chunks(sizes)]))
        await ahead.acknowledge({})
    return steps


async def test_the_oldest_come_first_in_chunks_of_steps(store: Store) -> None:
    await sampled(store, 0, "bDa")
    await sampled(store, 1, "fec")
    ahead = ahead_of(store, 3, 3)
    assert ahead.live_count == 6
    assert await steps_of(ahead, 2, 1) == ["0ab, 1f", "1ce"]
    assert ahead.live_count == 0
    assert ahead.windows == ()
    # All is acknowledged, what teaches nothing as well.
    assert await steps_of(ahead_of(store, 3, 3), 2) == []


async def test_a_group_that_is_not_there_holds_up_none_of_a_later_window(store: Store) -> None:
    await sampled(store, 0, "a", is_complete=False)
    await sampled(store, 1, "bc", is_complete=False)
    ahead = ahead_of(store, 2, 3)
    (step,) = [told(one) async for one in ahead.chunks([3])]
    assert step == "0a 1bc"
    # One of each window may still come; both are open, the trained ones not yet acknowledged.
    assert ahead.live_count == 2
    assert [window.policy_version for window in ahead.windows] == [0, 1]
    await ahead.acknowledge({})
    waiting = asyncio.create_task(ahead.has_more())
    await sampled(store, 0, "a", "D")
    await sampled(store, 1, "bc")
    assert not await waiting


async def test_the_reward_is_of_all_samples_of_the_windows_of_the_step(store: Store) -> None:
    for version, (letters, right) in enumerate([("ab", 1.0), ("cd", 4.0)]):
        rules = GroupCounts(raw_samples=6, raw_reward_count=6, raw_reward_sum=right)
        await sampled(store, version, letters, rules=rules)
    ahead = ahead_of(store, 2, 2)
    assert ahead.raw_rewards() == {}
    rewards = []
    for count in (1, 2, 1):
        assert await ahead.has_more()
        assert len([one async for one in ahead.chunks([count])]) == 1
        rewards.append(tuple(ahead.raw_rewards().values()))
        await ahead.acknowledge({})
    # Of version 0, of both, of version 1.
    assert rewards == [(1 / 6, 6.0), (5 / 12, 12.0), (4 / 6, 6.0)]


async def test_a_problem_of_two_windows_is_in_two_steps(store: Store) -> None:
    await sampled(store, 0, "ab")
    await sampled(store, 1, "ba")
    assert await steps_of(ahead_of(store, 2, 2), 3) == ["0ab", "1ab"]


async def test_a_killed_run_goes_on_with_what_is_not_recorded(store: Store) -> None:
    await sampled(store, 0, "abc")
    killed = ahead_of(store, 3)
    assert [told(one) async for one in killed.chunks([2])] == ["0ab"]
    again = ahead_of(store, 3, trained="ab")
    assert again.live_count == 1
    assert await steps_of(again, 2) == ["0c"]


async def test_a_window_is_open_until_all_of_it_is_acknowledged(store: Store) -> None:
    await sampled(store, 0, "a")
    ahead = ahead_of(store, 1)
    assert [told(one) async for one in ahead.chunks([1])] == ["0a"]
    assert not await ahead.has_more()
    assert [window.policy_version for window in ahead.windows] == [0]
    await ahead.acknowledge({})
    assert ahead.windows == ()
