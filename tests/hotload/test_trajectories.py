"""Problems, windows through the file, seeds, and what is known about the weights of a sample."""

import json
import pickle
from dataclasses import replace

import pytest

from hotload.errors import InvalidProblemsError
from hotload.rollout.trajectory import (
    Problem,
    Trajectory,
    Weights,
    chunk,
    parse_problems,
    problems_for,
    sample_seed,
)
from tests.factories import provenance, segment, trajectory

GOOD = b'{"id": "a", "prompt": "x", "answer": 3, "level": 2}\n'


def parse(data: bytes) -> tuple[Problem, ...]:
    return parse_problems(data, source="rows.jsonl")


def test_rows_of_every_kind() -> None:
    data = GOOD + b"\r\n   \n" + b'{"id": 7, "prompt": [1, 2]}\n'
    data += b'{"id": "b", "prompt": "\\ud83d\\ude00", "y": [' + b"[]," * 70 + b"[]]}\n"
    data += b'{"id": "c", "messages": [{"role": "user", "content": "hi"}]}'
    assert parse(data) == (
        Problem("a", "x", None, 3, {"level": 2}),
        Problem("7", (1, 2)),
        Problem("b", "\N{GRINNING FACE}", extra={"y": [[]] * 71}),
        Problem("c", None, ({"role": "user", "content": "hi"},)),
    )


@pytest.mark.parametrize(
    ("data", "row", "reason"),
    [
        (b"", 0, "no rows"),
        (b"\n \n", 0, "no rows"),
        (GOOD + b"{", 2, "not JSON"),
        (GOOD + b"\xff\xfe", 2, "not JSON"),
        (b'{"id": "a", "prompt": NaN}', 1, "NaN"),
        (b'{"id": "a", "prompt": "x", "answer": 1e999}', 1, "1e999 is beyond any float"),
        (b"[" * 100_000, 1, "not JSON"),
        (b"[1]", 1, "expected an object"),
        (b'{"prompt": "x"}', 1, "`id`"),
        (b'{"id": true, "prompt": "x"}', 1, "`id`"),
        (b'{"id": "", "prompt": "x"}', 1, "`id`"),
        (b'{"id": "%s", "prompt": "x"}' % (b"x" * 257), 1, "`id`"),
        (b'{"id": "a"}', 1, "exactly one"),
        (b'{"id": "a", "prompt": "x", "messages": []}', 1, "exactly one"),
        (b'{"id": "a", "prompt": ""}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": null}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": []}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": [1, true]}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": [-1]}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": [4294967296]}', 1, "`prompt`"),
        (b'{"id": "a", "messages": []}', 1, "`messages`"),
        (b'{"id": "a", "messages": null}', 1, "`prompt`"),
        (b'{"id": "a", "messages": [{"content": "x"}]}', 1, "`messages`"),
        (b'{"id": "a", "prompt": "\\ud800"}', 1, "surrogate"),
        (b'{"id": "a", "prompt": "x", "y": ' + b"[" * 70 + b"]" * 70 + b"}", 1, "deep"),
        (GOOD + b"\n" + GOOD, 3, "used twice"),
        (GOOD + b'{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "x"}', 3, "used twice"),
    ],
)
def test_what_is_refused_and_where(data: bytes, row: int, reason: str) -> None:
    with pytest.raises(InvalidProblemsError, match=reason) as caught:
        parse(data)
    assert (caught.value.source, caught.value.row) == ("rows.jsonl", row)


def test_versions_walk_through_the_file_and_begin_again() -> None:
    problems = parse(b"".join(b'{"id": %d, "prompt": "x"}\n' % i for i in range(5)))

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
    problem = parse(json.dumps({"id": "a", "prompt": [1], "x": {"y": [None]}}).encode())[0]
    for value in (problem, sample("now")):
        assert pickle.loads(pickle.dumps(value)) == value
