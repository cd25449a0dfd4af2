"""Lines: what a run is when its trainer resumes from an earlier version than it has published.

Line 0 begins a run. A trainer that resumes raises the line, whose first version then stands in
place of that version of the lines before, and of all that came after it there: they are superseded.
So a version may be there once in every line, and one of them is the run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from hotload.errors import InvalidIdentityError


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a run after line 0, each with the first version it has."""

    first_versions: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, versions: Iterable[tuple[int, int]]) -> Self:
        """Learn the lines from (line, policy version) of what there is of a run."""
        first: dict[int, int] = {}
        for line, version in versions:
            if line:
                first[line] = min(version, first.get(line, version))
        return cls(first)

    @property
    def current(self) -> int:
        """The newest line, which alone may publish."""
        return max(self.first_versions, default=0)

    def line_at(self, policy_version: int) -> int:
        """Find the line that this version of the run belongs to."""
        begun = (line for line, first in self.first_versions.items() if first <= policy_version)
        return max(begun, default=0)

    def until(self, line: int) -> Lines:
        """Return the lines as they were before any after `line` began."""
        return Lines({one: first for one, first in self.first_versions.items() if one <= line})

    def is_superseded(self, line: int, policy_version: int) -> bool:
        """Tell whether a later line began at this version of `line`, or before it."""
        return self.line_at(policy_version) > line

    def refuse_older(self, name: str, line: int) -> None:
        """Return if `line`, of the cycle `name`, is the newest, or a new one.

        Raises:
            InvalidIdentityError: it is older; a trainer that goes on there would take the replicas
                back to weights that the run has left.
        """
        if line < self.current:
            began = f"line {self.current} of this run began at version"
            reason = (
                f"{began} {self.first_versions[self.current]}, and this cycle is of line {line}"
            )
            remedy = f"stop this trainer; if it is the one to go on, `line: {self.current + 1}`"
            raise InvalidIdentityError(name, f"{reason}: {remedy}")


NO_LINES = Lines()
"""A run that has line 0 alone."""


def raise_line(line: int) -> str:
    """Word the remedy for a trainer of `line` whose version was published before."""
    return f"if the trainer resumed from an earlier version, raise `line` to {line + 1}"
