"""The adaptive window: how many samples may be in flight (protocol §15). Pure; the clock is a
parameter.

The window is a float `w`; its usable size is `int(w)`, clamped. Growth is additive, shrinking
multiplicative, driven by the replicas' prefill queue where they report it and by status codes where
they do not. After a shrink below the slots in use, the remainder is a debt: nothing is acquired
until releases have paid it.

Beyond the vendor's rules, the window remembers how wide it was before a time of congestion: ten
seconds of refusals leave one slot, and one more per interval would take thousands of samples to
come back. A run of calm attempts ends such a time; every half run doubles the window, up to what it
was. Where that brings the congestion back three times, the service has less to give than it had.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hotload.http_status import StatusMeaning, meaning_of
from hotload.options import WINDOW_LIMIT, Concurrency

WINDOW_PER_REPLICA = 8
ADDITIVE_STEP = 1.0
MULTIPLICATIVE_FACTOR = 0.5
EMA_ALPHA = 0.3
SHRINK_COOLDOWN_SECONDS = 1.0
DEEP_SHRINK = 4  # one halving is the ordinary saw tooth
CALM_RUN = 16
RECOVERIES = 3
TRACE_LIMIT = 2000
TRACE_STEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one attempt ended, as far as the window cares.

    `status_code` is the effective one, `None` after a transport error; the attempt number counts
    from 1; `seconds` is how long it took.
    """

    status_code: int | None
    number: int = 1
    prefill_queue_seconds: float | None = None
    seconds: float = 0.0
    is_swap: bool = False
    """Weights are being swapped or the service scales up: says nothing about load."""

    @property
    def is_congestion(self) -> bool:
        """Whether the answer says that the service has too much to do."""
        if self.is_swap:
            return False
        return self.status_code is None or meaning_of(self.status_code) is StatusMeaning.BUSY

    @property
    def is_success(self) -> bool:
        """Whether there was a good answer."""
        return self.status_code is not None and meaning_of(self.status_code) is StatusMeaning.GOOD


@dataclass(frozen=True, slots=True)
class StepReport:
    """The window over one step, as much of protocol §15's report as is logged. `requests` ended by
    themselves; `avg_pq` is the mean of the queue times in seconds, `None` if none was reported.
    """

    window: int
    window_after: int
    requests: int
    max_in_flight: int
    congestion_responses: int
    retry_exhaustions: int
    avg_pq: float | None

    def describe(self) -> str:
        """Say what the window did, for a reader."""
        queue = "not known" if self.avg_pq is None else f"{self.avg_pq:.3g} s"
        return (
            f"{self.requests} requests, window {self.window} → {self.window_after}, at most "
            f"{self.max_in_flight} in flight, {self.congestion_responses} congested answers, "
            f"{self.retry_exhaustions} samples out of attempts, prefill queue on average {queue}"
        )


class TracePoint(NamedTuple):
    """The window when an attempt ended, with that attempt still in flight: its slot goes to the
    next that waits. Seconds of the clock that `Window.release` is given.
    """

    seconds: float
    size: int
    in_flight: int


