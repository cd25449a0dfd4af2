"""The breaker: stop beginning rows when the service fails row after row (protocol §16)."""

from __future__ import annotations

from collections import deque

STREAK = 5
RECENT = 20
ENOUGH = 10


class Breaker:
    """Open after 5 failed rows in a row, or once half of the last 20 failed and 10 were seen.

    It stays open: what is left is for a later run, which finds what is there.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._streak = 0

    def note(self, *, is_failure: bool) -> None:
        """Note that a row ended; failures are those that may pass, not refusals."""
        self._recent.append(is_failure)
        self._streak = self._streak + 1 if is_failure else 0
        seen = len(self._recent)
        is_half = seen >= ENOUGH and 2 * sum(self._recent) >= seen
        self.is_open = self.is_open or self._streak >= STREAK or is_half
