"""Rules for groups: what is asked for again, when a second request is worth it, what becomes of a
group that is not complete or teaches nothing (protocol §16, §17). Pure.

A draw is one request for one sample of a group. Sample `n` of G has number `n`; the r-th time it is
asked for, `n + r·G`, so that every draw has a seed and a request id of its own and a restarted
cycle asks for the very same ones. A hedge repeats a draw: same number, same seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from hotload.options import Groups
from hotload.rollout.counts import GroupCounts, RolloutSummary
from hotload.rollout.failures import Cause
from hotload.rollout.straddling import masked_count
from hotload.rollout.trajectory import (
    Problem,
    Provenance,
    ScoredGroup,
    Trajectory,
    Weights,
    sample_seed,
)

# What a later run may mend; a request that is refused, or too long, is so every time.
OUTAGES = frozenset(
    {
        Cause.TIMEOUT,
        Cause.TURN_TIMEOUT,
        Cause.OVERLOADED,
        Cause.SERVER_ERROR,
        Cause.CONNECTION,
        Cause.TRUNCATED,
        Cause.SWAP_TIMEOUT,
        Cause.MALFORMED,
        Cause.MISSING_TOKEN_IDS,
        Cause.MISSING_LOGPROBS,
    }
)
# As long as nothing was said: what cut it short was not the user's own code.
CUT_SHORT = frozenset({Cause.DEADLINE, Cause.TRAJECTORY_TIMEOUT})
# Asked again, these would end the same way, or too late.
FINAL = frozenset({Cause.REFUSED, Cause.UNUSABLE_END, Cause.DEADLINE, Cause.STALE})


class Mark(StrEnum):
    """What became of a group that is not simply complete."""

    PARTIAL = "partial"  # used with fewer samples than asked for
    INCOMPLETE = "incomplete"  # too few samples, kept to be looked at and not to be trained on
    UNIFORM = "uniform"  # all rewards are equal: every advantage is 0
    STALE = "stale"  # never begun, the service had moved on


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """A scored group with its mark, and whether it is dropped for that instead of kept."""

    group: ScoredGroup
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class SettledGroup:
    """A group that has ended; its counts and its name are all that is written of a dropped one."""

    group: ScoredGroup
    counts: GroupCounts
    is_dropped: bool


def draw_number(position: int, round_number: int, group_size: int) -> int:
    """Compute the number of a sample's draw in the given round, which counts from 0."""
    return position + round_number * group_size


def to_ask_again(
    samples_G: Sequence[Trajectory], rules: Groups, rounds_done: int
) -> tuple[int, ...]:
    """Positions in the group to be drawn once more; none where the rules allow no further round.

    Args:
        rounds_done: how often the missing samples were asked for again so far.
    """
    if rules.on_incomplete != "refill" or rounds_done >= rules.max_incomplete_group_retries:
        return ()
    return tuple(
        position
        for position, sample in enumerate(samples_G)
        if sample.failure is not None and sample.failure not in FINAL
    )


def seconds_to_hedge(
    pending_count: int, alone_seconds: float, rules: Groups, *, is_hedged: bool
) -> float | None:
    """Compute the seconds until the one draw a group still waits for is asked for a second time.

    0 is now, `None` never: several are pending, or the rules have no hedges, or there is one.

    Args:
        alone_seconds: how long the group has waited for nothing else.
    """
    if rules.hedge_after_seconds is None or is_hedged or pending_count != 1:
        return None
    return max(0.0, rules.hedge_after_seconds - alone_seconds)


def judge_group(group: ScoredGroup, rules: Groups) -> JudgedGroup:
    """Decide what becomes of a scored group.

    Short of samples it is `incomplete`, without advantages, or `partial` where the rules accept
    that and it has its quorum. With one distinct reward it is `uniform`: kept, or dropped. A group
    of one sample is never uniform, since it was not meant to be compared.
    """
    size = len(group.trajectories_G)
    rewards = [reward for reward in group.rewards_G if reward is not None]
    if len(rewards) < size:
        has_quorum = len(rewards) >= rules.min_group_size
        if rules.on_incomplete != "accept_partial" or not has_quorum:
            return JudgedGroup(_unused(group, Mark.INCOMPLETE))
    if size > 1 and len(set(rewards)) <= 1:
        # Where others take their place, `rollout_plan` has set them aside.
        is_dropped = rules.on_uniform != "keep"
        return JudgedGroup(replace(group, mark=Mark.UNIFORM.value), is_dropped)
    if len(rewards) < size:
        return JudgedGroup(replace(group, mark=Mark.PARTIAL.value))
    return JudgedGroup(group)


def usable_count(summary: RolloutSummary) -> int:
    """Count the groups of a rollout that have advantages."""
    marked = summary.groups.groups_by_mark
    return summary.group_count - marked.get(Mark.INCOMPLETE, 0) - marked.get(Mark.STALE, 0)


