"""What the rows of a cycle's rollouts come to, one part at a time: the numbers behind its report
and its metrics. Memory grows by a few dozen bytes a sample; tokens and texts are not kept.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hotload.dataset.table import samples_by_weights
from hotload.identity import version_of
from hotload.rollout.counts import GroupCounts
from hotload.rollout.group_rules import Mark
from hotload.rollout.trajectory import Weights

_SAMPLE_COLUMNS = [
    "problem_id", "sample_number", "segment_number", "segment_count", "turn_count", "reward",
    "advantage", "mark", "failure", "weights", "identity", "identities", "attempts",
    "latency_seconds", "prompt_token_count", "cached_prompt_token_count",
    "completion_token_count", "is_hedge",
    "finish_reason", "replica",
]  # fmt: skip
TWO_VERSIONS = "two versions of the weights"
_SHOWN_COLUMNS = ["prompt", "answer", "text", "transcript", "detail", "reward_parts"]


@dataclass(frozen=True, slots=True)
class Shown:
    """One sample to look at, and why this one; texts are whole and as the model wrote them."""

    why: tuple[str, ...]
    facts: dict[str, Any]
    """The columns of its first row."""


@dataclass(slots=True)
class Figures:
    """Numbers over all samples of a run's cycle that were added, failed ones included."""

    run_id: str
    """Names the policy versions: an identity of another run is none of them."""
    scored_group_count: int = 0
    """Groups with a reward."""
    latency_seconds: list[float] = field(default_factory=list)
    """Of samples with an answer."""
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    filtered_reward_sum: float = 0.0
    """Of samples with an advantage."""
    token_counts: list[int] = field(default_factory=list)
    """Completion tokens per sample with an answer."""
    trainable_token_counts: list[int] = field(default_factory=list)
    """Tokens in the loss, per sample with an advantage."""
    turn_counts: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    marks: Counter[str] = field(default_factory=Counter)
    """Of groups."""
    versions: Counter[str] = field(default_factory=Counter)
    """Samples by the identity that made them, straddling ones under `first → last`."""
    versions_ahead: Counter[int] = field(default_factory=Counter)
    """Samples by how many versions the weights that made them were ahead of the dispatched ones."""
    replicas: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    """Of samples with an answer."""
    attempts: int = 0
    prompt_token_count: int = 0
    cached_prompt_token_count: int = 0
    negative_logprob_sum: float = 0.0
    sampled_token_count: int = 0
    shown: dict[str, Shown] = field(default_factory=dict)

    @property
    def sample_count(self) -> int:
        """All samples, failed ones included."""
        return sum(self.turn_counts.values())

    @property
    def entropy_nats(self) -> float | None:
        """The policy's entropy per token, estimated from its own samples."""
        count = self.sampled_token_count
        return self.negative_logprob_sum / count if count else None

    def uniform_groups(self, counts: GroupCounts) -> tuple[int, int]:
        """Groups that `groups.judge` found uniform, and all with a reward; those that were dropped
        for it, in no row and known to `counts` alone, are among both.
        """
        dropped = counts.dropped_groups.get(Mark.UNIFORM, 0)
        return self.marks[Mark.UNIFORM] + dropped, self.scored_group_count + dropped

    def percentile_seconds(self, percent: float) -> float | None:
        """Latency that so many percent of the answered samples did not exceed."""
        return float(np.percentile(self.latency_seconds, percent)) if self.latency_seconds else None

    def add(self, data: bytes) -> None:
        """Add a part, given as the Parquet bytes that `parse_rollouts` accepts."""
        rows = pl.read_parquet(
            io.BytesIO(data),
            columns=[*_SAMPLE_COLUMNS, "loss_mask", "sampling_logprobs"],
        )
        self._count_entropy(rows)
        trained = pl.col("loss_mask").list.sum().sum().over("problem_id", "sample_number")
        samples = rows.select(*_SAMPLE_COLUMNS, trained_count=trained, row=pl.int_range(pl.len()))
        samples = samples.filter(pl.col("segment_number") == 0)
        self._count_samples(samples)
        self._count_groups(samples)
        self._choose(samples, data)

    def _count_entropy(self, rows: pl.DataFrame) -> None:
        pairs = rows.filter(pl.col("loss_mask").list.len() > 0).select(
            pl.col("loss_mask").explode(), pl.col("sampling_logprobs").explode()
        )
        sampled: NDArray[np.float32] = pairs.filter("loss_mask")["sampling_logprobs"].to_numpy()
        self.negative_logprob_sum -= float(sampled.sum(dtype=np.float64))
        self.sampled_token_count += sampled.size

    def _count_samples(self, samples: pl.DataFrame) -> None:
        answered = samples.filter(pl.col("completion_token_count") > 0)
        self.latency_seconds += answered["latency_seconds"].to_list()
        self.token_counts += answered["completion_token_count"].to_list()
        self.rewards += samples["reward"].drop_nulls().to_list()
        taught = samples.filter(pl.col("advantage").is_not_null())
        self.advantages += taught["advantage"].to_list()
        self.filtered_reward_sum += float(taught["reward"].sum())
        self.trainable_token_counts += taught["trained_count"].to_list()
        self.turn_counts.update(samples["turn_count"])
        self.failures.update(samples["failure"].drop_nulls())
        self.replicas.update(samples["replica"].drop_nulls())
        self.finish_reasons.update(answered["finish_reason"].drop_nulls())
        self.attempts += int(samples["attempts"].sum())
        self.prompt_token_count += int(samples["prompt_token_count"].sum())
        self.cached_prompt_token_count += int(samples["cached_prompt_token_count"].sum())
        self.versions.update(samples_by_weights(samples))
        is_told = ~pl.col("weights").is_in([Weights.ASSUMED.value, Weights.NONE.value])
        told = samples.filter(is_told).select("identity", pl.col("identities").list.last())
        for identity, last in told.iter_rows():
            before, after = version_of(identity, self.run_id), version_of(last, self.run_id)
            if before is not None and after is not None:
                self.versions_ahead[after - before] += 1

    def _count_groups(self, samples: pl.DataFrame) -> None:
        groups = samples.group_by("problem_id").agg(
            pl.col("mark").first(), pl.col("reward").is_not_null().any().alias("is_scored")
        )
        self.scored_group_count += int(groups["is_scored"].sum())
        self.marks.update(groups["mark"].drop_nulls())

    def _choose(self, samples: pl.DataFrame, data: bytes) -> None:
        """Keep the best and the worst answer, and one where something happened."""
        scored = samples.filter(pl.col("reward").is_not_null()).sort(
            "reward", "completion_token_count", maintain_order=True
        )
        if scored.height:
            best, worst = scored.row(-1, named=True), scored.row(0, named=True)
            self._show("highest reward", best, data, lambda old: best["reward"] > old["reward"])
            self._show("lowest reward", worst, data, lambda old: worst["reward"] < old["reward"])
        odd = samples.filter(pl.col("failure").is_not_null())
        straddling = samples.filter(pl.col("weights") == Weights.STRADDLING.value)
        several = samples.filter(pl.col("turn_count") > 1).sort("turn_count", descending=True)
        for why, some in (
            ("failed", odd),
            (TWO_VERSIONS, straddling),
            ("most turns", several),
        ):
            if some.height:
                self._show(why, some.row(0, named=True), data, lambda old: False)
        if scored.height:
            middle = scored.row(scored.height // 2, named=True)
            self._show("median reward of its part", middle, data, lambda old: False)

    def _show(self, why: str, row: dict[str, Any], data: bytes, is_better: Any) -> None:
        known = self.shown.get(why)
        if known is not None and not is_better(known.facts):
            return
        texts = pl.read_parquet(io.BytesIO(data), columns=_SHOWN_COLUMNS)
        self.shown[why] = Shown((why,), row | texts.row(row["row"], named=True))

    def three(self) -> tuple[Shown, ...]:
        """Three different samples to look at, or as many as there are: the best, the worst, and one
        where something happened."""
        wanted = ("highest reward", "lowest reward", TWO_VERSIONS, "failed", "most turns")
        chosen: dict[tuple[str, int], Shown] = {}
        for why in (*wanted, "median reward of its part"):
            if shown := self.shown.get(why):
                key = (shown.facts["problem_id"], shown.facts["sample_number"])
                if why in wanted and (known := chosen.get(key)):
                    chosen[key] = Shown((*known.why, why), known.facts)
                elif len(chosen) < 3:
                    chosen.setdefault(key, shown)
        return tuple(chosen.values())
