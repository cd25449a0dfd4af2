"""Turns merged into sequences, straddling ones masked, routes laid out."""

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hotload.options import Sampling
from hotload.rollout.completions_api import Answer
from hotload.rollout.merge_turns import Turns
from hotload.rollout.routing import (
    pack_matrices,
    read_routes,
    routes_of_array,
    routes_of_matrices,
)
from hotload.rollout.straddling import settle_weights
from hotload.rollout.trajectory import Segment, Trajectory
from tests.factories import provenance, segment, trajectory


def answered(
    prompt: tuple[int, ...],
    tokens: tuple[int, ...],
    identity: str | None = "a",
    routed: str | None = None,
    **entry: Any,
) -> Answer:
    asks = routed is not None or "routing_matrix" in entry
    answer = Answer(Sampling(include_routing_matrix=asks), prompt)
    content = [{"token_id": token, "sampling_logprob": -float(token), **entry} for token in tokens]
    model = "m" if identity is None else f"m@{identity}"
    choice = {
        "text": "x" * len(tokens),
        "finish_reason": "stop",
        "logprobs": {"content": content},
        "routed_experts": routed,
    }
    assert answer.add({"model": model, "choices": [choice]}) is None
    assert answer.finish() is None
    return answer


def turns_of(*answers: Answer) -> Turns:
    turns = Turns()
    for answer in answers:
        turns.note(answer)
        turns.take(answer)
    return turns


def test_a_prompt_that_repeats_the_tokens_goes_on_with_the_sequence() -> None:
    turns = turns_of(answered((7, 8), (1, 2)), answered((7, 8, 1, 2, 9, 9), (3,)))
    assert turns.segments == (
        Segment(
            (7, 8),
            (1, 2, 9, 9, 3),
            (-1.0, -2.0, 0.0, 0.0, -3.0),
            (True, True, False, False, True),
        ),
    )
    assert turns.runs == ((0, "a"),)
    assert turns.text == "x"
    assert (turns.prompt_token_count, turns.completion_token_count) == (2 + 6, 3)


@pytest.mark.parametrize("prompt", [(7, 8, 1), (7, 8, 1, 3, 9), (7,), (8, 8, 1, 2, 9)])
def test_any_other_prompt_begins_a_new_sequence(prompt: tuple[int, ...]) -> None:
    turns = turns_of(answered((7, 8), (1, 2)), answered(prompt, (3,)))
    assert turns.segments == (
        Segment((7, 8), (1, 2), (-1.0, -2.0), (True, True)),
        Segment(prompt, (3,), (-3.0,), (True,)),
    )


def test_no_more_of_a_prompt_is_cached_than_there_is() -> None:
    answer = answered((7, 8), (1,))
    answer.cached_prompt_token_count = 50
    assert turns_of(answer).cached_prompt_token_count == 2


def test_a_prompt_without_anything_new_leaves_no_gap() -> None:
    turns = turns_of(answered((7,), (1,)), answered((7, 1), (2,)), answered((7, 1, 2, 5), (3,)))
    (segment,) = turns.segments
    assert segment.token_ids_T == (1, 2, 5, 3)
    assert segment.loss_mask_T == (True, True, False, True)


def test_empty_answers() -> None:
    assert turns_of().segments == (Segment((), (), (), ()),)
    assert turns_of(answered((7,), ())).segments == (Segment((7,), (), (), ()),)
    turns = turns_of(answered((7,), ()), answered((7, 8), (1,)), answered((5,), ()))
    assert turns.segments == (Segment((7, 8), (1,), (-1.0,), (True,)),)


def test_runs_count_over_all_sequences() -> None:
    turns = turns_of(
        answered((7,), (1, 2)),
        answered((7, 1, 2, 9), (3,)),
        answered((5,), (4, 5), "b"),
        answered((5, 4, 5), (6,), None),
        answered((5, 4, 5, 6), (7,), "b"),
    )
    assert turns.runs == ((0, "a"), (4, "b"), (6, ""), (7, "b"))
    assert turns.observed == ("a", "b")
    assert turns.last_identity == "b"


