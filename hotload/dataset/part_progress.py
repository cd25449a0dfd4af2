"""Part progress: which problems of a part are settled, and which are still to be sampled. Pure.

What earlier runs of the cycle wrote counts as much as what this one settles.
"""

from __future__ import annotations

from collections.abc import Set

from hotload.dataset.rollout_plan import PartPlan
from hotload.rollout.trajectory import Problem


class PartProgress:
    """Every problem is settled once, kept or dropped; for each dropped one, the next row of the
    part's reserve is to be sampled, as long as there are any.
    """

    def __init__(self, part: PartPlan) -> None:
        self._part = part
        self._planned_ids = frozenset(problem.id for problem in part.problems)
        self._settled_ids: set[str] = set()
        self._left_out_ids: set[str] = set()
        self._dropped_count = 0

    @property
    def settled_count(self) -> int:
        """Problems that are settled, dropped ones among them."""
        return len(self._settled_ids)

    def find(self, kept_ids: Set[str], dropped_ids: Set[str]) -> bool:
        """Take over a file with these problems, and tell whether it counts.

        It does not where another settles one of them: two runs at once wrote the same groups.
        """
        found = kept_ids | dropped_ids
        if found & self._settled_ids:
            return False
        self._settled_ids |= found
        self._dropped_count += len(dropped_ids)
        return True

    def settle(self, problem: Problem, *, is_dropped: bool) -> Problem | None:
        """Count a problem as ended; return the row to sample in its place, if it was dropped and
        there is one.
        """
        self._settled_ids.add(problem.id)
        if not is_dropped:
            return None
        number, self._dropped_count = self._dropped_count, self._dropped_count + 1
        return next(iter(self._open(self._part.reserve[number : number + 1])), None)

    def leave_out(self, problem: Problem) -> None:
        """Leave a problem for a later run."""
        self._left_out_ids.add(problem.id)

    def to_do(self) -> list[Problem]:
        """List the problems that are neither settled nor left out; rows in place of dropped ones
        come last.
        """
        return self._open((*self._part.problems, *self._part.reserve[: self._dropped_count]))

    def is_refill(self, problem: Problem) -> bool:
        """Tell whether the problem is sampled in place of a dropped one."""
        return problem.id not in self._planned_ids

    def _open(self, problems: tuple[Problem, ...]) -> list[Problem]:
        past = self._settled_ids | self._left_out_ids
        return [problem for problem in problems if problem.id not in past]
