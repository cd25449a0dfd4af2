"""The breaker: stop beginning rows when the service fails row after row, or swaps weights without
an end (protocol §16)."""

from __future__ import annotations

from collections import deque

from hotload.rollout.failures import Action, Failure

STREAK = 5
RECENT = 20
ENOUGH = 10


class Breaker:
    """Open after 5 failed rows in a row, once half of the last 20 failed and 10 were seen, or after
    5 requests in a row that swaps of weights kept from an answer.

    It stays open: what is left is for a later run, which finds what is there.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._streak = 0
        self._swap_streak = 0

    def note(self, *, is_failure: bool) -> None:
        """Note that a row ended; failures are those that may pass, not refusals."""
        self._recent.append(is_failure)
        self._streak = self._streak + 1 if is_failure else 0
        seen = len(self._recent)
        is_half = seen >= ENOUGH and 2 * sum(self._recent) >= seen
        self.is_open = self.is_open or self._streak >= STREAK or is_half

    def note_request(self, failure: Failure | None, *, met_swap: bool) -> None:
        """Note that a request ended, none of its attempts left.

        One that waited for a swap as long as it may says more than a row: a row may be of many
        requests, be asked again, or be ended by the user's own code. Any answer, a refusal too,
        says that the service is there again.

        Args:
            failure: of its last attempt.
            met_swap: an attempt of it was refused because of a swap.
        """
        if failure is None or failure.action is Action.FAIL_SAMPLE:
            self._swap_streak = 0
        elif met_swap:
            self._swap_streak += 1
        self.is_open = self.is_open or self._swap_streak >= STREAK
