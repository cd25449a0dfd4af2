"""The log of a part: who may acknowledge, and what counts."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.dataset.claims import Claim, Holding
from hotload.dataset.logprob_drift import LogprobDrift
from hotload.errors import StoreError

START = datetime(2026, 1, 1, tzinfo=UTC)
A, B = "a" * 16, "b" * 16


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def claim(kind: Any, nonce: str = A, *problems: str, seconds: float = 0) -> Claim:
    until = at(seconds + 60) if kind == "lease" else None
    return Claim(
        kind=kind,
        consumer="trainer",
        nonce=nonce,
        at=at(seconds),
        expires_at=until,
        problem_ids=problems,
    )


def test_an_acknowledgement_counts_under_its_own_lease_alone() -> None:
    log = [
        claim("acknowledge", A, "none yet"),
        claim("lease", A),
        claim("acknowledge", A, "p"),
        claim("lease", B, seconds=61),
        claim("acknowledge", A, "too late"),
        claim("acknowledge", B, "q"),
        claim("give back", B),
        claim("acknowledge", B, "given back"),
    ]
    assert Holding.of(log).acknowledged == {"p": A, "q": B}
    assert Holding.of(log).lease is None
    assert Holding.of(log[:-2]).is_held_by(B)
    assert not Holding.of(log[:-2]).is_held_by(A)


def test_time_decides_who_is_busy_and_when_to_renew() -> None:
    held = Holding.of([claim("lease", A)])
    assert held.is_busy(B, at(59))
    assert not held.is_busy(B, at(60))
    assert not held.is_busy(A, at(0))
    assert not held.needs_renewal(A, at(30))
    assert held.needs_renewal(A, at(31))
    assert held.needs_renewal(B, at(0))
    assert Holding.of([]).needs_renewal(A, at(0))


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"\xff",
        claim("lease").render().replace(b'"lease"', b'"acknowledge"'),
        claim("give back").render().replace(b'"give back"', b'"lease"'),
        claim("lease").render().replace(b'"nonce":"aaaa', b'"nonce":"'),
    ],
)
def test_an_entry_that_is_none(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"p: not a claim"):
        Claim.parse(data, path="p")


DRIFT = LogprobDrift(token_count=4, not_finite_count=1, k1=-0.5, k3=0.25, mean_abs=0.5, max_abs=2.0)
TOLD = claim("acknowledge", A, "p").model_copy(update={"drift": DRIFT})


def test_an_acknowledgement_with_a_drift() -> None:
    assert Claim.parse(TOLD.render(), path="p") == TOLD
    nothing = LogprobDrift(token_count=0, not_finite_count=5)
    told = TOLD.model_copy(update={"drift": nothing})
    assert Claim.parse(told.render(), path="p") == told
    log = [claim("lease", A), TOLD, claim("lease", B), TOLD]  # the last does not count
    assert Holding.of(log).drifts == (DRIFT,)


def test_an_entry_without_a_drift_is_as_it_was_before_there_was_one() -> None:
    assert b"drift" not in claim("acknowledge", A, "p").render()
    old = b'{"kind":"acknowledge","consumer":"c","nonce":"%s","at":"2026-01-01T00:00:00Z",' % (
        A.encode()
    )
    assert Claim.parse(old + b'"expires_at":null,"problem_ids":["p"]}', path="p").drift is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k1", "NaN"),
        ("k1", "1e999"),
        ("k1", "-1e13"),
        ("k1", "null"),
        ("k1", '"much"'),
        ("k3", "-0.1"),
        ("max_abs", "1e300"),
        ("token_count", "-1"),
        ("token_count", "0"),
        ("token_count", "1.5"),
        ("token_count", "9" * 400),
        ("not_finite_count", "9" * 5000),
        ("more", "1"),
    ],
)
def test_a_drift_that_is_none(field: str, value: str) -> None:
    told = DRIFT.model_dump_json().replace("}", ",}")
    told = re.sub(rf'"{field}":[^,]+,', "", told).replace("}", f'"{field}":{value}}}')
    data = TOLD.render().replace(DRIFT.model_dump_json().encode(), told.encode())
    assert data != TOLD.render()
    with pytest.raises(StoreError, match=r"p: not a claim: (drift|Invalid JSON)"):
        Claim.parse(data, path="p")


@pytest.mark.parametrize("kind", ["lease", "give back"])
def test_only_an_acknowledgement_has_a_drift(kind: str) -> None:
    told = claim(kind).model_copy(update={"drift": DRIFT})
    with pytest.raises(StoreError, match="only an acknowledgement has a drift"):
        Claim.parse(told.render(), path="p")


STEPS = st.tuples(
    st.sampled_from(["lease", "acknowledge", "give back"]),
    st.sampled_from([A, B]),
    st.sampled_from(["p", "q", "r"]),
)


@given(st.lists(STEPS, max_size=30))
def test_entries_there_and_back_and_what_is_used_stays_used(
    steps: list[tuple[str, str, str]],
) -> None:
    log = [claim(kind, nonce, problem) for kind, nonce, problem in steps]
    assert [Claim.parse(each.render(), path="p") for each in log] == log
    used: set[str] = set()
    for end in range(len(log) + 1):
        now = set(Holding.of(log[:end]).acknowledged)
        assert used <= now
        used = now