def routes_of(turns: Turns) -> list[list[list[int]] | None]:
    """Of each segment."""
    return [
        None
        if one.routes is None
        else read_routes(one.routes, len(one.prompt_token_ids) + len(one.token_ids_T)).tolist()
        for one in turns.segments
    ]


UNTOLD = [-1, -1]


def test_a_matrix_is_of_the_forward_that_predicted_its_token() -> None:
    turns = turns_of(answered((7, 8, 9), (1, 2), routing_matrix="AQI="))
    # Of 7, 8, 9 and 1; nothing was predicted from 2.
    assert routes_of(turns) == [[UNTOLD, UNTOLD, [1, 2], [1, 2]]]


def test_what_was_said_between_turns_has_no_route() -> None:
    first = answered((7,), (1,), routing_matrix="AQI=")
    turns = turns_of(first, answered((7, 1, 9), (2,), routing_matrix="AwQ="))
    assert routes_of(turns) == [[[1, 2], UNTOLD, [3, 4]]]
    assert routes_of(turns_of(first, answered((7, 1, 9), (2,)))) == [None]
    silent = answered((7, 1, 9), (), routing_matrix="AwQ=")
    third = answered((7, 1, 9, 8), (2,), routing_matrix="AwQ=")
    assert routes_of(turns_of(first, silent)) == [[[1, 2], UNTOLD]]
    assert routes_of(turns_of(first, silent, third)) == [[[1, 2], UNTOLD, UNTOLD, [3, 4]]]
    assert routes_of(turns_of(first, third)) == [[[1, 2], UNTOLD, UNTOLD, [3, 4]]]
    wider = answered((7, 1, 9), (2,), routing_matrix="AwQF")
    assert routes_of(turns_of(first, wider)) == [None]


def test_every_segment_has_its_own_routes() -> None:
    first = answered((7,), (1,), routing_matrix="AQI=")
    other = answered((5,), (2, 3), routing_matrix="AwQ=")
    assert routes_of(turns_of(first, other)) == [[[1, 2]], [[3, 4], [3, 4]]]
    assert routes_of(turns_of(first, answered((5,), (2,)))) == [[[1, 2]], None]


def packed(experts: np.ndarray) -> str:
    """As vLLM sends them."""
    file = io.BytesIO()
    np.save(file, experts)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<u2", "<i4", ">i8"])
def test_an_array_for_every_token_but_the_last(dtype: str) -> None:
    experts = np.arange(4 * 3 * 2).reshape(4, 3, 2)
    turns = turns_of(answered((7, 8, 9), (1, 2), routed=packed(experts.astype(dtype))))
    assert routes_of(turns) == [experts.reshape(4, 6).tolist()]
    # The next turn tells the rest, and what was sampled keeps the experts that sampled it.
    later = -np.ones((6, 3, 2), np.int64)
    later[3:] = experts[1:] + 7
    turns = turns_of(
        answered((7, 8, 9), (1, 2), routed=packed(experts.astype(dtype))),
        answered((7, 8, 9, 1, 2, 5), (3,), routed=packed(later.astype("<i2"))),
    )
    assert routes_of(turns) == [
        [*experts.reshape(4, 6).tolist(), *later[4:].reshape(2, 6).tolist()]
    ]


