"""Counts of a rollout: groups, samples, tokens, rewards, as they are made and added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from hotload.records import Record


class GroupCounts(Record):
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
    """Those of them that got no usable answer, by what they met: the status of an error, be it told
    before the answer or inside a 200 (`429`), or else the cause (`connection`, `truncated`);
    `cancelled` are those that were given up while under way. `attempts` is the number of requests
    that were answered (be it beyond `max_seq_len`) plus the sum of these. At most one key for each
    status from 400 to 599, for each `Cause`, and `cancelled`."""

    @classmethod
    def total(cls, counts: Iterable[GroupCounts]) -> GroupCounts:
        """The sum, field by field."""
        counts = tuple(counts)
        total: dict[str, object] = {}
        for name, declared in cls.model_fields.items():
            values = [getattr(each, name) for each in counts]
            total[name] = added(values) if isinstance(declared.default, dict) else sum(values)
        return cls.model_validate(total)


class RolloutSummary(Record):
    """What the samples of one cycle came to; `parts_uri` is the directory with the scored
    groups."""

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


def _told(groups: GroupCounts) -> dict[str, str]:
    """The rules that did something, in words."""
    hedged = f"{groups.hedges} ({groups.hedges_won} came first)" if groups.hedges else ""
    masked = f", {groups.tokens_masked} tokens masked" if groups.tokens_masked else ""
    refilled = f", {groups.refilled_groups} refilled" if groups.refilled_groups else ""
    dropped = counts(groups.dropped_groups)
    failed = in_words(groups.failed_attempts).items()
    return {
        "groups, marked": counts(groups.groups_by_mark),
        "groups, dropped": dropped and dropped + refilled,
        "samples asked again": counts(groups.asked_again),
        "samples hedged": hedged,
        "samples cut off": str(groups.cut_off or ""),
        "requests sent again or given up": ", ".join(f"{number} × {met}" for met, number in failed),
        "samples straddling": str(groups.straddling_samples or "") + masked,
    }


def added(numbers: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts by name, summed, the highest first."""
    total: Counter[str] = Counter()
    for each in numbers:
        total.update(each)
    return dict(total.most_common())


def in_words(failed_attempts: dict[str, int]) -> dict[str, int]:
    """Failed attempts by what they met, the most frequent first: `HTTP 429`, `swap timeout`."""
    counted = Counter(failed_attempts).most_common()
    return {
        f"HTTP {met}" if met.isdigit() else met.replace("_", " "): number for met, number in counted
    }


def counts(numbers: dict[str, int]) -> str:
    """`{a: 3, b: 1}` as `a 3, b 1`."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