class _Step:
    """The counters of one step."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.requests = self.max_in_flight = 0
        self.congestion_responses = self.retry_exhaustions = 0
        self.queue_sum, self.queue_count = 0.0, 0


class _Memory:
    """The width before a time of congestion, and when to go back to it."""

    def __init__(self) -> None:
        self.width: float | None = None
        self.calm = 0
        """Attempts in a row, sent after the last sign of load, that showed none."""
        self._loaded_at = -math.inf
        self._tries_left = RECOVERIES
        self._is_recovering = False

    def note_load(self, now: float) -> None:
        """Note an attempt that says the service has much to do."""
        self.calm = 0
        self._loaded_at = now

    def note_calm(self, sent_at: float) -> None:
        """Note an attempt that does not; one sent before the last that did says nothing new."""
        self.calm += sent_at >= self._loaded_at

    def note_shrink(self, width: float) -> None:
        """Note that the window shrinks from `width`."""
        self._is_recovering = False
        if self.width is None:
            self.width = width

    def note_quiet_growth(self, width: float) -> None:
        """Note that the window has grown to `width` after an interval without congestion."""
        if self._is_recovering:
            return
        if self.width is None or width > self.width / DEEP_SHRINK:
            self.width = None
            self._tries_left = RECOVERIES

    def wider(self, width: float) -> float | None:
        """Return the next width on the way back, if one is due."""
        if self.width is None or self.calm < CALM_RUN or self.calm % (CALM_RUN // 2):
            return None
        if not self._is_recovering:
            if width > self.width / DEEP_SHRINK:
                return None
            if not self._tries_left:
                self.width = None
                return None
            self._tries_left -= 1
            self._is_recovering = True
        wider = min(2 * width, self.width)
        if wider == self.width:
            self.width = None
            self._is_recovering = False
        return wider


class Window:
    """Slots for attempts: `try_acquire`, then `release` with how the attempt ended.

    Args:
        replica_count: for the initial window where none is declared; `None` counts as one.
    """

    def __init__(self, spec: Concurrency, *, replica_count: int | None = None) -> None:
        initial = spec.initial_window or WINDOW_PER_REPLICA * (replica_count or 1)
        self._spec = spec
        self._is_fixed = spec.mode == "fixed"
        self._width = float(initial)
        if not self._is_fixed:
            self._width = min(max(self._width, spec.min_window), spec.max_window)
        self._in_flight = 0
        self._ema: float | None = None
        self._shrunk_at: float | None = None
        self._queue_samples: list[float] = []
        self._successes = self._congestions = self._completed = 0
        self._step = _Step(self.size)
        self._memory = _Memory()
        self._trace: list[TracePoint] = []
        self._latest: TracePoint | None = None
        self._moments, self._trace_stride = 0, 1

    @property
    def size(self) -> int:
        """Slots there are now."""
        return int(self._width)

    @property
    def widest(self) -> int:
        """Slots there can ever be."""
        return self.size if self._is_fixed else self._spec.max_window

    @property
    def width(self) -> float:
        """What the window is, of which its slots are the whole part."""
        return self._width

    def shift(self, slots: float) -> None:
        """Add slots, or take some: what windows elsewhere have less, or more, of the same service.
        A fixed window stays as it is."""
        if not self._is_fixed:
            self._resize(self._width + slots)

    @property
    def in_flight(self) -> int:
        """Slots in use."""
        return self._in_flight

    def try_acquire(self) -> bool:
        """Take a slot, if one is free."""
        if self._in_flight >= self.size:
            return False
        self._in_flight += 1
        self._step.max_in_flight = max(self._step.max_in_flight, self._in_flight)
        return True

    def abandon(self) -> None:
        """Give a slot back that saw no answer: the attempt was cancelled."""
        self._in_flight -= 1

    def release(self, attempt: Attempt, now: float) -> None:
        """Give a slot back and learn from how its attempt ended; `now` is a monotonic time in
        seconds.
        """
        self._count(attempt)
        if not self._is_fixed:
            self._learn(attempt, now)
        self._record(now)
        self._in_flight -= 1

    def trace(self) -> Sequence[TracePoint]:
        """Return the path of the window through time: its changes, at most some 2,000, evenly
        thinned.
        """
        if self._latest is None or self._trace[-1] is self._latest:
            return tuple(self._trace)
        return (*self._trace, self._latest)

    def _record(self, now: float) -> None:
        last = self._latest
        if last and last.size == self.size and now - last.seconds < TRACE_STEP_SECONDS:
            return
        self._latest = TracePoint(now, self.size, self._in_flight)
        if self._moments % self._trace_stride == 0:
            self._trace.append(self._latest)
        self._moments += 1
        if len(self._trace) > TRACE_LIMIT:
            del self._trace[1::2]
            self._trace_stride *= 2

    def _learn(self, attempt: Attempt, now: float) -> None:
        if attempt.prefill_queue_seconds is not None:
            self._queue_samples.append(attempt.prefill_queue_seconds)
        elif attempt.is_congestion:
            self._congestions += 1
            self._shrink_at_once(attempt.number, now)
        elif attempt.is_success:
            self._successes += 1
        self._recover(attempt, now)
        self._completed += 1
        if self._completed >= self._spec.rollout_adjustment_interval:
            self._adjust()

    def note_exhaustion(self) -> None:
        """Count a sample that ran out of retries."""
        self._step.retry_exhaustions += 1

    def end_step(self) -> StepReport:
        """Adjust once more, report the step, begin the next."""
        if not self._is_fixed:
            self._adjust()
        step, self._step = self._step, _Step(self.size)
        return StepReport(
            window=step.window,
            window_after=self.size,
            requests=step.requests,
            max_in_flight=step.max_in_flight,
            congestion_responses=step.congestion_responses,
            retry_exhaustions=step.retry_exhaustions,
            avg_pq=step.queue_sum / step.queue_count if step.queue_count else None,
        )

    def _count(self, attempt: Attempt) -> None:
        step = self._step
        step.requests += 1
        if attempt.prefill_queue_seconds is not None:
            step.queue_sum += attempt.prefill_queue_seconds
            step.queue_count += 1
        else:
            step.congestion_responses += attempt.is_congestion

    def _shrink_at_once(self, attempt_number: int, now: float) -> None:
        if self._shrunk_at is not None and now - self._shrunk_at < SHRINK_COOLDOWN_SECONDS:
            return
        self._shrunk_at = now
        power = 2 if attempt_number >= 3 else 1
        self._shrink(MULTIPLICATIVE_FACTOR**power)

    def _shrink(self, factor: float) -> None:
        self._memory.note_shrink(self._width)
        self._resize(self._width * factor)

    def _recover(self, attempt: Attempt, now: float) -> None:
        queued = attempt.prefill_queue_seconds or 0.0
        if attempt.is_congestion or queued > self._spec.prefill_queue_target:
            self._memory.note_load(now)
        elif attempt.is_success:
            self._memory.note_calm(now - attempt.seconds)
            width = self._memory.wider(self._width)
            if width is not None:
                self._ema = attempt.prefill_queue_seconds  # what it averaged is over
                self._queue_samples.clear()
                self._resize(width)

    def _adjust(self) -> None:
        if self._queue_samples:
            average = sum(self._queue_samples) / len(self._queue_samples)
            self._ema = (
                average if self._ema is None else EMA_ALPHA * average + (1 - EMA_ALPHA) * self._ema
            )
            target = self._spec.prefill_queue_target
            if self._ema > target:
                self._shrink(MULTIPLICATIVE_FACTOR)
            else:
                self._grow(ADDITIVE_STEP * min(target / max(self._ema, 0.001), 4.0))
        elif self._successes and not self._congestions:
            self._grow(ADDITIVE_STEP)
        self._queue_samples.clear()
        self._successes = self._congestions = self._completed = 0

    def _grow(self, step: float) -> None:
        self._resize(self._width + step)
        if self._memory.calm >= self._spec.rollout_adjustment_interval:
            self._memory.note_quiet_growth(self._width)

    def _resize(self, width: float) -> None:
        self._width = min(max(width, self._spec.min_window), self._spec.max_window)


class SharedWindow(Window):
    """One window whose slots are held elsewhere, a share of them in each place; it learns from the
    attempts of all.
    """

    def __init__(self, spec: Concurrency, *, replica_count: int | None = None) -> None:
        super().__init__(spec, replica_count=replica_count)
        self._held: Counter[int] = Counter()

    def take(self, place: int, attempt: Attempt, in_flight: int, now: float) -> None:
        """Learn from how an attempt ended in a place, one of the `in_flight` there."""
        self._held[place] = in_flight
        self._in_flight = self._held.total()
        self._step.max_in_flight = max(self._step.max_in_flight, self._in_flight)
        self.release(attempt, now)
        self._held[place] -= 1

    def share(self, count: int) -> list[int]:
        """Share the slots there are now out between so many places."""
        return _deal(self.size, count)


def divide_window(
    spec: Concurrency, count: int, *, replica_count: int | None = None
) -> list[Concurrency]:
    """Divide a window into `count` windows, of at least a slot each, that have its slots
    together."""

    def dealt(slots: int) -> list[int]:
        return [max(1, share) for share in _deal(slots, count)]

    first = min(spec.initial_window or WINDOW_PER_REPLICA * (replica_count or 1), WINDOW_LIMIT)
    sizes = zip(dealt(first), dealt(spec.min_window), dealt(spec.max_window), strict=True)
    return [
        spec.model_copy(update={"initial_window": initial, "min_window": least, "max_window": most})
        for initial, least, most in sizes
    ]


def _deal(slots: int, count: int) -> list[int]:
    """Deal slots out into so many shares, as equal as whole numbers are."""
    return [slots // count + (number < slots % count) for number in range(count)]
