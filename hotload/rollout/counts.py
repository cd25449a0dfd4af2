"""Counts of a rollout: made once, as its groups are written, and added up from its manifest. Pure.

Sums are exact. Of numbers that are shown as a histogram or by percentiles, a `Spread` is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any, Self

from pydantic import Field

from hotload.identity import read_identity
from hotload.records import Record
from hotload.rollout.trajectory import ScoredGroup, Trajectory, Weights


class Counts(Record):
    """Numbers that can be added up, field by field."""

    @classmethod
    def total(cls, counts: Iterable[Counts]) -> Self:
        """Add up the fields of this class; `None` where one of them is `None`."""
        counts = tuple(counts)
        if not counts:
            return cls()
        return cls.model_validate(
            {name: _total([getattr(one, name) for one in counts]) for name in cls.model_fields}
        )


def _total(values: Sequence[Any]) -> Any:
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Counts):
        return type(first).total(values)
    return add_counts(values) if isinstance(first, dict) else sum(values)


def add_counts(numbers: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum counts by name, the highest first."""
    total: Counter[str] = Counter()
    for counted in numbers:
        total.update(counted)
    return dict(total.most_common())


class Spread(Counts):
    """How numbers are spread: count, sums and extremes are exact, the values themselves rounded to
    three significant digits.

    So it can be added to others without a loss, and a file of many thousand samples needs no more
    than 900 values for each power of ten.
    """

    count: int = Field(0, ge=0)
    value_sum: float = 0.0
    square_sum: float = Field(0.0, ge=0)
    least: float | None = None
    greatest: float | None = None
    by_value: dict[float, int] = Field({})
    """How many there are of each rounded value, in the order of the values."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Count finite numbers."""
        numbers = [float(value) for value in values]
        rounded = Counter(float(f"{number:.3g}") for number in numbers)
        return cls(
            count=len(numbers),
            value_sum=math.fsum(numbers),
            square_sum=math.fsum(number * number for number in numbers),
            least=min(numbers, default=None),
            greatest=max(numbers, default=None),
            by_value=dict(sorted(rounded.items())),
        )

    @classmethod
    def total(cls, counts: Iterable[Counts]) -> Self:
        """Add up spreads; what comes out does not depend on how the numbers were split."""
        spreads = [spread for spread in counts if isinstance(spread, Spread) and spread.count]
        by_value: Counter[float] = Counter()
        for spread in spreads:
            by_value.update(spread.by_value)
        return cls(
            count=sum(spread.count for spread in spreads),
            value_sum=math.fsum(spread.value_sum for spread in spreads),
            square_sum=math.fsum(spread.square_sum for spread in spreads),
            least=min((s.least for s in spreads if s.least is not None), default=None),
            greatest=max((s.greatest for s in spreads if s.greatest is not None), default=None),
            by_value=dict(sorted(by_value.items())),
        )

    @property
    def mean(self) -> float | None:
        """The mean; `None` without a number."""
        return self.value_sum / self.count if self.count else None

    @property
    def std(self) -> float | None:
        """The standard deviation of the population; `None` without a number."""
        if self.mean is None:
            return None
        return math.sqrt(max(0.0, self.square_sum / self.count - self.mean**2))

    @property
    def values(self) -> list[float]:
        """The rounded numbers, in ascending order."""
        return [value for value, count in self.by_value.items() for _ in range(count)]


class GroupCounts(Counts):
    """What the rules for groups did (protocol §16); what is in no row is counted here alone."""

    groups_by_mark: dict[str, int] = Field({})
    """Groups that are kept and not simply complete."""
    dropped_groups: dict[str, int] = Field({})
    """Groups that are not in the data, by why."""
    refilled_groups: int = Field(0, ge=0)
    """Groups that were sampled in place of dropped ones."""
    raw_samples: int = Field(0, ge=0)
    """Samples of all groups, dropped ones included."""
    raw_reward_count: int = Field(0, ge=0)
    raw_reward_sum: float = 0.0
    asked_again: dict[str, int] = Field({})
    """Samples that another was asked for in place of, by their cause of failure."""
    hedges: int = Field(0, ge=0)
    """Samples that were asked for a second time because a group waited for them alone."""
    hedges_won: int = Field(0, ge=0)
    """Those where the second answer came first."""
    cut_off: int = Field(0, ge=0)
    """Requests that were given up while under way: slower ones of a pair, and past a deadline."""
    straddling_samples: int = Field(0, ge=0)
    """Samples that more than one version of the weights made."""
    tokens_masked: int = Field(0, ge=0)
    """Tokens from a change of weights on, where the rules keep those out of the loss; those that
    tools and users said in between, which are never in it, are among them."""
    attempts: int = Field(0, ge=0)
    """Requests sent for all samples: dropped, replaced and cut-off ones included."""
    failed_attempts: dict[str, int] = Field({})
    """Those of them that got no usable answer, by what they met: the status of an error, be it sent
    before the answer or inside a 200 (`429`), or else the cause (`connection`, `truncated`);
    `cancelled` are those that were given up while under way. `attempts` is the number of requests
    that were answered (be it beyond `max_seq_len`) plus the sum of these. At most one key for each
    status from 400 to 599, for each `Cause`, `cancelled`, and for each word of an unusable end
    (`unusable_end:content_filter`)."""


