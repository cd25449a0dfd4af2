"""Drift, against numbers worked out by hand and against the definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.dataset.logprob_drift import LogprobDrift, measure_drift, merged_drift


def test_drift_by_hand() -> None:
    found = measure_drift([-1.0, -2.0, -9.0], [-1.5, -1.0, 0.0], [True, True, False])
    assert found is not None
    assert (found.token_count, found.not_finite_count) == (2, 0)
    assert found.k1 == pytest.approx(0.25)  # differences are 0.5 and -1
    k3 = (math.exp(0.5) - 1.5 + math.exp(-1.0)) / 2
    assert found.k3 == pytest.approx(k3)
    assert (found.mean_abs, found.max_abs) == (0.75, 1.0)


def test_both_estimates_come_to_the_divergence() -> None:
    sampler, trainer = np.array([0.7, 0.2, 0.1]), np.array([0.6, 0.3, 0.1])
    drawn = np.random.default_rng(7).choice(3, 50_000, p=sampler)
    true = float((sampler * np.log(sampler / trainer)).sum())
    found = measure_drift(np.log(trainer)[drawn], np.log(sampler)[drawn], np.ones(50_000))
    assert found is not None
    assert found.k1 == pytest.approx(true, abs=0.003)
    assert found.k3 == pytest.approx(true, abs=0.001)


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0)), min_size=1))
def test_k3_is_never_negative(pairs: list[tuple[float, float]]) -> None:
    trainer, sampler = zip(*pairs, strict=True)
    found = measure_drift(trainer, sampler, [True] * len(pairs))
    assert found is not None
    assert 0 <= found.k3 < math.inf
    assert measure_drift(sampler, sampler, [True] * len(pairs)).max_abs == 0  # type: ignore[union-attr]


def test_tokens_without_a_number_are_counted_and_left_out() -> None:
    trainer = [-1, math.nan, -math.inf, -1, -3.4e38, -1e308]
    found = measure_drift(trainer, [-1, -1, -1, -math.inf, -1, 1e308], [True] * 6)
    assert found is not None
    assert (found.token_count, found.not_finite_count, found.k1) == (1, 5, 0)
    found = measure_drift([math.nan, -1], [-1, -1], [True, False])
    assert found == LogprobDrift(token_count=0, not_finite_count=1)


def test_what_does_not_line_up_is_refused() -> None:
    with pytest.raises(ValueError, match="2, 3 and 3"):
        measure_drift([-1, -1], [-1, -1, -1], [True] * 3)
    assert measure_drift([], [], []) is None
    assert measure_drift([-1], [-2], [False]) is None


LOGPROBS = st.floats(-60, 0) | st.sampled_from([math.nan, -math.inf])


TOKENS = st.lists(st.tuples(LOGPROBS, LOGPROBS, st.booleans()), max_size=8)


@given(st.lists(TOKENS, max_size=5))
def test_merged_drifts_are_the_drift_of_all_tokens(
    batches: list[list[tuple[float, float, bool]]],
) -> None:
    def drift(tokens: list[tuple[float, float, bool]]) -> LogprobDrift | None:
        trainer, sampler, mask = zip(*tokens, strict=True) if tokens else ((), (), ())
        return measure_drift(trainer, sampler, mask)

    found = merged_drift(each for each in map(drift, batches) if each is not None)
    whole = drift([token for batch in batches for token in batch])
    assert (found is None) == (whole is None)
    if found is not None and whole is not None:
        assert found.token_count == whole.token_count
        assert found.not_finite_count == whole.not_finite_count
        assert found.max_abs == whole.max_abs
        for name in ("k1", "k3", "mean_abs") if whole.token_count else ():
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-9)


def test_figures_are_there_if_tokens_are() -> None:
    with pytest.raises(ValueError, match="figures are there if tokens are"):
        LogprobDrift(token_count=3, not_finite_count=0, k1=0.0, k3=0.0, mean_abs=0.0)
    with pytest.raises(ValueError, match="figures are there if tokens are"):
        LogprobDrift(token_count=0, not_finite_count=0, max_abs=1.0)
