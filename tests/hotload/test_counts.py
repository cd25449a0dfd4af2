"""Counts add up to the same however a rollout was split into files, and stay small."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.rollout.counts import GroupCounts, RolloutCounts, SampleCounts, Spread, count_groups
from hotload.rollout.trajectory import ScoredGroup
from tests.factories import IDENTITY, scored_group, segment, trajectory

NUMBERS = st.lists(st.floats(-1e30, 1e30), max_size=40)


def group(problem_id: str, *rewards: float | None) -> ScoredGroup:
    """Samples of as many tokens as their number, the last of each masked."""
    samples = (
        trajectory(
            segment((7,) * number, prompt=(1, 2), mask=(True,) * (number - 1) + (False,)),
            number=number,
            problem_id=problem_id,
            latency_seconds=0.125 * number,
            finish_reason="length",
            prompt_token_count=2,
            completion_token_count=number,
            failure=None if reward is not None else "timeout",
        )
        for number, reward in enumerate(rewards, start=1)
    )
    return scored_group(*samples, rewards=rewards, advantages_G=rewards)


GROUPS = [group("p", 0.0, 1.0, 0.25), group("q", 0.5, None), group("r", None)]


def counted(*groups: ScoredGroup) -> RolloutCounts:
    return count_groups(groups, GroupCounts(raw_samples=len(groups)), run_id="run")


def test_what_is_counted() -> None:
    counts = counted(*GROUPS)
    assert (counts.group_count, counts.sample_count, counts.reward_count) == (3, 6, 4)
    assert (counts.reward_sum, counts.completion_token_count) == (1.75, 1 + 2 + 3 + 1 + 2 + 1)
    assert (counts.failed_samples, counts.samples_by_identity) == ({"timeout": 2}, {IDENTITY: 6})
    samples = counts.samples
    assert samples is not None
    assert (samples.scored_group_count, samples.trained_count) == (2, 4)
    assert samples.trained_reward_sum == 1.75
    assert samples.rewards.by_value == {0.0: 1, 0.25: 1, 0.5: 1, 1.0: 1}
    assert samples.rewards.std == pytest.approx(0.36976, abs=1e-5)
    assert samples.trained_tokens.by_value == {0: 2, 1: 1, 2: 1}
    assert samples.latency_seconds.values == [0.125] * 3 + [0.25] * 2 + [0.375]
    assert (samples.length_limited_count, samples.prompt_token_count) == (6, 12)
    assert (samples.sampled_token_count, samples.logprob_sum) == (4, -2.0)
    assert samples.versions_ahead.by_value == {0: 6}


@pytest.mark.parametrize("cut", range(4))
def test_files_add_up_to_the_rollout(cut: int) -> None:
    files = [counted(*GROUPS[:cut]), counted(*GROUPS[cut:])]
    assert RolloutCounts.total(files) == counted(*GROUPS)
    assert RolloutCounts.total([]) == RolloutCounts()


def test_one_file_without_statistics_leaves_those_of_all_unknown() -> None:
    unknown = counted(GROUPS[0]).model_copy(update={"samples": None})
    total = RolloutCounts.total([counted(GROUPS[1]), unknown])
    assert (total.sample_count, total.samples) == (5, None)


def test_counts_there_and_back() -> None:
    counts = counted(*GROUPS)
    assert RolloutCounts.model_validate_json(counts.model_dump_json()) == counts


@given(NUMBERS, NUMBERS)
def test_spreads_add_up(some: list[float], others: list[float]) -> None:
    total, whole = Spread.total([Spread.of(some), Spread.of(others)]), Spread.of(some + others)
    assert total.by_value == whole.by_value
    assert (total.count, total.least, total.greatest) == (whole.count, whole.least, whole.greatest)
    # What is summed by file may differ in the last digit of the largest number.
    room = 1e-12 * sum(map(abs, some + others))
    assert total.value_sum == pytest.approx(whole.value_sum, rel=1e-9, abs=room)
    assert math.isclose(total.square_sum, whole.square_sum, rel_tol=1e-9)


@given(NUMBERS)
def test_a_spread_is_near_its_numbers(numbers: list[float]) -> None:
    spread = Spread.of(numbers)
    assert len(spread.values) == spread.count == len(numbers)
    for value, number in zip(spread.values, sorted(numbers), strict=True):
        assert value == pytest.approx(number, rel=0.0051, abs=1e-300)


def test_many_numbers_need_little_room() -> None:
    spread = Spread.of(0.1 + 0.9 * n / 100_000 for n in range(100_000))
    assert spread.count == 100_000
    assert len(spread.by_value) <= 902
    assert spread.mean == pytest.approx(0.55, abs=1e-4)


def test_nothing_has_no_mean() -> None:
    assert (Spread().mean, Spread().std, Spread().values) == (None, None, [])
    assert SampleCounts.total([]) == SampleCounts()
