"""A clock of an event loop that a test moves on, instead of waiting."""

from collections.abc import Callable


class LoopClock:
    """What waits for a time of the loop has waited as soon as the clock was moved beyond it."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self._ahead_seconds = 0.0

    def time(self) -> float:
        """Seconds, as the loop's own `time`."""
        return self._time() + self._ahead_seconds

    def pass_seconds(self, seconds: float) -> None:
        """Move on."""
        self._ahead_seconds += seconds
