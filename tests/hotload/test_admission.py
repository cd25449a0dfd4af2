"""Admission: the two capacities of protocol §16, and when a row comes too late."""

import pytest

from hotload.rollout.admission import Admission


def admission(offpolicy: int = 0, **counts: int) -> Admission:
    """Version 7 of rows of 4, 3 rows a version."""
    return Admission(
        group_size=4,
        batch_size=12,
        initial_version=7,
        max_head_offpolicy_versions=offpolicy,
        **counts,
    )


@pytest.mark.parametrize(
    ("offpolicy", "published", "accepted", "reserved", "capacity"),
    [
        (0, 7, 0, 0, 12),
        (0, 7, 8, 4, 0),
        (0, 7, 4, 4, 4),
        (2, 7, 12, 0, 24),
        (0, 8, 12, 0, 12),
        (1, 9, 24, 12, 12),
    ],
)
def test_staleness_capacity(
    offpolicy: int, published: int, accepted: int, reserved: int, capacity: int
) -> None:
    found = admission(offpolicy, published_version=published, accepted=accepted, reserved=reserved)
    assert found.staleness_capacity == capacity


@pytest.mark.parametrize(
    ("limit", "in_flight", "admits"),
    [(8, 0, True), (8, 4, True), (8, 5, False), (2, 0, True), (2, 1, False)],
)
def test_a_whole_row_or_none(limit: int, in_flight: int, admits: bool) -> None:
    assert admission(in_flight=in_flight, reserved=in_flight).admits(limit) is admits


def test_a_run_that_was_taken_back_makes_what_is_sampled_stale() -> None:
    assert not admission(3).is_stale
    assert admission(3, is_superseded=True).is_stale


def test_a_row_that_is_kept_uses_up_the_version_s_samples() -> None:
    rows = admission()
    for _ in range(3):
        assert rows.admits(100)
        rows.begin_row()
    assert not rows.admits(100)
    rows.end_draws(4)
    rows.end_row()
    rows.settle_row(is_kept=True)
    assert not rows.admits(100)


def test_a_dropped_row_makes_room_for_another() -> None:
    rows = admission(accepted=8)
    rows.begin_row()
    assert not rows.admits(100)
    rows.end_draws(4)
    rows.end_row()
    rows.settle_row(is_kept=False)
    assert rows.admits(100)


def test_rows_that_wait_to_be_scored_hold_back_new_ones() -> None:
    rows = admission(offpolicy=9)
    for _ in range(3):
        rows.begin_row()
    rows.end_draws(12)
    for _ in range(3):
        rows.end_row()
    assert not rows.admits(8)
    rows.settle_row(is_kept=True)
    assert rows.admits(8)


def test_rows_that_wait_for_their_slowest_draw_hold_back_none() -> None:
    """3 of 4 draws end in every row: as long as a whole row fits, it is begun."""
    rows = admission(offpolicy=9)
    count = 0
    while rows.admits(8):
        rows.begin_row()
        rows.end_draws(3)
        count += 1
    assert (count, rows.in_flight) == (5, 5)  # a sixth row would make 9


def test_a_publication_lets_more_in_until_it_is_too_late() -> None:
    rows = admission(offpolicy=1, accepted=24)
    assert not rows.admits(100)
    assert rows.publish(8)
    assert rows.admits(100)
    assert not rows.is_stale
    assert not rows.publish(8)
    assert not rows.publish(3)
    assert rows.publish(9)
    assert rows.is_stale
