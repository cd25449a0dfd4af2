"""The adaptive window: how many samples may be in flight (protocol §15). Pure; the clock is a
parameter.

The window is a float `w`; its usable size is `int(w)`, clamped. Growth is additive, shrinking
multiplicative, driven by the replicas' prefill queue where they report it and by status codes where
they do not. After a shrink below the slots in use, the remainder is a debt: nothing is acquired
until releases have paid it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hotload.spec import Concurrency

WINDOW_PER_REPLICA = 8
ADDITIVE_STEP = 1.0
MULTIPLICATIVE_FACTOR = 0.5
EMA_ALPHA = 0.3
SHRINK_COOLDOWN_SECONDS = 1.0
CONGESTION_CODES = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one attempt ended, as far as the window cares.

    `status_code` is the effective one, `None` after a transport error; the attempt number counts
    from 1.
    """

    status_code: int | None
    number: int = 1
    prefill_queue_seconds: float | None = None
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    is_swap: bool = False
    """Weights are being swapped or the service scales up: says nothing about load."""

    @property
    def is_congestion(self) -> bool:
        """Whether the answer says that the service has too much to do."""
        return not self.is_swap and (
            self.status_code is None or self.status_code in CONGESTION_CODES
        )


@dataclass(frozen=True, slots=True)
class StepReport:
    """The window over one step (protocol §15, step report); queue times in seconds, `None` if never
    reported.
    """

    window: int
    window_after: int
    requests: int
    status_responses: int
    congestion_responses: int
    congestion_events: int
    retry_exhaustions: int
    avg_pq: float | None
    ema_pq: float | None
    pending_decrease: int
    avg_window: float
    max_in_flight: int
    cache_hit_rate: float | None

    @property
    def congestion_rate(self) -> float:
        """Congested answers over all answers that carried no queue time."""
        return self.congestion_responses / self.status_responses if self.status_responses else 0.0


class _Step:
    """The counters of one step."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.requests = self.status_responses = self.congestion_responses = 0
        self.congestion_events = self.retry_exhaustions = self.max_in_flight = 0
        self.queue_sum, self.queue_count = 0.0, 0
        self.window_sum = 0
        self.prompt_tokens = self.cached_prompt_tokens = 0


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

    @property
    def size(self) -> int:
        """Slots there are now."""
        return int(self._width)

    @property
    def widest(self) -> int:
        """Slots there can ever be."""
        return self.size if self._is_fixed else self._spec.max_window

    @property
    def in_flight(self) -> int:
        """Slots in use."""
        return self._in_flight

    @property
    def debt(self) -> int:
        """Slots in use beyond the window, to be given back before any is acquired."""
        return max(0, self._in_flight - self.size)

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
        self._in_flight -= 1
        self._count(attempt)
        if self._is_fixed:
            return
        if attempt.prefill_queue_seconds is not None:
            self._queue_samples.append(attempt.prefill_queue_seconds)
        elif attempt.is_congestion:
            self._congestions += 1
            self._shrink_at_once(attempt.number, now)
        elif attempt.status_code is not None and 200 <= attempt.status_code < 300:
            self._successes += 1
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
            status_responses=step.status_responses,
            congestion_responses=step.congestion_responses,
            congestion_events=step.congestion_events,
            retry_exhaustions=step.retry_exhaustions,
            avg_pq=step.queue_sum / step.queue_count if step.queue_count else None,
            ema_pq=self._ema,
            pending_decrease=self.debt,
            avg_window=step.window_sum / step.requests if step.requests else float(self.size),
            max_in_flight=step.max_in_flight,
            cache_hit_rate=(
                step.cached_prompt_tokens / step.prompt_tokens if step.prompt_tokens else None
            ),
        )

    def _count(self, attempt: Attempt) -> None:
        step = self._step
        step.requests += 1
        step.window_sum += self.size
        step.prompt_tokens += attempt.prompt_tokens
        step.cached_prompt_tokens += attempt.cached_prompt_tokens
        if attempt.prefill_queue_seconds is not None:
            step.queue_sum += attempt.prefill_queue_seconds
            step.queue_count += 1
        else:
            step.status_responses += 1
            step.congestion_responses += attempt.is_congestion

    def _shrink_at_once(self, attempt_number: int, now: float) -> None:
        if self._shrunk_at is not None and now - self._shrunk_at < SHRINK_COOLDOWN_SECONDS:
            return
        self._shrunk_at = now
        self._step.congestion_events += 1
        power = 2 if attempt_number >= 3 else 1
        self._resize(self._width * MULTIPLICATIVE_FACTOR**power)

    def _adjust(self) -> None:
        if self._queue_samples:
            average = sum(self._queue_samples) / len(self._queue_samples)
            self._ema = (
                average if self._ema is None else EMA_ALPHA * average + (1 - EMA_ALPHA) * self._ema
            )
            target = self._spec.prefill_queue_target
            if self._ema > target:
                self._resize(self._width * MULTIPLICATIVE_FACTOR)
            else:
                self._resize(self._width + ADDITIVE_STEP * min(target / max(self._ema, 0.001), 4.0))
        elif self._successes and not self._congestions:
            self._resize(self._width + ADDITIVE_STEP)
        self._queue_samples.clear()
        self._successes = self._congestions = self._completed = 0

    def _resize(self, width: float) -> None:
        self._width = min(max(width, self._spec.min_window), self._spec.max_window)
