"""Ten bad seconds in numbers: a simulated service slows down tenfold and refuses a fifth."""

import heapq
import random
from dataclasses import dataclass, field

import pytest

from hotload.options import Concurrency
from hotload.rollout.failures import RetryBudget, failure_of_status
from hotload.rollout.window import Attempt, Window

BAD_FROM, BAD_UNTIL = 20.0, 30.0
INTERVAL = 32


@dataclass
class Run:
    """What came of a run: when samples ended, how many requests were sent, how many lost."""

    ended: list[float] = field(default_factory=list)
    requests: int = 0
    lost: int = 0


def simulate(width: int, *, tells_queue: bool, samples: int, seed: int, forever: bool) -> Run:
    """Sample with the real window and budgets against numbers; time is virtual."""
    chance = random.Random(seed)
    window = Window(Concurrency(initial_window=width, max_window=width))
    run = Run()
    budgets = {number: RetryBudget(600, chance.random) for number in range(samples)}
    ready = list(range(samples))[::-1]
    events: list[tuple[float, int, int, Attempt | None]] = []
    now = 0.0
    while events or ready:
        while ready and window.try_acquire():
            number = ready.pop()
            run.requests += 1
            is_bad = now >= BAD_FROM and (now < BAD_UNTIL or forever)
            tries = budgets[number].transient_count + 1
            if is_bad and chance.random() < 0.2:
                seconds = 0.01
                attempt = Attempt(429, tries, seconds=seconds)
            else:
                # Ten times slower, and the queue of the service tells so where it tells anything.
                queue = (2.0 if is_bad else 0.02) if tells_queue else None
                seconds = 0.2 * chance.uniform(0.8, 1.2) * (10 if is_bad else 1)
                attempt = Attempt(200, tries, queue, seconds=seconds)
            heapq.heappush(events, (now + seconds, run.requests, number, attempt))
        now, order, number, ended = heapq.heappop(events)
        if ended is None:
            ready.append(number)
            continue
        window.release(ended, now)
        if ended.status_code == 200:
            run.ended.append(now)
            continue
        wait = budgets[number].wait_seconds(failure_of_status(429, "", ""))
        if wait is None:
            run.lost += 1
        else:
            heapq.heappush(events, (now + wait, order, number, None))
    return run


@pytest.mark.parametrize("tells_queue", [False, True])
@pytest.mark.parametrize("width", [32, 64, 256])
@pytest.mark.parametrize("seed", range(3))
def test_throughput_is_back_within_three_intervals(
    tells_queue: bool, width: int, seed: int
) -> None:
    samples = width * 5 * 40
    run = simulate(width, tells_queue=tells_queue, samples=samples, seed=seed, forever=False)
    assert (run.lost, len(run.ended)) == (0, samples)
    assert run.requests < 1.5 * samples
    before = sum(BAD_FROM - 5 <= at < BAD_FROM for at in run.ended) / 5
    assert before > 0.9 * width / 0.2
    during = sum(BAD_FROM + 5 <= at < BAD_UNTIL for at in run.ended) / 5
    assert during < 0.1 * before
    after = [at for at in run.ended if at >= BAD_UNTIL]
    back = after[3 * INTERVAL]
    later = sum(back <= at < back + 2 for at in run.ended) / 2
    assert later > 0.9 * before


@pytest.mark.parametrize("tells_queue", [False, True])
def test_a_service_that_stays_bad_is_not_stormed(tells_queue: bool) -> None:
    run = simulate(64, tells_queue=tells_queue, samples=7000, seed=0, forever=True)
    assert len(run.ended) + run.lost == 7000
    assert run.requests < 1.5 * 7000
