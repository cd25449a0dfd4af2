"""The choice between a full and a delta: what it rests on, and what moves it which way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hotload.identity import SnapshotKind
from hotload.options import Prices
from hotload.publish.cost import CostBasis, CostChoice, TimeTaken, money_of
from tests.factories import cycle_spec

FULL, DELTA = SnapshotKind.FULL, SnapshotKind.DELTA
GB = 10**9
sizes = st.integers(1, 10**13)
prices = st.builds(
    Prices,
    per_gb_egress=st.floats(0, 100),
    per_gb_month=st.floats(0, 100),
    per_hour_waited=st.floats(0, 1000),
)
times = st.dictionaries(
    st.sampled_from([FULL, DELTA]),
    st.builds(TimeTaken, size_bytes=sizes, seconds=st.floats(0.001, 1e5)),
)


@st.composite
def bases(draw: st.DrawFn, **fixed: Any) -> CostBasis:
    drawn = {
        "replica_count": draw(st.integers(0, 1000)),
        "full_every": draw(st.integers(1, 128)),
        "prices": draw(st.one_of(st.just(Prices()), prices)),
        "taken": draw(times),
    }
    return CostBasis(**drawn | fixed)


def chosen(
    basis: CostBasis, delta_bytes: int, full_bytes: int = GB, chain_bytes: int = 0
) -> CostChoice:
    delta = basis.of_delta(delta_bytes, full_bytes=full_bytes, chain_bytes=chain_bytes)
    return basis.choose(basis.of_full(full_bytes), delta)


def basis(
    *, replicas: int = 3, taken: Mapping[SnapshotKind, TimeTaken] | None = None, **given: float
) -> CostBasis:
    return CostBasis(replicas, 20, Prices(**given), taken or {})


def test_a_step_is_a_delta_and_other_weights_are_a_full() -> None:
    assert chosen(basis(), 20_000_000).kind is DELTA
    choice = chosen(basis(), 800_000_000)
    assert choice.kind is FULL
    assert choice.reason == (
        "a delta would move 81 % of the bytes of a full: it is worth its place in the chain "
        "below 75 %"
    )


def test_what_the_options_hold() -> None:
    full, delta = chosen(basis(), 20_000_000, chain_bytes=50_000_000).options
    assert (full.kind, full.size_bytes, full.egress_bytes, full.replay_bytes) == (
        FULL,
        GB,
        3 * GB,
        GB,
    )
    assert (delta.egress_bytes, delta.replay_bytes) == (60_000_000, GB + 70_000_000)
    assert full.seconds is full.money is delta.seconds is delta.money is None


@given(bases(), sizes, sizes, sizes, st.integers(0, 10**12))
def test_more_bytes_never_make_a_delta_of_a_full(
    basis: CostBasis, full_bytes: int, small: int, large: int, chain_bytes: int
) -> None:
    small, large = sorted((small, large))
    before = chosen(basis, small, full_bytes, chain_bytes)
    for after in (
        chosen(basis, large, full_bytes, chain_bytes),
        chosen(basis, small, full_bytes, chain_bytes + large),
    ):
        assert (before.kind, after.kind) != (FULL, DELTA)


@given(bases(), sizes, st.integers(0, 10**12))
def test_a_delta_as_large_as_a_full_is_never_chosen_for_its_bytes(
    basis: CostBasis, size_bytes: int, chain_bytes: int
) -> None:
    """A tie is a full's; only measured seconds can speak for such a delta."""
    untimed = CostBasis(basis.replica_count, basis.full_every, basis.prices, {})
    assert chosen(untimed, size_bytes, size_bytes, chain_bytes).kind is FULL


@given(bases(prices=Prices()), st.integers(0, 10**9), sizes, sizes)
def test_without_prices_no_money_is_said(
    basis: CostBasis, chain_bytes: int, full_bytes: int, delta_bytes: int
) -> None:
    choice = chosen(basis, delta_bytes, full_bytes, chain_bytes)
    assert [one.money for one in choice.options] == [None, None]
    assert "cost" not in choice.reason


