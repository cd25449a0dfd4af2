"""The window of protocol §15, rule by rule; time is a number."""

from hypothesis import given
from hypothesis import strategies as st

from hotload.concurrency import Attempt, Window
from hotload.spec import Concurrency


def window(initial: int = 16, interval: int = 4, **fields: int) -> Window:
    spec = Concurrency(initial_window=initial, rollout_adjustment_interval=interval, **fields)
    return Window(spec)


def fill(slots: Window) -> int:
    taken = 0
    while slots.try_acquire():
        taken += 1
    return taken


def run(slots: Window, *attempts: Attempt, now: float = 0.0) -> None:
    for attempt in attempts:
        assert slots.try_acquire()
        slots.release(attempt, now)


OK = Attempt(200)


def queued(seconds: float) -> Attempt:
    return Attempt(200, prefill_queue_seconds=seconds)


def test_first_size() -> None:
    assert Window(Concurrency()).size == 8
    assert Window(Concurrency(), replica_count=3).size == 24
    assert Window(Concurrency(max_window=20), replica_count=3).size == 20
    assert Window(Concurrency(initial_window=5), replica_count=3).size == 5


def test_fixed_never_moves() -> None:
    slots = Window(Concurrency(mode="fixed", initial_window=300))
    assert fill(slots) == 300
    for _ in range(300):
        slots.release(Attempt(503), 0.0)
    assert slots.size == 300
    assert slots.end_step().congestion_responses == 300


def test_success_without_queue_times_adds_one_per_interval() -> None:
    slots = window()
    run(slots, OK, OK, OK)
    assert slots.size == 16
    run(slots, OK)
    assert slots.size == 17


def test_no_growth_without_success_and_none_with_congestion() -> None:
    slots = window()
    run(slots, *[Attempt(400)] * 4)
    assert slots.size == 16
    run(slots, OK, OK, OK, Attempt(429))
    assert slots.size == 8


def test_a_short_queue_grows_by_up_to_four_and_a_long_one_halves() -> None:
    slots = window()
    run(slots, *[queued(0.25)] * 4)
    assert slots.size == 18  # target / ema = 2
    slots = window()
    run(slots, *[queued(0.0)] * 4)
    assert slots.size == 20
    run(slots, *[queued(2.0)] * 4)  # ema 0.3 · 2.0 + 0.7 · 0.0 = 0.6
    assert slots.size == 10
    assert slots.end_step().ema_pq == 0.6


def test_queue_times_win_over_status_codes() -> None:
    slots = window()
    run(slots, OK, OK, OK, queued(2.0))
    assert slots.size == 8


def test_congestion_shrinks_at_once_and_once_per_cooldown() -> None:
    slots = window()
    run(slots, Attempt(429), now=10.0)
    assert slots.size == 8
    run(slots, Attempt(503), Attempt(None), now=10.9)
    assert slots.size == 8
    run(slots, Attempt(None, number=3), now=11.0)
    assert slots.size == 2


def test_a_swap_says_nothing_about_load() -> None:
    slots = window()
    run(slots, *[Attempt(425, is_swap=True)] * 4, *[Attempt(503, is_swap=True)] * 4)
    assert slots.size == 16


def test_shrinking_below_busy_slots_is_a_debt_that_releases_pay() -> None:
    slots = window()
    assert fill(slots) == 16
    slots.release(Attempt(429), 0.0)
    assert (slots.size, slots.in_flight, slots.debt) == (8, 15, 7)
    for left in range(6, -1, -1):
        assert not slots.try_acquire()
        slots.release(Attempt(400), 0.0)
        assert slots.debt == left
    assert not slots.try_acquire()
    slots.release(Attempt(400), 0.0)
    assert slots.try_acquire()


def test_bounds() -> None:
    slots = window(initial=2, interval=1, min_window=2, max_window=3)
    run(slots, Attempt(503), now=0.0)
    assert slots.size == 2
    run(slots, OK, OK, OK, OK)
    assert slots.size == 3


def test_the_step_report() -> None:
    slots = window()
    run(slots, Attempt(200, prompt_tokens=10, cached_prompt_tokens=4), Attempt(429), Attempt(500))
    slots.note_exhaustion()
    report = slots.end_step()
    assert (report.window, report.window_after) == (16, 8)
    assert (report.requests, report.status_responses, report.congestion_responses) == (3, 3, 1)
    assert (report.congestion_events, report.retry_exhaustions) == (1, 1)
    assert report.congestion_rate == 1 / 3
    assert report.cache_hit_rate == 0.4
    assert report.max_in_flight == 1
    assert report.avg_pq is None
    again = slots.end_step()
    assert (again.window, again.requests, again.cache_hit_rate) == (8, 0, None)


ATTEMPTS = st.builds(
    Attempt,
    st.sampled_from([200, 400, 425, 429, 503, 500, None]),
    st.integers(1, 7),
    st.none() | st.floats(0, 10),
)


@given(st.lists(st.tuples(st.booleans(), ATTEMPTS, st.floats(0, 100)), max_size=200))
def test_slots_are_never_lost(steps: list[tuple[bool, Attempt, float]]) -> None:
    slots, busy = window(initial=4, max_window=32), 0
    for takes, attempt, now in steps:
        if takes:
            busy += slots.try_acquire()
        elif busy:
            slots.release(attempt, now)
            busy -= 1
        assert slots.in_flight == busy
        assert 1 <= slots.size <= 32
    for _ in range(busy):
        slots.abandon()
    assert fill(slots) == slots.size
