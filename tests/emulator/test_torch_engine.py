"""`--engine transformers` serves what the numpy engine serves; runs where torch is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(
        not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
        reason="torch is not installed",
    ),
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("default"),
]
Start = Callable[..., Any]


def test_both_engines_answer_alike(start: Start, publisher: Any) -> None:
    publisher.full("a")
    publisher.delta("b", "a")
    publisher.lora("l")
    ask = {"max_tokens": 12, "seed": 3, "logprobs": True, "ignore_eos": True, "n": 2}
    answers = []
    for engine in ("numpy", "transformers"):
        caller = start(engine=engine, replica_count=1)
        turns = []
        for identity, previous in ((None, None), ("a", None), ("b", "a"), ("l", None)):
            if identity is not None:
                caller.load(identity, previous)
            for prompt in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6]):  # the second from a cached prefix
                answer = caller.complete(prompt=prompt, **ask).json()
                turns.append(answer)
        answers.append(turns)
    for left, right in zip(*answers, strict=True):
        assert left["model"] == right["model"]
        assert left["usage"] == right["usage"]
        for one, other in zip(left["choices"], right["choices"], strict=True):
            for mine, theirs in zip(
                one["logprobs"]["content"], other["logprobs"]["content"], strict=True
            ):
                assert mine["token_id"] == theirs["token_id"]
                assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)


def test_what_transformers_cannot_load_is_an_error_of_that_replica(
    start: Start, publisher: Any
) -> None:
    caller = start(engine="transformers", replica_count=1)
    out = publisher.full("a")
    config = out / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"nonsense"'))
    caller.load("a", validation={"extra_fields_ignore": ["model_type"]})
    assert caller.stages() == ["error"]
    assert caller.complete().status_code == 200
