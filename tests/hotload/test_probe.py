"""The probe: what differs, and what is a probe."""

import json
import math

import pytest

from hotload.checkpoint.sub_configs import vocab_size
from hotload.errors import ProtocolError, StoreError
from hotload.publish.probe import (
    PROBE_LIMIT_BYTES,
    Probe,
    ProbeAnswer,
    what_differs,
)
from hotload.rollout.completions_api import parse_probe, probe_body

PROBE = Probe(token_ids=(5, 6, 7))
TRAINED = Probe(token_ids=(5, 6, 7), logprobs=(-1.0, -2.0))


def answer(replica: str | None, *logprobs: float) -> ProbeAnswer:
    return ProbeAnswer(f"session of {replica}", replica, "id", logprobs)


@pytest.mark.parametrize(
    ("answers", "probe", "named"),
    [
        ([answer("a", -1, -2)], PROBE, []),
        ([answer("a", -1, -2)], TRAINED, []),
        ([answer("a", -1, -2), answer("b", -1.04, -2.04)], PROBE, []),
        ([answer("a", -1, -2), answer("b", -1.2, -2)], PROBE, ["a", "b", "0.1 nats"]),
        ([answer("a", -1, -2), answer("b", -1, -2), answer("c", -9, -2)], PROBE, ["c", "4 nats"]),
        ([answer("a", -3, -2)], TRAINED, ["a", "the trainer", "1 nats"]),
        ([answer("a", math.nan, -2)], TRAINED, ["a", "inf nats"]),
        ([answer("a", -1, -2), answer("b", -1)], PROBE, ["inf nats"]),
        # Replicas that do not name themselves, and one replica that answers in two ways.
        ([answer(None, -1, -2), answer(None, -9, -2)], PROBE, ["the replica of session"]),
        ([answer("a", -1, -2), answer("a", -9, -2)], PROBE, ["4 nats"]),
    ],
)
def test_who_differs(answers: list[ProbeAnswer], probe: Probe, named: list[str]) -> None:
    *others, last = answers
    different = what_differs(last, others, probe, 0.05)
    assert (different is None) is (not named)
    assert all(name in str(different) for name in named)


def test_a_probe_without_figures_keeps_its_tokens() -> None:
    assert TRAINED.without_figures() == PROBE


def test_a_probe_over_a_vocabulary_is_the_same_every_time() -> None:
    assert Probe.over(1000) == Probe.over(1000)
    assert len(set(Probe.over(1000).token_ids)) == 32
    assert max(Probe.over(3).token_ids) < 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"token_ids": [1]}',
        b'{"token_ids": [1, -1]}',
        b'{"token_ids": [1, 2], "logprobs": [-1, -1]}',
        b'{"token_ids": [1, 2], "logprobs": [0.5]}',
        b'{"token_ids": [1, 2], "logprobs": [NaN]}',
        b'{"token_ids": [1, 2], "key": "x"}',
        json.dumps({"token_ids": list(range(513))}).encode(),
        b" " * (PROBE_LIMIT_BYTES + 1),
    ],
)
def test_what_is_no_probe_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"probe\.json"):
        Probe.parse(data, path="/step/probe.json")


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 9}, 9),
        ({"text_config": {"vocab_size": 9}}, 9),
        ({"vocab_size": "9"}, None),
        ({"vocab_size": True}, None),
        ({"text_config": 1}, None),
        ({}, None),
    ],
)
def test_the_vocabulary_of_a_config(config: dict[str, object], size: int | None) -> None:
    assert vocab_size(config) == size


def body(**changes: object) -> bytes:
    content = [{"token_id": one, "logprob": -one} for one in (5, 6, 7, 99)]
    whole = {
        "model": "m@id",
        "choices": [{"logprobs": {"content": content}}],
        "perf_metrics": {"backend-host": "replica-1"},
    }
    return json.dumps(whole | changes).encode()


def test_an_answer_is_read_without_the_first_and_the_generated_token() -> None:
    assert parse_probe(body(), (5, 6, 7)) == ("replica-1", "id", (-6.0, -7.0))
    assert parse_probe(body(perf_metrics=None, model="m"), (5, 6, 7))[:2] == (None, None)
    assert probe_body((5, 6, 7), "m")["prompt"] == [5, 6, 7]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        body(choices=[]),
        body(choices=[{"logprobs": None}]),
        body(choices=[{"logprobs": {"content": [{"token_id": 5, "logprob": None}] * 3}}]),
        body(choices=[{"logprobs": {"content": [{"token_id": 5, "logprob": 0}] * 3}}]),
    ],
)
def test_another_answer_is_no_answer(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_probe(data, (5, 6, 7))