@given(bases(), prices, sizes, sizes, st.integers(-20, 20))
def test_a_currency_changes_nothing(
    basis: CostBasis, given: Prices, full_bytes: int, delta_bytes: int, power: int
) -> None:
    """Prices that are all twice as high are the same prices."""
    scaled = Prices(**{name: value * 2.0 for name, value in given.model_dump().items()})
    kinds = {
        chosen(
            CostBasis(basis.replica_count, basis.full_every, each, basis.taken),
            delta_bytes,
            full_bytes,
        ).kind
        for each in (given, scaled)
    }
    assert len(kinds) == 1


@pytest.mark.parametrize("name", list(Prices.model_fields))
@given(given=prices, more=st.floats(0, 100), stored=sizes, fetched=sizes, seconds=st.floats(0, 1e6))
def test_money_grows_with_every_price(
    name: str, given: Prices, more: float, stored: int, fetched: int, seconds: float
) -> None:
    dearer = given.model_copy(update={name: getattr(given, name) + more})
    before, after = (
        money_of(each, stored_bytes=stored, fetched_bytes=fetched, seconds=seconds)
        for each in (given, dearer)
    )
    assert before is not None
    assert after is not None
    assert after >= before


def test_with_no_replica_there_is_a_choice_all_the_same() -> None:
    for each in ({}, {"per_gb_month": 0.02}, {"per_hour_waited": 9.0}):
        assert chosen(basis(replicas=0, **each), 1000).kind is DELTA
        assert chosen(basis(replicas=0, **each), GB).kind is FULL
    # All that is paid for then is what a replica loads that joins late.
    assert chosen(basis(replicas=0, per_gb_egress=0.1), 1000).kind is FULL


SLOW_DELTAS = {FULL: TimeTaken(GB, 60), DELTA: TimeTaken(400_000_000, 180)}


def test_measured_seconds_weigh_against_bytes() -> None:
    assert chosen(basis(), 400_000_000).kind is DELTA
    choice = chosen(basis(taken=SLOW_DELTAS), 400_000_000)
    assert choice.kind is FULL
    assert "bytes of a full in 3 min, not 1 min" in choice.reason
    assert chosen(basis(taken=SLOW_DELTAS), 20_000_000).kind is DELTA


def test_a_difference_in_seconds_that_is_noise_decides_nothing() -> None:
    taken = {FULL: TimeTaken(GB, 0.2), DELTA: TimeTaken(400_000_000, 25)}
    choice = chosen(basis(taken=taken), 400_000_000)
    assert (choice.kind, choice.reason) == (DELTA, chosen(basis(), 400_000_000).reason)


def test_the_price_of_waiting_decides_where_egress_is_cheap() -> None:
    cheap, dear = {"per_gb_egress": 0.09}, {"per_gb_egress": 0.09, "per_hour_waited": 20.0}
    assert chosen(basis(taken=SLOW_DELTAS, **cheap), 400_000_000).kind is DELTA
    choice = chosen(basis(taken=SLOW_DELTAS, **dear), 400_000_000)
    assert choice.kind is FULL
    full, delta = choice.options
    assert f"a delta would cost {delta.money:.2f}, a full {full.money:.3f}" in choice.reason


def test_nobody_pays_for_time_that_only_one_way_was_seen_to_take() -> None:
    taken = {FULL: TimeTaken(GB, 3600)}
    full, delta = chosen(basis(taken=taken, per_hour_waited=10), 20_000_000).options
    assert (full.seconds, full.money) == (3600, 0)
    assert (delta.seconds, delta.money) == (None, 0)


def test_money_by_hand() -> None:
    """3 GB up for a month at 0.02, 9 GB down at 0.1, half an hour at 10."""
    given = Prices(per_gb_egress=0.1, per_gb_month=0.02, per_hour_waited=10)
    found = money_of(given, stored_bytes=3 * GB, fetched_bytes=9 * GB, seconds=1800)
    assert found == pytest.approx(0.06 + 0.9 + 5)


@pytest.mark.parametrize("name", list(Prices.model_fields))
@pytest.mark.parametrize("wrong", [-0.01, float("nan"), float("inf"), 1e7, "free", [0.1]])
def test_a_price_that_is_none_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(ValidationError, match=f"prices.{name}"):
        cycle_spec(prices={name: wrong})


def test_an_unknown_price_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"prices\.egress_per_gb"):
        cycle_spec(prices={"egress_per_gb": 0.09})
