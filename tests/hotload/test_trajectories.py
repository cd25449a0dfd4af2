"""Windows through the file, seeds, and what is known about the weights of a sample."""

import pickle
from dataclasses import replace

from hotload.rollout.trajectory import (
    Problem,
    Trajectory,
    Weights,
    chunk,
    problems_for,
    sample_seed,
)
from tests.factories import provenance, segment, trajectory


def test_versions_walk_through_the_file_and_begin_again() -> None:
    problems = [Problem(str(i), "x") for i in range(5)]

    def ids(version: int, per_step: int | None) -> str:
        return "".join(problem.id for problem in problems_for(problems, version, per_step))

    assert [ids(version, 2) for version in range(4)] == ["01", "23", "40", "12"]
    assert ids(3, None) == ids(3, 5) == ids(3, 9) == "01234"
    assert [len(part) for part in chunk(problems, 2)] == [2, 2, 1]


def test_seeds_are_spread_and_never_change() -> None:
    seeds = {
        sample_seed(run, problem, version, number)
        for run in range(3)
        for problem in ("a", "b")
        for version in range(3)
        for number in range(8)
    }
    assert len(seeds) == 3 * 2 * 3 * 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(0, "a", 1, 2) == 215_652_015


def sample(
    *observed: str, tokens: tuple[int, ...] = (1,), runs: tuple[tuple[int, str], ...] = ()
) -> Trajectory:
    return trajectory(segment(tokens), provenance=provenance(*observed, identity="now", runs=runs))


def test_weights_in_words() -> None:
    assert sample("now").weights is Weights.EXPECTED
    assert sample().weights is Weights.ASSUMED
    assert sample("old", "now").weights is Weights.STRADDLING
    assert sample("old").weights is Weights.OTHER
    assert sample("now", runs=((0, "now"),)).weights is Weights.EXPECTED
    for untold in (((0, "now"), (1, "")), ((1, "now"),), ((0, ""), (1, "now"))):
        assert sample("now", runs=untold).weights is Weights.ASSUMED
        assert sample("old", runs=untold).weights is Weights.OTHER
    assert replace(sample("now"), failure="too_long").weights is Weights.EXPECTED
    assert replace(sample(tokens=()), failure="timeout").weights is Weights.NONE
    assert sample("old", "now").provenance.first == "old"


def test_values_travel_to_another_process() -> None:
    problem = Problem("a", (1,), extra={"x": {"y": [None]}})
    for value in (problem, sample("now")):
        assert pickle.loads(pickle.dumps(value)) == value