ASSUMED = " (assumed)"


class SampleCounts(Counts):
    """Numbers over the samples of groups that were kept, failed ones included, behind a cycle's
    metrics and its page. An answered sample is one with a token."""

    scored_group_count: int = Field(0, ge=0)
    """Groups with a reward."""
    rewards: Spread = Spread()
    trained_count: int = Field(0, ge=0)
    """Samples with an advantage."""
    trained_reward_sum: float = 0.0
    trained_tokens: Spread = Spread()
    """Tokens in the loss, of each sample with an advantage."""
    latency_seconds: Spread = Spread()
    """Of answered samples."""
    completion_tokens: Spread = Spread()
    """Of answered samples."""
    length_limited_count: int = Field(0, ge=0)
    """Answered samples that ended at the limit of tokens."""
    turns: Spread = Spread()
    """Turns of each sample."""
    versions_ahead: Spread = Spread()
    """By how many versions the weights that made a sample were ahead of those it was sent to."""
    prompt_token_count: int = Field(0, ge=0)
    cached_prompt_token_count: int = Field(0, ge=0)
    sampled_token_count: int = Field(0, ge=0)
    """Tokens the policy sampled and the rules did not mask."""
    logprob_sum: float = 0.0
    """Of those, in nats."""


class RolloutCounts(Counts):
    """What is in a file of groups, or in all files of a rollout."""

    group_count: int = Field(0, ge=0)
    sample_count: int = Field(0, ge=0)
    failed_samples: dict[str, int] = Field({})
    samples_by_identity: dict[str, int] = Field({})
    reward_count: int = Field(0, ge=0)
    reward_sum: float = 0.0
    completion_token_count: int = Field(0, ge=0)
    groups: GroupCounts = GroupCounts()
    samples: SampleCounts | None = None
    """`None` of a file that a version of hotload wrote which did not count them."""


def count_groups(kept: Sequence[ScoredGroup], rules: GroupCounts, *, run_id: str) -> RolloutCounts:
    """Count what is written to one file.

    Args:
        kept: the groups in it.
        rules: what the rules did in these groups and in those that they dropped.
        run_id: names the policy versions: an identity of another run is none of them.
    """
    samples = [sample for group in kept for sample in group.trajectories_G]
    rewards = [one for group in kept for one in group.rewards_G if one is not None]
    made_by = Counter(name for sample in samples if (name := weights_name(sample)) is not None)
    return RolloutCounts(
        group_count=len(kept),
        sample_count=len(samples),
        failed_samples=dict(count_failures(samples).most_common()),
        samples_by_identity=dict(made_by.most_common()),
        reward_count=len(rewards),
        reward_sum=math.fsum(rewards),
        completion_token_count=sum(sample.completion_token_count for sample in samples),
        groups=rules,
        samples=_count_samples(kept, samples, rewards, run_id),
    )


def _count_samples(
    kept: Sequence[ScoredGroup],
    samples: Sequence[Trajectory],
    rewards: Sequence[float],
    run_id: str,
) -> SampleCounts:
    answered = [sample for sample in samples if sample.completion_token_count > 0]
    trained = [
        (sample, reward or 0.0)
        for group in kept
        for sample, reward, advantage in zip(
            group.trajectories_G, group.rewards_G, group.advantages_G, strict=True
        )
        if advantage is not None
    ]
    segments = [segment for sample in samples for segment in sample.segments]
    return SampleCounts(
        scored_group_count=sum(
            any(reward is not None for reward in group.rewards_G) for group in kept
        ),
        rewards=Spread.of(rewards),
        trained_count=len(trained),
        trained_reward_sum=math.fsum(reward for _, reward in trained),
        trained_tokens=Spread.of(
            sum(segment.loss_mask_T.count(True) for segment in sample.segments)
            for sample, _ in trained
        ),
        latency_seconds=Spread.of(sample.latency_seconds for sample in answered),
        completion_tokens=Spread.of(sample.completion_token_count for sample in answered),
        length_limited_count=sum(sample.finish_reason == "length" for sample in answered),
        turns=Spread.of(sample.turn_count for sample in samples),
        versions_ahead=Spread.of(
            ahead for sample in samples if (ahead := _versions_ahead(sample, run_id)) is not None
        ),
        prompt_token_count=sum(sample.prompt_token_count for sample in samples),
        cached_prompt_token_count=sum(sample.cached_prompt_token_count for sample in samples),
        sampled_token_count=sum(segment.loss_mask_T.count(True) for segment in segments),
        logprob_sum=math.fsum(
            sum(compress(segment.sampling_logprobs_T, segment.loss_mask_T)) for segment in segments
        ),
    )


