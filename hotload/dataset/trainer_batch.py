"""Rows of rollouts → padded arrays for a trainer.

Prompts are padded on the left, completions on the right, so that they meet in the middle.

`trl_batch`, `verl_batch` and `slime_batch` name the same numbers as those trainers do. Nothing here
needs torch; `to_tensors` uses it where it is installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hotload.rollout.routing import NO_ROUTE, Routes
from hotload.rollout.trajectory import Weights

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
Booleans = NDArray[np.bool_]

IS_TRAINABLE = pl.col("advantage").is_not_null() & pl.col("loss_mask").list.any()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Segments to train on, one per row, padded to the longest.

    Prompt arrays have shape [rows, longest prompt], completion arrays, `loss_mask` and
    `sampling_logprobs` [rows, longest completion], all others [rows].

    `loss_mask` is true for tokens the policy sampled and the spec did not mask out; padding is
    false in both masks. Log-probabilities are natural, under the distribution really sampled, and 0
    where the loss mask is false. `group_numbers` counts problems from 0 in order of appearance,
    `sample_numbers` is the sample's number in its group: a sample of several segments has as
    many rows, each with its reward and advantage.
    """

    prompt_ids: Integers
    prompt_mask: Booleans
    completion_ids: Integers
    completion_mask: Booleans
    loss_mask: Booleans
    sampling_logprobs: Floats
    rewards: Floats
    advantages: Floats
    policy_versions: Integers
    group_numbers: Integers
    sample_numbers: Integers
    segment_numbers: Integers
    is_truncated: Booleans
    problem_ids: tuple[str, ...]
    """Of each row."""
    identities: tuple[tuple[str, ...], ...]
    """The weights that made each row, in order; the dispatched ones where the answer named none."""
    routes: tuple[Routes | None, ...]
    """Of each row, without its padding: the experts of every token but the last, as
    hotload.rollout.routing lays them out; `None` where the service told none."""
    frame_rows: tuple[int | None, ...]
    """For each row of the frame it was made of: the row here, `None` where it is left out."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.problem_ids)

    @property
    def token_count(self) -> int:
        """Tokens that take part in the loss."""
        return int(self.loss_mask.sum())

    def by_frame_row(self, values: Sequence[Any]) -> list[Any]:
        """Sort what a trainer made of this batch by the rows of its frame: the row's values, one
        per completion token, or `None` where it is left out. For `RolloutReader.acknowledge`.

        Args:
            values: one sequence per row here, each as long as its completion or padded on the
                right: an array or tensor [rows, longest completion], or lists.

        Raises:
            ValueError: they are not one per row.
        """
        if len(values) != len(self):
            raise ValueError(f"values of {len(values)} rows, expected {len(self)}")
        lengths = self.completion_mask.sum(axis=1).tolist()
        return [None if row is None else values[row][: lengths[row]] for row in self.frame_rows]

    def with_rows(self, count: int) -> Batch:
        """Add rows up to `count`, for trainers that want as many in each process.

        An added row has one token of prompt and one of completion, id 0, none of them in the loss;
        its numbers are -1, its problem is "", and it belongs to no row of the frame.

        Raises:
            ValueError: the batch has more rows.
        """
        added = count - len(self)
        if added < 0:
            raise ValueError(f"{len(self)} rows, expected at most {count}")
        arrays: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            if not isinstance(value := getattr(self, name), np.ndarray):
                continue
            # A batch of nothing has no width, either.
            widths = [(0, int(width == 0 and added > 0)) for width in value.shape[1:]]
            filler = -1 if name.endswith("_numbers") else 0
            arrays[name] = np.pad(value, [(0, added), *widths], constant_values=filler)
        arrays["prompt_mask"][len(self) :, -1:] = True
        arrays["completion_mask"][len(self) :, :1] = True
        return replace(
            self,
            **arrays,
            problem_ids=self.problem_ids + ("",) * added,
            identities=self.identities + ((),) * added,
            routes=self.routes + (None,) * added,
        )


def trainable(frame: pl.DataFrame) -> pl.DataFrame:
    """Select the rows of `frame` (of `table.Rollouts`) with an advantage and a token to train on,
    in order.

    Left out are failed samples, groups that are marked as not to be used, and segments whose tokens
    are all masked.
    """
    return frame.filter(IS_TRAINABLE)


def make_batch(frame: pl.DataFrame, *, pad_token_id: int = 0) -> Batch:
    """Make arrays of the trainable rows of `frame`; without any, arrays of zero rows.

    Args:
        frame: rows of `table.Rollouts`.
        pad_token_id: what stands where there is no token; the masks are false there.
    """
    rows = trainable(frame)
    row_numbers = count()
    prompt_ids, prompt_mask = _pad_left(rows["prompt_token_ids"], pad_token_id)
    completion_ids, completion_mask = _pad_right(rows["token_ids"], pad_token_id, np.int64)
    loss_mask, _ = _pad_right(rows["loss_mask"], False, np.bool_)
    logprobs, _ = _pad_right(rows["sampling_logprobs"], 0.0, np.float32)
    names = rows["problem_id"].to_list()
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        loss_mask=loss_mask,
        sampling_logprobs=np.where(loss_mask, logprobs, np.float32(0)),
        rewards=rows["reward"].to_numpy().astype(np.float32),
        advantages=rows["advantage"].to_numpy().astype(np.float32),
        policy_versions=rows["policy_version"].to_numpy().astype(np.int64),
        group_numbers=np.array([numbers[name] for name in names], dtype=np.int64),
        sample_numbers=rows["sample_number"].to_numpy().astype(np.int64),
        segment_numbers=rows["segment_number"].to_numpy().astype(np.int64),
        is_truncated=(rows["finish_reason"] == "length").fill_null(False).to_numpy(),
        problem_ids=tuple(names),
        identities=tuple(
            _identities(row)
            for row in rows.select("weights", "identity", "identities", "identity_runs").iter_rows(
                named=True
            )
        ),
        routes=tuple(
            None if routes is None else routes.to_numpy().reshape(length - 1, -1)
            for routes, length in zip(rows["routes"], _token_counts(rows), strict=True)
        ),
        frame_rows=tuple(
            next(row_numbers) if is_kept else None
            for is_kept in frame.select(IS_TRAINABLE).to_series()
        ),
    )


def _token_counts(rows: pl.DataFrame) -> list[int]:
    lengths = pl.col("prompt_token_ids").list.len() + pl.col("token_ids").list.len()
    return rows.select(lengths).to_series().to_list()


def _identities(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["weights"] == Weights.ASSUMED.value:
        return (row["identity"],)
    runs = row["identity_runs"] or [{"identity": each} for each in row["identities"]]
    return tuple(dict.fromkeys(run["identity"] for run in runs))


def _pad_right(column: pl.Series, filler: Any, dtype: type[Any]) -> tuple[NDArray[Any], Booleans]:
    lengths = column.list.len().to_numpy().astype(np.int64)
    width = int(lengths.max(initial=0))
    mask = np.arange(width) < lengths[:, np.newaxis]
    padded = np.full(mask.shape, filler, dtype=dtype)
    padded[mask] = _flat(column, dtype)
    return padded, mask


def _pad_left(column: pl.Series, filler: int) -> tuple[Integers, Booleans]:
    lengths = column.list.len().to_numpy().astype(np.int64)
    width = int(lengths.max(initial=0))
    mask = np.arange(width) >= width - lengths[:, np.newaxis]
    padded = np.full(mask.shape, filler, dtype=np.int64)
    padded[mask] = _flat(column, np.int64)
    return padded, mask


def _flat(column: pl.Series, dtype: type[Any]) -> NDArray[Any]:
    """All elements of a column of lists; `explode` alone would make a null of an empty list."""
    return column.filter(column.list.len() > 0).explode().to_numpy().astype(dtype)


def trl_batch(batch: Batch) -> dict[str, Any]:
    """Lay the batch out as TRL's GRPOTrainer (0.28 or newer) does its own generations, before its
    loss.

    `tool_mask` is the loss mask; `old_per_token_logps` and `sampling_per_token_logps` are those of
    the weights that sampled, so the ratio is that of the policy now to the policy that sampled.
    `num_items_in_batch` counts the tokens of this batch; TRL's loss expects the sum over all
    processes that train together.
    """
    return {
        "prompt_ids": batch.prompt_ids,
        "prompt_mask": batch.prompt_mask.astype(np.int64),
        "completion_ids": batch.completion_ids,
        "completion_mask": batch.completion_mask.astype(np.int64),
        "tool_mask": batch.loss_mask.astype(np.int64),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.sampling_logprobs,
        "sampling_per_token_logps": batch.sampling_logprobs,
        "num_items_in_batch": np.int64(batch.token_count),
    }


def verl_batch(batch: Batch, *, active_expert_count: int | None = None) -> dict[str, Any]:
    """Lay the batch out as verl's trainer holds it after advantages: tensors of the width of the
    response, and object arrays (`uid`, `data_source`) for its non-tensor batch.

    The score stands at the last token of each response; `uid` is one per group.

    Args:
        active_expert_count: experts a token is sent to in a layer, as the model's config has it:
            adds `routed_experts` for its router replay (R3), 0 for padding and the last token.

    Raises:
        ValueError: a token but the last has no route, and verl replays every one.
    """
    mask = np.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)
    scores = np.zeros(batch.completion_ids.shape, dtype=np.float32)
    last = batch.completion_mask.sum(axis=1) - 1
    scores[np.arange(len(batch)), last] = batch.rewards
    advantages = batch.advantages[:, np.newaxis] * batch.loss_mask
    routed: dict[str, Any] = {}
    if active_expert_count is not None:
        routes = _whole_routes(batch, active_expert_count)
        padded = np.zeros((*mask.shape, *routes[0].shape[1:]) if routes else (0, 0, 0, 0), np.int16)
        for row, one in enumerate(routes):
            padded[row, np.flatnonzero(mask[row])[:-1]] = one
        routed["routed_experts"] = padded
    return {
        "prompts": batch.prompt_ids,
        "responses": batch.completion_ids,
        "input_ids": np.concatenate([batch.prompt_ids, batch.completion_ids], axis=1),
        "attention_mask": mask.astype(np.int64),
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
        "response_mask": batch.loss_mask.astype(np.int64),
        "rollout_log_probs": batch.sampling_logprobs,
        "old_log_probs": batch.sampling_logprobs,
        "token_level_scores": scores,
        "token_level_rewards": scores,
        "advantages": advantages.astype(np.float32),
        "returns": advantages.astype(np.float32),
        "uid": np.array(batch.problem_ids, dtype=object),
        "data_source": np.full(len(batch), "hotload", dtype=object),
        **routed,
    }


def slime_batch(batch: Batch, *, active_expert_count: int | None = None) -> dict[str, Any]:
    """Lay the batch out as slime does its samples: ragged lists, prompt and response in one.

    `rewards` are the advantages, as they are there after its own normalisation; `raw_reward` the
    rewards. `sample_indices` and `rollout_ids` are the same for the segments of one sample, and
    `rollout_mask_sums` counts the tokens in the loss of all of them. `weight_versions` is a key of
    miles; slime leaves it where it is.

    Args:
        active_expert_count: as in `verl_batch`; adds `rollout_routed_experts`, [tokens − 1, layers,
            experts] each. Both count all layers, so each has to have experts.

    Raises:
        ValueError: as `verl_batch`.
    """
    rows = range(len(batch))
    prompts = [batch.prompt_ids[i][batch.prompt_mask[i]].tolist() for i in rows]
    answers = [batch.completion_ids[i][batch.completion_mask[i]].tolist() for i in rows]
    samples = list(zip(batch.group_numbers.tolist(), batch.sample_numbers.tolist(), strict=True))
    numbers = {sample: number for number, sample in enumerate(dict.fromkeys(samples))}
    indices = [numbers[sample] for sample in samples]
    sums = Counter[int]()
    for index, mask in zip(indices, batch.loss_mask, strict=True):
        sums[index] += int(mask.sum())
    routed: dict[str, Any] = {}
    if active_expert_count is not None:
        routes = _whole_routes(batch, active_expert_count)
        routed["rollout_routed_experts"] = [one.astype(np.int32) for one in routes]
    return {
        "tokens": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        "response_lengths": [len(answer) for answer in answers],
        "rewards": batch.advantages.tolist(),
        "raw_reward": batch.rewards.tolist(),
        "truncated": batch.is_truncated.astype(int).tolist(),
        "sample_indices": indices,
        "rollout_ids": indices,
        "rollout_mask_sums": [sums[index] for index in indices],
        "loss_masks": [
            batch.loss_mask[i][batch.completion_mask[i]].astype(int).tolist() for i in rows
        ],
        "rollout_log_probs": [
            batch.sampling_logprobs[i][batch.completion_mask[i]].tolist() for i in rows
        ],
        "weight_versions": [list(identities) for identities in batch.identities],
        **routed,
    }


def _whole_routes(batch: Batch, active_expert_count: int) -> list[Routes]:
    """Routes of each row, [N−1, layers, active experts], for trainers that leave no token to their
    own router.

    Raises:
        ValueError: a token but the last has none, or they do not divide so.
    """
    found = []
    why = "and this trainer replays those of all tokens but the last"
    for row, routes in enumerate(batch.routes):
        name = f"problem {batch.problem_ids[row]!r}, sample {batch.sample_numbers[row]}"
        if routes is None:
            raise ValueError(f"{name}: no token has a route, {why}")
        if untold := np.count_nonzero((routes == NO_ROUTE).any(axis=1)):
            raise ValueError(f"{name}: {untold} of {len(routes)} tokens have no route, {why}")
        if routes.shape[1] % active_expert_count:
            width = f"{routes.shape[1]} experts for a token"
            raise ValueError(f"{name}: {width}, not a multiple of {active_expert_count}")
        found.append(routes.reshape(len(routes), -1, active_expert_count))
    return found


def to_tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Turn arrays of numbers into torch tensors that share their memory. Lists and arrays of
    objects stay as they are.

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    import torch

    def tensor(value: Any) -> Any:
        if isinstance(value, np.generic):
            return torch.tensor(value.item())
        if isinstance(value, np.ndarray) and value.dtype != object:
            return torch.from_numpy(np.ascontiguousarray(value))
        return value

    return {name: tensor(value) for name, value in arrays.items()}