def test_routes_of_a_real_models_form() -> None:
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 256, (5, 58, 8)).astype(np.uint8)
    texts = [base64.b64encode(matrix.tobytes()).decode() for matrix in matrices]
    routes = routes_of_matrices(texts, 3)
    found = read_routes(routes, 8)
    assert found.shape == (7, 58 * 8)
    assert (found[2:] == matrices.reshape(5, -1)).all()
    assert pack_matrices(found) == ["", "", *texts]
    with pytest.raises(ValueError, match="expert 256, expected 0 to 255"):
        pack_matrices(np.full((1, 2), 256, np.int16))
    for count in (6, 1, 0):
        with pytest.raises(ValueError, match="bytes of routes"):
            read_routes(routes, count)
    with pytest.raises(ValueError, match="bytes of routes"):
        read_routes(b"\0\0\0", 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("?", "not base64"),
        (base64.b64encode(b"no array").decode(), "magic"),
        (packed(np.zeros((3, 1, 2), np.uint8)), r"\[3, 1, 2\], expected integers \[2,"),
        (packed(np.zeros((2, 2), np.uint8)), "expected integers"),
        (packed(np.zeros((2, 1, 2), np.float32)), "expected integers"),
        (packed(np.asfortranarray(np.zeros((2, 3, 2), np.uint8))), "expected integers"),
        (packed(np.full((2, 1, 2), 40_000)), "expert 40000"),
        (packed(np.zeros((2, 1, 2), np.uint8))[:-4], "reshape"),
        (base64.b64encode(b"\x93NUMPY\x01\x00\xff\xff").decode(), "EOF"),
    ],
)
def test_an_array_that_is_none_of_the_answer(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        routes_of_array(text, 3)


def made_by(runs: tuple[tuple[int, str], ...], *lengths: int, **fields: Any) -> Trajectory:
    named = tuple(dict.fromkeys(identity for _, identity in runs if identity))
    origin = provenance(*fields.pop("observed", named), identity="a", runs=runs)
    segments = (segment((1,) * length, prompt=(7,)) for length in lengths)
    return trajectory(*segments, provenance=origin, **fields)


NOW, NEXT, OTHER = "run-000003-0badf00d", "run-000004-0badf00d", "raid-000003-0badf00d"


@pytest.mark.parametrize(
    ("observed", "failure"),
    [
        ((NOW,), None),
        ((NEXT,), None),
        ((), None),
        ((OTHER,), "other_weights"),
        ((NOW, OTHER), "other_weights"),
        (("run",), "other_weights"),
        (("run-000003-0badf00d-x",), "other_weights"),
    ],
)
def test_weights_that_are_no_version_of_the_run_fail_a_sample(
    observed: tuple[str, ...], failure: str | None
) -> None:
    made = made_by((), 3, observed=observed)
    sample = replace(made, provenance=replace(made.provenance, identity=NOW))
    settled = settle_weights(sample, "accept")
    assert settled.failure == failure
    assert settled.segments == sample.segments
    if failure:
        assert settled.detail == f"made by {observed[-1]!r}, sent to {NOW!r}"


@pytest.mark.parametrize(
    ("runs", "kept"),
    [
        (((0, "a"), (1, "b")), 1),
        (((0, "a"), (3, "b")), 3),
        (((0, "a"), (4, "b")), 4),
        (((0, "a"), (1, ""), (2, "a"), (4, "b")), 4),
        (((2, "a"), (4, "b"), (5, "a")), 4),
    ],
)
def test_tokens_from_the_change_on_are_masked(runs: tuple[tuple[int, str], ...], kept: int) -> None:
    masked = settle_weights(made_by(runs, 3, 3), "mask_from_change")
    assert masked.failure is None
    found = [flag for segment in masked.segments for flag in segment.loss_mask_T]
    assert found == [True] * kept + [False] * (6 - kept)
    assert [len(segment.loss_mask_T) for segment in masked.segments] == [3, 3]


def test_what_is_dropped_and_what_is_left_alone() -> None:
    straddling = made_by(((0, "a"), (1, "b")), 3)
    assert settle_weights(straddling, "accept") == straddling
    dropped = settle_weights(straddling, "drop")
    assert dropped.failure == "straddling"
    assert dropped.segments == straddling.segments
    single, failed = made_by(((0, "b"),), 3), made_by(((0, "a"),), 3, failure="too_long")
    for policy in ("drop", "mask_from_change"):
        assert settle_weights(single, policy) == single
        assert settle_weights(failed, policy) == failed
    unknown = made_by((), 3, observed=("a", "b"))
    assert settle_weights(unknown, "mask_from_change").failure == "straddling"