def _unused(group: ScoredGroup, mark: Mark) -> ScoredGroup:
    return replace(group, advantages_G=(None,) * len(group.advantages_G), mark=mark.value)


def stale_group(
    problem: Problem, group_size: int, *, identity: str, policy_version: int, run_seed: int
) -> ScoredGroup:
    """Make a group that was never begun, since the service had moved on: no request was sent for
    it.
    """
    samples = tuple(
        Trajectory(
            problem.id,
            number,
            sample_seed(run_seed, problem.id, policy_version, number),
            Provenance(identity, request_id="", session_id="", attempts=0),
            latency_seconds=0.0,
            turn_count=0,
            failure=Cause.STALE.value,
            detail="the service was ahead by more versions than the spec allows",
        )
        for number in range(group_size)
    )
    nothing = (None,) * group_size
    return ScoredGroup(problem, samples, nothing, nothing, mark=Mark.STALE.value)


def token_count(sample: Trajectory) -> int:
    """Completion tokens of all its segments."""
    return sum(len(segment.token_ids_T) for segment in sample.segments)


def is_outage(samples_G: Sequence[Trajectory]) -> bool:
    """Tell whether at least half of a row failed by what may pass: what the breaker counts.

    Samples that were cut short count where none of the row got an answer: a deadline that is tight
    is no outage. Those that were never sent do not count: the service had no part in them.
    """
    counts = _may_pass if is_unanswered(samples_G) else _is_outage
    failed = sum(sample.provenance.attempts > 0 and counts(sample) for sample in samples_G)
    return failed > 0 and 2 * failed >= len(samples_G)


def is_unanswered(samples_G: Sequence[Trajectory]) -> bool:
    """Tell whether all of a row failed by what may pass: recorded, it would count as done."""
    return all(map(_may_pass, samples_G))


def _may_pass(sample: Trajectory) -> bool:
    if sample.failure in CUT_SHORT:
        return token_count(sample) == 0
    return _is_outage(sample) or sample.failure == Cause.REWARD_UNAVAILABLE


def _is_outage(sample: Trajectory) -> bool:
    return sample.failure in OUTAGES


class Sent(Protocol):
    """Requests that were sent for one draw, and what those met that got no usable answer."""

    @property
    def attempts(self) -> int: ...
    @property
    def failed_attempts(self) -> tuple[str, ...]: ...


@dataclass(slots=True)
class GroupTally:
    """What the rules did in one group, while it is sampled."""

    asked_again: Counter[str] = field(default_factory=Counter)
    """Draws that were replaced by another, by what they had failed with."""
    attempts: int = 0
    """Requests behind draws that are in no group any more."""
    failed_attempts: Counter[str] = field(default_factory=Counter)
    """Those of them that got no usable answer, by what they met."""
    hedges: int = 0
    hedges_won: int = 0
    cut_off: int = 0
    """Draws that were ended before they had: the slower of a pair, or those past a deadline."""

    def replace(self, sample: Trajectory) -> None:
        """Count `sample`, which had failed and in whose place another was asked for."""
        self.asked_again[str(sample.failure)] += 1
        self.leave_out(sample.provenance)

    def leave_out(self, sent: Sent) -> None:
        """Count a draw that is in no group; the requests behind it were sent all the same."""
        self.attempts += sent.attempts
        self.failed_attempts.update(sent.failed_attempts)

    def settle(self, judged: JudgedGroup, rules: Groups, *, is_refill: bool) -> SettledGroup:
        """Count one group that has ended.

        Args:
            is_refill: it was sampled in place of a dropped one.
        """
        group, is_dropped = judged.group, judged.is_dropped
        samples_G = group.trajectories_G
        straddling = [sample for sample in samples_G if sample.weights is Weights.STRADDLING]
        is_masking = rules.on_straddling == "mask_from_change"
        rewards = [reward for reward in group.rewards_G if reward is not None]
        failed = self.failed_attempts.copy()
        for sample in samples_G:
            failed.update(sample.provenance.failed_attempts)
        counts = GroupCounts(
            groups_by_mark={group.mark: 1} if group.mark and not is_dropped else {},
            dropped_groups={group.mark: 1} if group.mark and is_dropped else {},
            refilled_groups=int(is_refill),
            raw_samples=len(samples_G),
            raw_reward_count=len(rewards),
            raw_reward_sum=float(sum(rewards)),
            asked_again=dict(self.asked_again),
            hedges=self.hedges,
            hedges_won=self.hedges_won,
            cut_off=self.cut_off,
            attempts=self.attempts + sum(s.provenance.attempts for s in samples_G),
            failed_attempts=dict(failed),
            straddling_samples=len(straddling),
            tokens_masked=sum(map(masked_count, straddling)) if is_masking else 0,
        )
        return SettledGroup(group, counts, is_dropped)
