"""The samples of a cycle in figures, for its metrics and its page: read off the counts that its
manifest has of every part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hotload.dataset.rollout_plan import RolloutManifest
from hotload.dataset.sample_extracts import ExtractReason, SampleExtract, merge_extracts
from hotload.rollout.counts import GroupCounts, RolloutCounts, SampleCounts
from hotload.rollout.group_rules import Mark

SHOWN_COUNT = 3


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A sample to look at, and why this one."""

    reasons: tuple[ExtractReason, ...]
    extract: SampleExtract


@dataclass(frozen=True, slots=True)
class SampleStatistics:
    """Figures over the samples of groups that were kept, failed ones included."""

    counts: SampleCounts
    shown: tuple[ShownSample, ...] = ()
    """Different samples to look at: the best, the worst, and one where something happened."""

    @classmethod
    def of(cls, manifest: RolloutManifest) -> SampleStatistics | None:
        """Add up the parts of a rollout; `None` where an earlier version of hotload wrote one and
        did not count its samples.
        """
        counts = RolloutCounts.total(manifest.parts).samples
        if counts is None and manifest.parts:
            return None
        return cls(counts or SampleCounts(), _three_of(merge_extracts(manifest.extracts)))

    @property
    def entropy_nats(self) -> float | None:
        """The policy's entropy per token, estimated from its own samples."""
        count = self.counts.sampled_token_count
        return -self.counts.logprob_sum / count if count else None

    def latency_percentile(self, percent: float) -> float | None:
        """Return the seconds that so many percent of the answered samples did not exceed."""
        seconds = self.counts.latency_seconds.values
        return float(np.percentile(seconds, percent)) if seconds else None

    def uniform_groups(self, rules: GroupCounts) -> tuple[int, int]:
        """Count the groups that `judge_group` found uniform, and all with a reward; those that were
        dropped for it, in no row and known to `rules` alone, are among both.
        """
        dropped = rules.dropped_groups.get(Mark.UNIFORM, 0)
        kept = rules.groups_by_mark.get(Mark.UNIFORM, 0)
        return kept + dropped, self.counts.scored_group_count + dropped


def _three_of(extracts: tuple[SampleExtract, ...]) -> tuple[ShownSample, ...]:
    chosen: dict[tuple[str, int], ShownSample] = {}
    for extract in extracts:
        key = extract.problem_id, extract.sample_number
        if known := chosen.get(key):
            if extract.reason is not ExtractReason.MEDIAN_REWARD:  # it only fills up
                chosen[key] = ShownSample((*known.reasons, extract.reason), known.extract)
        elif len(chosen) < SHOWN_COUNT:
            chosen[key] = ShownSample((extract.reason,), extract)
    return tuple(chosen.values())
