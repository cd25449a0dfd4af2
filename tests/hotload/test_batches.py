"""Rows of rollouts: written and read under a schema, padded for a trainer, under its own names."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from hotload.dataset.logprob_drift import drifts_of
from hotload.dataset.parquet import parse_rollouts, render_rollouts
from hotload.dataset.table import check_rollouts, rollouts_frame
from hotload.dataset.trainer_batch import make_batch, slime_batch, to_tensors, trl_batch, verl_batch
from hotload.errors import StoreError
from hotload.rollout.counts import GroupCounts, count_groups
from hotload.rollout.trajectory import Problem, Trajectory
from tests.factories import provenance, scored_group, segment, trajectory

SHA = "0" * 64
PAD = 99


def sample(number: int, tokens: int = 2, **fields: Any) -> Trajectory:
    made = segment(range(10, 10 + tokens), prompt=(1, 2, 3)[: number + 1])
    origin = provenance("now", request_id=f"r{number}")
    reason = "length" if number else "stop"
    return trajectory(made, number=number, provenance=origin, finish_reason=reason, **fields)


# Two turns and a tool's result between them; then a turn whose prompt was rewritten, made by two
# versions of the weights: tokens 0-3 and 4 by "old", 5 and 6 by "now". Two layers with two experts
# each for a token; the first turn's prompt and what the tool said have none.
NONE = [[-1, -1], [-1, -1]]
ROUTES = np.array([NONE, [[1, 2], [3, 0]], NONE, NONE, [[2, 3], [0, 1]]])
LATER_ROUTES = np.arange(4 * 2 * 2).reshape(4, 2, 2)
TURNS = trajectory(
    replace(
        segment(
            (10, 11, 12, 13),
            prompt=(1, 2),
            logprobs=(-0.5, 0.0, 0.0, -0.25),
            mask=(True, False, False, True),
        ),
        routes=ROUTES.astype("<i2").tobytes(),
    ),
    replace(
        segment((20, 21, 22), prompt=(7, 8), logprobs=(-1.0, -2.0, -3.0), mask=(True, True, False)),
        routes=LATER_ROUTES.astype("<i2").tobytes(),
    ),
    number=1,
    provenance=provenance("old", "now", request_id="r1", attempts=2, runs=((0, "old"), (5, "now"))),
    finish_reason="length",
    turn_count=3,
    completion_token_count=5,
    transcript=({"role": "user", "content": "2 + 2 – ?"}, {"role": "tool", "content": "4"}),
    is_hedge=True,
)
PARTS = ({"format": 0.0, "answer": 1.0}, {"answer": 2.0}, {})
GROUP = scored_group(
    sample(0),
    TURNS,
    sample(2, 0, failure="timeout"),
    problem=Problem("p", messages=({"role": "user", "content": "2 + 2 – ?"},), answer=4),
    rewards=(1.0, 2.0, None),
    advantages_G=(-0.5, 0.5, None),
    reward_parts_G=PARTS,
    mark="partial",
)
UNUSED = scored_group(
    sample(0, problem_id="q"), rewards=(3.0,), advantages_G=(None,), mark="incomplete"
)
FRAME = rollouts_frame([GROUP, UNUSED], run_id="run", policy_version=4)
BATCH = make_batch(FRAME, pad_token_id=PAD)


def test_a_row_per_segment() -> None:
    frame = check_rollouts(FRAME)
    assert frame["segment_number"].to_list() == [0, 0, 1, 0, 0]
    assert frame["segment_count"].to_list() == [1, 2, 2, 1, 1]
    assert frame["turn_count"].to_list() == [1, 3, 3, 1, 1]
    assert frame["reward"].to_list() == [1.0, 2.0, 2.0, None, 3.0]
    assert frame["mark"].to_list() == ["partial"] * 4 + ["incomplete"]
    assert frame["reward_parts"].to_list()[0] == [
        {"name": "answer", "value": 1.0},
        {"name": "format", "value": 0.0},
    ]
    assert frame["identity_runs"].to_list()[:3] == [
        [],
        [{"start": 0, "identity": "old"}],
        [{"start": 0, "identity": "old"}, {"start": 1, "identity": "now"}],
    ]
    told = frame["transcript"].to_list()
    assert json.loads(told[1]) == [dict(message) for message in TURNS.transcript]
    assert told[2] is None
    assert json.loads(frame["prompt"][0]) == [{"role": "user", "content": "2 + 2 – ?"}]
    assert frame["prompt"].to_list()[2:] == [None, frame["prompt"][0], "x"]
    assert frame["answer"].to_list() == ["4", "4", None, "4", None]
    routes = [ROUTES.ravel().tolist(), LATER_ROUTES.ravel().tolist()]
    assert frame["routes"].to_list() == [None, *routes, None, None]


def test_what_a_part_holds_counts_samples_and_not_segments() -> None:
    facts = count_groups([GROUP, UNUSED], GroupCounts(), run_id="run")
    assert (facts.group_count, facts.sample_count, facts.reward_count) == (2, 4, 3)
    assert (facts.reward_sum, facts.completion_token_count) == (6.0, 2 + 2 + 3 + 2)
    assert facts.samples_by_identity == {"now": 2, "old → now": 1}
    assert facts.failed_samples == {"timeout": 1}


def with_number(frame: pl.DataFrame, number: str) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={"hotload.schema": number})
    return buffer.getvalue()


def test_a_part_there_and_back() -> None:
    data = render_rollouts(FRAME, digest=SHA)
    frame, digest = parse_rollouts(data, path="p")
    assert frame.equals(FRAME)
    assert digest == SHA


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (with_number(FRAME, "2"), "rows with schema '2', expected 3"),
        (b"PAR1", "not a Parquet file"),
        (
            with_number(FRAME.with_columns(advantage=pl.lit(float("nan"))), "3"),
            "reward and advantage are finite",
        ),
        (with_number(FRAME.drop("mark"), "3"), "break their schema"),
        (with_number(pl.concat([FRAME, FRAME]), "3"), "a segment occurs twice"),
        (with_number(FRAME.with_columns(mark=pl.lit(None, pl.String)), "3"), "or a mark"),
        *(
            (
                with_number(FRAME.with_columns(routes=pl.lit(wrong, pl.List(pl.Int16))), "3"),
                "routes that are not of",
            )
            for wrong in ([], [0] * 7)
        ),
    ],
)
def test_a_part_that_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(StoreError, match=told):
        parse_rollouts(data, path="p")


def test_padded_arrays() -> None:
    # The failed sample and the group that is not to be used are left out.
    assert len(BATCH) == 3
    assert BATCH.prompt_ids.tolist() == [[PAD, 1], [1, 2], [7, 8]]
    assert BATCH.prompt_mask.tolist() == [[False, True], [True, True], [True, True]]
    assert BATCH.completion_ids.tolist() == [
        [10, 11, PAD, PAD],
        [10, 11, 12, 13],
        [20, 21, 22, PAD],
    ]
    assert BATCH.loss_mask.astype(int).tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    assert BATCH.sampling_logprobs.tolist() == [
        [-0.5, -0.5, 0, 0],
        [-0.5, 0, 0, -0.25],
        [-1, -2, 0, 0],
    ]
    assert BATCH.rewards.tolist() == [1, 2, 2]
    assert BATCH.advantages.tolist() == [-0.5, 0.5, 0.5]
    assert BATCH.group_numbers.tolist() == [0, 0, 0]
    assert BATCH.sample_numbers.tolist() == [0, 1, 1]
    assert BATCH.segment_numbers.tolist() == [0, 0, 1]
    assert BATCH.is_truncated.tolist() == [False, True, True]
    assert BATCH.identities == (("now",), ("old",), ("old", "now"))
    assert BATCH.token_count == 6
    assert BATCH.routes[0] is None
    assert BATCH.routes[1].tolist() == ROUTES.reshape(5, 4).tolist()  # type: ignore[union-attr]
    assert BATCH.routes[2].tolist() == LATER_ROUTES.reshape(4, 4).tolist()  # type: ignore[union-attr]


def test_values_of_a_batch_by_the_rows_of_its_frame() -> None:
    values = BATCH.completion_ids.astype(float)
    # The failed sample and the group that is not to be used have none.
    rows = [[10, 11], [10, 11, 12, 13], [20, 21, 22], None, None]
    assert [None if row is None else row.tolist() for row in BATCH.by_frame_row(values)] == rows
    assert BATCH.by_frame_row([row for row in rows if row]) == rows  # ragged, as slime has them
    with pytest.raises(ValueError, match="values of 2 rows, expected 3"):
        BATCH.by_frame_row(values[:2])
    mixed = FRAME.reverse()
    found = make_batch(mixed)
    for row, tokens in zip(
        found.by_frame_row(found.completion_ids), mixed["token_ids"], strict=True
    ):
        assert row is None or row.tolist() == tokens.to_list()


def test_a_batch_of_nothing() -> None:
    batch = make_batch(FRAME.head(0))
    assert batch.by_frame_row(batch.sampling_logprobs) == []
    assert len(batch) == 0
    assert batch.completion_ids.shape == (0, 0)
    assert verl_batch(batch)["input_ids"].shape == (0, 0)
    assert slime_batch(batch)["tokens"] == []


def test_rows_are_added() -> None:
    batch = BATCH.with_rows(5)
    assert len(batch) == 5
    assert batch.token_count == BATCH.token_count
    assert batch.completion_ids[:3].tolist() == BATCH.completion_ids.tolist()
    assert batch.prompt_mask[3:].tolist() == [[False, True]] * 2
    assert batch.completion_mask[3:].tolist() == [[True, False, False, False]] * 2
    assert not batch.loss_mask[3:].any()
    assert not batch.advantages[3:].any()
    assert batch.group_numbers.tolist() == [0, 0, 0, -1, -1]
    assert batch.problem_ids == ("p", "p", "p", "", "")
    assert batch.identities[3:] == ((), ())
    assert batch.routes == (*BATCH.routes, None, None)
    # The values of added rows go to no row of the frame.
    assert [row is not None for row in batch.by_frame_row(batch.completion_ids)] == [
        *(True, True, True, False, False)
    ]
    assert BATCH.with_rows(3).completion_ids.tolist() == BATCH.completion_ids.tolist()
    with pytest.raises(ValueError, match="3 rows, expected at most 2"):
        BATCH.with_rows(2)
    nothing = make_batch(FRAME.head(0)).with_rows(2)
    assert nothing.prompt_mask.tolist() == nothing.completion_mask.tolist() == [[True], [True]]
    assert not nothing.loss_mask.any()
    for arrays in (trl_batch(nothing), verl_batch(nothing), slime_batch(nothing)):
        assert all(len(value) == 2 for value in arrays.values() if np.ndim(value))


def test_as_trl_names_it() -> None:
    arrays = trl_batch(BATCH)
    assert set(arrays) == {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "tool_mask",
        "advantages",
        "old_per_token_logps",
        "sampling_per_token_logps",
        "num_items_in_batch",
    }
    assert arrays["prompt_ids"].shape == arrays["prompt_mask"].shape == (3, 2)
    for name in ("completion_ids", "completion_mask", "tool_mask", "old_per_token_logps"):
        assert arrays[name].shape == (3, 4)
    assert arrays["advantages"].shape == (3,)
    assert arrays["completion_mask"].dtype == np.int64
    # Its loss is over completion_mask × tool_mask.
    assert (arrays["completion_mask"] * arrays["tool_mask"]).sum() == arrays["num_items_in_batch"]


def test_as_verl_names_it() -> None:
    arrays = verl_batch(BATCH)
    assert set(arrays) == {
        "prompts",
        "responses",
        "input_ids",
        "attention_mask",
        "position_ids",
        "response_mask",
        "rollout_log_probs",
        "old_log_probs",
        "token_level_scores",
        "token_level_rewards",
        "advantages",
        "returns",
        "uid",
        "data_source",
    }
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert arrays[name].shape == (3, 6)
    for name in ("responses", "response_mask", "rollout_log_probs", "advantages", "returns"):
        assert arrays[name].shape == (3, 4)
    assert arrays["position_ids"].tolist()[0] == [0, 0, 1, 2, 2, 2]
    assert arrays["token_level_scores"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]]
    assert arrays["advantages"].tolist()[1] == [0.5, 0, 0, 0.5]
    assert arrays["uid"].tolist() == ["p", "p", "p"]
    assert arrays["uid"].dtype == object


def test_as_slime_names_it() -> None:
    lists = slime_batch(BATCH)
    assert set(lists) == {
        "tokens",
        "response_lengths",
        "rewards",
        "raw_reward",
        "truncated",
        "sample_indices",
        "rollout_ids",
        "rollout_mask_sums",
        "loss_masks",
        "rollout_log_probs",
        "weight_versions",
    }
    assert lists["tokens"] == [[1, 10, 11], [1, 2, 10, 11, 12, 13], [7, 8, 20, 21, 22]]
    assert lists["response_lengths"] == [2, 4, 3]
    assert lists["rewards"] == [-0.5, 0.5, 0.5]
    assert lists["raw_reward"] == [1.0, 2.0, 2.0]
    assert lists["truncated"] == [0, 1, 1]
    assert lists["sample_indices"] == lists["rollout_ids"] == [0, 1, 1]
    assert lists["rollout_mask_sums"] == [2, 4, 4]
    assert lists["loss_masks"][1] == [1, 0, 0, 1]
    assert [len(each) for each in lists["rollout_log_probs"]] == lists["response_lengths"]
    assert lists["weight_versions"][2] == ["old", "now"]


def test_routes_as_verl_and_slime_have_them() -> None:
    whole = FRAME.filter(segment_number=1)
    batch = make_batch(pl.concat([whole, whole.with_columns(problem_id=pl.lit("q"))]))
    (routed,) = {*verl_batch(batch, active_expert_count=2)} - {*verl_batch(batch)}
    found = verl_batch(batch, active_expert_count=2)[routed]
    assert (routed, found.dtype, found.shape) == ("routed_experts", np.int16, (2, 5, 2, 2))
    assert (found[1, :4] == LATER_ROUTES).all()
    assert not found[:, 4].any()  # of the last token nothing is predicted
    (routed,) = {*slime_batch(batch, active_expert_count=2)} - {*slime_batch(batch)}
    assert routed == "rollout_routed_experts"
    for one in slime_batch(batch, active_expert_count=4)[routed]:
        assert (one.dtype, one.tolist()) == (np.int32, LATER_ROUTES.reshape(4, 1, 4).tolist())
    # Prompts of other lengths: routes follow their tokens.
    longer = whole.with_columns(
        problem_id=pl.lit("r"),
        prompt_token_ids=pl.lit([7, 8, 9, 7], pl.List(pl.Int32)),
        routes=pl.lit([5] * 6 * 4, pl.List(pl.Int16)),
    )
    padded = verl_batch(make_batch(pl.concat([whole, longer])), active_expert_count=2)
    assert (padded["routed_experts"][0, 2:6] == LATER_ROUTES).all()
    assert not padded["routed_experts"][0, :2].any()
    nothing = make_batch(FRAME.head(0))
    assert verl_batch(nothing, active_expert_count=2)["routed_experts"].shape[0] == 0
    assert slime_batch(nothing, active_expert_count=2)["rollout_routed_experts"] == []


@pytest.mark.parametrize("laid_out", [verl_batch, slime_batch])
def test_trainers_that_replay_every_token_get_all_routes_or_an_error(laid_out: Any) -> None:
    with pytest.raises(ValueError, match="problem 'p', sample 0: no token has a route"):
        laid_out(BATCH, active_expert_count=2)
    gaps = make_batch(FRAME.filter(sample_number=1, segment_number=0))
    with pytest.raises(ValueError, match="problem 'p', sample 1: 3 of 5 tokens have no route"):
        laid_out(gaps, active_expert_count=2)
    whole = make_batch(FRAME.filter(segment_number=1))
    with pytest.raises(ValueError, match="sample 1: 4 experts for a token, not a multiple of 3"):
        laid_out(whole, active_expert_count=3)


def test_tensors_where_torch_is_there() -> None:
    torch = pytest.importorskip("torch")
    tensors = to_tensors(trl_batch(BATCH))
    assert tensors["completion_ids"].dtype == torch.int64
    assert tensors["old_per_token_logps"].dtype == torch.float32
    assert tensors["completion_ids"].shape == (3, 4)
    assert tensors["num_items_in_batch"].item() == 6
    given = BATCH.by_frame_row(tensors["sampling_per_token_logps"])
    assert drifts_of(given, FRAME, [FRAME.height]) == drifts_of(
        BATCH.by_frame_row(BATCH.sampling_logprobs), FRAME, [FRAME.height]
    )
    assert to_tensors(verl_batch(BATCH))["uid"] is not None


def test_nothing_here_needs_torch() -> None:
    code = "import sys, hotload.dataset.trainer_batch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
