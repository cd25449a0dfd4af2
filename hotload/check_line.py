"""One line of a connection's check: a question, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckLine:
    """One thing that was looked at.

    `stops` says whether it must be put right before a cycle can run; otherwise a line that is not
    `ok` warns.
    """

    name: str
    ok: bool
    found: str
    advice: str = ""
    stops: bool = True

    def __str__(self) -> str:
        mark = "ok" if self.ok else "MISSING" if self.stops else "warning"
        advice = f" {self.advice}." if self.advice and not self.ok else ""
        return f"{mark:8} {self.name}: {self.found}.{advice}"