def count_failures(samples: Iterable[Trajectory]) -> Counter[str]:
    """Count failed samples by cause."""
    return Counter(sample.failure for sample in samples if sample.failure is not None)


def weights_name(sample: Trajectory) -> str | None:
    """Name the weights that made a sample: `first → … → last` where it straddles a swap,
    `… (assumed)` where its answer did not name any; `None` without tokens.
    """
    weights, origin = sample.weights, sample.provenance
    if weights is Weights.NONE:
        return None
    if weights is Weights.ASSUMED:
        return f"{origin.identity}{ASSUMED}"
    return " → ".join(origin.observed)


def unnamed_samples(summary: RolloutSummary) -> int:
    """Count the samples whose answers named no weights, where others of the rollout did."""
    unnamed = [
        count for name, count in summary.samples_by_identity.items() if name.endswith(ASSUMED)
    ]
    return 0 if len(unnamed) == len(summary.samples_by_identity) else sum(unnamed)


def _versions_ahead(sample: Trajectory, run_id: str) -> int | None:
    if sample.weights in (Weights.ASSUMED, Weights.NONE):
        return None
    before = read_identity(sample.provenance.identity)
    after = read_identity(sample.provenance.observed[-1])
    # Between two lines there is no number of steps.
    if before is None or after is None or before[:2] != after[:2] or before.run_id != run_id:
        return None
    return after.policy_version - before.policy_version


class RolloutSummary(Record):
    """The samples of one cycle in numbers; `parts_uri` is the directory with the scored groups."""

    identity: str
    group_count: int = Field(ge=0)
    sample_count: int = Field(ge=0)
    failed_samples: dict[str, int] = Field({})
    """Samples without a reward, by cause; they stay in the data, marked."""
    samples_by_identity: dict[str, int] = Field({})
    """Samples by the identity that answered them."""
    mean_reward: float | None = None
    completion_token_count: int = Field(0, ge=0)
    found_sample_count: int = Field(0, ge=0)
    """Those of the samples that an earlier run of this cycle wrote: `seconds` is without theirs."""
    found_token_count: int = Field(0, ge=0)
    """Completion tokens of those."""
    parts_uri: str = ""
    declaration_sha256: str = ""
    """Of problems, sampling and reward as they were declared; empty where an earlier version of
    hotload sampled."""
    seconds: float = Field(0, ge=0)
    """Wall seconds of sampling and scoring in the run that handed them back."""
    groups: GroupCounts = GroupCounts()
    """What the rules for groups did."""
    window_trace: tuple[tuple[float, int, int], ...] = ()
    """The window through time, thinned out: (seconds since sampling began, slots, slots in
    use)."""

    @property
    def samples_per_second(self) -> float | None:
        """Rate of the run that handed them back, what it found left out; `None` if it found all."""
        return self._per_second(self.sample_count - self.found_sample_count)

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens in the same way."""
        return self._per_second(self.completion_token_count - self.found_token_count)

    def _per_second(self, count: int) -> float | None:
        is_sampled = self.sample_count > self.found_sample_count
        return count / self.seconds if is_sampled and self.seconds else None


def rule_rows(groups: GroupCounts) -> dict[str, str]:
    """Word what the rules did, one row each."""
    hedged = f"{groups.hedges} ({groups.hedges_won} came first)" if groups.hedges else ""
    masked = f", {groups.tokens_masked} tokens masked" if groups.tokens_masked else ""
    refilled = f", {groups.refilled_groups} refilled" if groups.refilled_groups else ""
    dropped = join_counts(groups.dropped_groups)
    failed = in_words(groups.failed_attempts).items()
    return {
        "groups, marked": join_counts(groups.groups_by_mark),
        "groups, dropped": dropped and dropped + refilled,
        "samples asked again": join_counts(groups.asked_again),
        "samples hedged": hedged,
        "samples cut off": str(groups.cut_off or ""),
        "requests sent again or given up": ", ".join(f"{number} × {met}" for met, number in failed),
        "samples straddling": str(groups.straddling_samples or "") + masked,
    }


def in_words(failed_attempts: dict[str, int]) -> dict[str, int]:
    """Failed attempts by what they met, the most frequent first: `HTTP 429`, `swap timeout`,
    `unusable end: content_filter`.
    """
    counted = Counter(failed_attempts).most_common()
    return {_in_words(met): number for met, number in counted}


def _in_words(met: str) -> str:
    if met.isdigit():
        return f"HTTP {met}"
    cause, separator, word = met.partition(":")
    return cause.replace("_", " ") + (f": {word}" if separator else "")


def join_counts(numbers: dict[str, int]) -> str:
    """`{a: 3, b: 1}` as `a 3, b 1`."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
