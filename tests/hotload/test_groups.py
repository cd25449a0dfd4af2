"""The rules for groups, each as a table of cases (protocol §16, §17)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from hotload.options import Groups
from hotload.rollout.counts import GroupCounts, RolloutSummary
from hotload.rollout.group_rules import (
    GroupTally,
    JudgedGroup,
    draw_number,
    is_outage,
    is_unanswered,
    judge_group,
    seconds_to_hedge,
    stale_group,
    to_ask_again,
    usable_count,
)
from hotload.rollout.straddling import settle_weights
from hotload.rollout.trajectory import Problem, ScoredGroup, Trajectory, sample_seed
from tests.factories import provenance, scored_group, segment, trajectory

PROBLEM = Problem("p", "x")


def sample(number: int = 0, failure: str | None = None, *tokens: int, **fields: Any) -> Trajectory:
    # Failed samples had one attempt, and it met their cause.
    origin = provenance(failed_attempts=() if failure is None else (failure,))
    fields = {"provenance": origin, "failure": failure, "number": number} | fields
    return trajectory(segment(tokens), **fields)


def samples(*failures: str | None) -> tuple[Trajectory, ...]:
    return tuple(sample(number, failure) for number, failure in enumerate(failures))


def scored(*rewards: float | None) -> ScoredGroup:
    drawn = samples(*("timeout" if reward is None else None for reward in rewards))
    return scored_group(*drawn, rewards=rewards)


def test_every_draw_of_a_group_has_a_number_of_its_own() -> None:
    numbers = [draw_number(position, number, 4) for number in range(3) for position in range(4)]
    assert numbers == list(range(12))
    assert len({sample_seed(0, "p", 1, number) for number in numbers}) == 12


@pytest.mark.parametrize(
    ("rules", "failures", "rounds", "asked"),
    [
        ({"max_incomplete_group_retries": 1}, [None, "timeout", None, "truncated"], 0, (1, 3)),
        ({"max_incomplete_group_retries": 1}, [None, "timeout"], 1, ()),
        ({"max_incomplete_group_retries": 2}, [None, "timeout"], 1, (1,)),
        ({}, [None, "timeout"], 0, ()),
        ({"max_incomplete_group_retries": 3}, [None, None], 0, ()),
        ({"max_incomplete_group_retries": 3}, ["refused", "deadline", "stale"], 0, ()),
        ({"max_incomplete_group_retries": 3}, ["straddling", "rollout_raised"], 0, (0, 1)),
        ({"max_incomplete_group_retries": 3, "on_incomplete": "fail_group"}, ["timeout"], 0, ()),
        (
            {"max_incomplete_group_retries": 3, "on_incomplete": "accept_partial"},
            ["timeout"],
            0,
            (),
        ),
    ],
)
def test_what_is_asked_again(
    rules: Mapping[str, Any], failures: list[str | None], rounds: int, asked: tuple[int, ...]
) -> None:
    assert to_ask_again(samples(*failures), Groups(**rules), rounds) == asked


@pytest.mark.parametrize(
    ("after", "pending", "alone", "is_hedged", "seconds"),
    [
        (None, 1, 99.0, False, None),
        (5.0, 2, 99.0, False, None),
        (5.0, 0, 99.0, False, None),
        (5.0, 1, 0.0, False, 5.0),
        (5.0, 1, 3.5, False, 1.5),
        (5.0, 1, 5.0, False, 0.0),
        (5.0, 1, 7.0, False, 0.0),
        (5.0, 1, 7.0, True, None),
    ],
)
def test_when_a_second_request_is_worth_it(
    after: float | None, pending: int, alone: float, is_hedged: bool, seconds: float | None
) -> None:
    rules = Groups(hedge_after_seconds=after)
    assert seconds_to_hedge(pending, alone, rules, is_hedged=is_hedged) == seconds


@pytest.mark.parametrize(
    ("rewards", "rules", "mark", "is_dropped", "is_used"),
    [
        ((0.0, 1.0, 0.5), {}, None, False, True),
        # Short of samples.
        ((0.0, 1.0, None), {}, "incomplete", False, False),
        ((0.0, 1.0, None), {"on_incomplete": "fail_group"}, "incomplete", False, False),
        ((0.0, 1.0, None), {"on_incomplete": "accept_partial"}, "partial", False, True),
        (
            (0.0, 1.0, None),
            {"on_incomplete": "accept_partial", "min_group_size": 2},
            "partial",
            False,
            True,
        ),
        (
            (0.0, 1.0, None),
            {"on_incomplete": "accept_partial", "min_group_size": 3},
            "incomplete",
            False,
            False,
        ),
        ((None, None), {"on_incomplete": "accept_partial"}, "incomplete", False, False),
        ((None,), {}, "incomplete", False, False),
        # One distinct reward.
        ((1.0, 1.0), {}, "uniform", False, True),
        ((1.0, 1.0), {"on_uniform": "drop"}, "uniform", True, True),
        ((1.0, 1.0), {"on_uniform": "refill"}, "uniform", True, True),
        ((1.0,), {"on_uniform": "drop"}, None, False, True),
        (
            (1.0, 1.0, None),
            {"on_incomplete": "accept_partial", "on_uniform": "drop"},
            "uniform",
            True,
            True,
        ),
        ((1.0, None), {"on_incomplete": "accept_partial"}, "uniform", False, True),
        # What has too few samples is kept to be looked at, uniform or not.
        ((1.0, 1.0, None), {"on_uniform": "drop"}, "incomplete", False, False),
    ],
)
def test_what_becomes_of_a_group(
    rewards: tuple[float | None, ...],
    rules: Mapping[str, Any],
    mark: str | None,
    is_dropped: bool,
    is_used: bool,
) -> None:
    judged = judge_group(scored(*rewards), Groups(**rules))
    assert (judged.group.mark, judged.is_dropped) == (mark, is_dropped)
    assert any(each is not None for each in judged.group.advantages_G) is is_used
    assert judged.group.rewards_G == rewards


def test_a_stale_group_was_never_asked_for() -> None:
    group = stale_group(PROBLEM, 2, identity="i", policy_version=3, run_seed=9)
    assert [one.failure for one in group.trajectories_G] == ["stale", "stale"]
    assert [one.provenance.attempts for one in group.trajectories_G] == [0, 0]
    assert group.trajectories_G[1].seed == sample_seed(9, "p", 3, 1)
    assert (group.mark, group.rewards_G) == ("stale", (None, None))


@pytest.mark.parametrize(
    ("failures", "is_failed_row", "is_empty_row"),
    [
        (["timeout", "overloaded", None, None], True, False),
        (["timeout", None, None], False, False),
        (["refused", "refused"], False, False),
        (["timeout", "connection"], True, True),
        (["timeout", "refused"], True, False),
        ([None], False, False),
        (["reward_unavailable", "reward_unavailable"], True, True),
        (["reward_unavailable", "timeout"], True, True),
        (["reward_unavailable", None], False, False),
        (["reward_refused", "reward_refused"], False, False),
    ],
)
def test_rows_the_breaker_counts_and_rows_that_are_not_recorded(
    failures: list[str | None], is_failed_row: bool, is_empty_row: bool
) -> None:
    assert is_outage(samples(*failures)) is is_failed_row
    assert is_unanswered(samples(*failures)) is is_empty_row


def test_every_rule_s_effect_is_counted() -> None:
    rules = Groups(on_straddling="mask_from_change", on_incomplete="accept_partial")
    origin = provenance(
        "a",
        "b",
        attempts=3,
        runs=((0, "a"), (1, "b")),
        failed_attempts=("429", "truncated"),
    )
    masked = segment((5, 6, 7), mask=(True, False, False))
    straddling = trajectory(masked, number=1, provenance=origin)
    drawn = (sample(0), straddling, sample(2, "timeout"))
    rewards = (0.0, 1.0, None)
    tally = GroupTally(hedges=2, hedges_won=1, cut_off=2)
    tally.leave_out(replace(origin, attempts=4, failed_attempts=("503", "429", "cancelled")))
    tally.replace(sample(9, "truncated"))
    judged = judge_group(scored_group(*drawn, rewards=rewards), rules)
    kept = tally.settle(judged, rules, is_refill=True).counts
    assert kept == GroupCounts(
        groups_by_mark={"partial": 1},
        refilled_groups=1,
        raw_samples=3,
        raw_reward_count=2,
        raw_reward_sum=1.0,
        asked_again={"truncated": 1},
        hedges=2,
        hedges_won=1,
        cut_off=2,
        straddling_samples=1,
        tokens_masked=2,
        attempts=4 + 1 + 1 + 3 + 1,
        failed_attempts={"503": 1, "429": 2, "cancelled": 1, "truncated": 2, "timeout": 1},
    )
    uniform = JudgedGroup(judge_group(scored(1.0, 1.0), rules).group, is_dropped=True)
    dropped = GroupTally().settle(uniform, rules, is_refill=False).counts
    assert (dropped.dropped_groups, dropped.groups_by_mark) == ({"uniform": 1}, {})
    total = GroupCounts.total([kept, dropped, kept])
    assert total.asked_again == {"truncated": 2}
    assert total.failed_attempts == {
        "429": 4,
        "truncated": 4,
        "503": 2,
        "cancelled": 2,
        "timeout": 2,
    }
    # The one that was left out, one of the group and its neighbour were answered; twice.
    assert total.attempts - sum(total.failed_attempts.values()) == 2 * 3 + 2
    assert (total.raw_samples, total.raw_reward_sum, total.hedges) == (8, 4.0, 4)
    assert total.dropped_groups == {"uniform": 1}
    assert GroupCounts.total([]) == GroupCounts()


def test_what_failed_before_was_not_masked() -> None:
    """Its tokens are as they came, so none of them was taken out of the loss."""
    origin = provenance("a", "b", runs=((0, "a"), (1, "b")))
    said = sample(0, None, 5, 6, 7, provenance=origin)
    failed = sample(1, "turn_timeout", 5, 6, 7, provenance=origin)
    settled = tuple(settle_weights(each, "mask_from_change") for each in (said, failed))
    group = scored_group(*settled, rewards=(1.0, None))
    rules = Groups(on_straddling="mask_from_change")
    counts = GroupTally().settle(JudgedGroup(group), rules, is_refill=False).counts
    assert (counts.straddling_samples, counts.tokens_masked) == (2, 2)


def test_counts_that_were_written_before_failed_attempts_were_counted() -> None:
    before = GroupCounts.model_validate_json('{"attempts": 3, "asked_again": {"timeout": 1}}')
    assert before.failed_attempts == {}
    counted = GroupCounts(attempts=2, failed_attempts={"429": 1})
    assert GroupCounts.total([before, counted]).failed_attempts == {"429": 1}
    assert GroupCounts.model_validate_json(counted.model_dump_json()) == counted


@pytest.mark.parametrize("cause", ["deadline", "trajectory_timeout"])
def test_time_that_was_up_counts_where_nothing_was_said(cause: str) -> None:
    silent, spoke = sample(0, cause), sample(1, cause, 5)
    assert is_outage((silent, sample(1, "timeout")))
    assert is_unanswered((silent, sample(1, "timeout")))
    assert not is_outage((silent, sample(1)))  # a tight deadline
    assert not is_outage((spoke, sample(0)))
    assert not is_unanswered((silent, spoke))
    # It waited for a slot of ours until the time was up.
    unsent = replace(silent, provenance=provenance(attempts=0))
    assert is_unanswered((unsent, unsent))
    assert not is_outage((unsent, unsent))
    assert is_outage((unsent, silent))


def test_groups_that_can_be_trained_on() -> None:
    marked = {"incomplete": 2, "stale": 1, "uniform": 3, "partial": 1}
    summary = RolloutSummary(
        identity="now", group_count=9, sample_count=36, groups=GroupCounts(groups_by_mark=marked)
    )
    assert usable_count(summary) == 6
