"""Order among threads: results, turns, and what happens when one fails."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from threading import Barrier, Event, main_thread

import pytest

from hotload.delta.ordered_threads import Turnstile, Workers, run_in_order
from tests.signals import signals_are_heard


def test_results_keep_the_order_of_the_jobs_not_of_their_ends() -> None:
    second_ended = Event()

    def first() -> int:
        assert second_ended.wait(60)
        return 1

    def second() -> int:
        second_ended.set()
        return 2

    with Workers(2) as pool:
        assert list(run_in_order([first, second], pool, Turnstile())) == [1, 2]


def test_without_threads_the_caller_works() -> None:
    assert list(run_in_order([lambda: 1, lambda: 2], None, Turnstile())) == [1, 2]


def test_turns_pass_in_the_order_of_positions() -> None:
    turns, both, passed = Turnstile(), Barrier(2, timeout=60), []

    def job(position: int) -> Callable[[], None]:
        def run() -> None:
            both.wait()
            with turns.at(position, 5):
                passed.append(position)

        return run

    with Workers(2) as pool:
        list(run_in_order([job(0), job(5)], pool, turns))
    assert passed == [0, 5]


def test_a_failure_frees_those_who_wait_for_their_turn() -> None:
    turns = Turnstile()

    def fails() -> None:
        raise OSError("disk")

    def waits() -> None:
        with turns.at(5, 5):  # never, since the one before has failed
            raise AssertionError

    with Workers(3) as pool, pytest.raises(OSError, match="disk"):
        list(run_in_order([fails, waits, waits], pool, turns))
    with pytest.raises(CancelledError):
        turns.check()


def test_a_caller_that_leaves_stops_the_work() -> None:
    turns, started = Turnstile(), []

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(1000):
            started.append(number)
            yield lambda number=number: number

    with Workers(2) as pool:
        results = run_in_order(jobs(), pool, turns)
        assert next(results) == 0
        results.close()
    assert len(started) < 10


@signals_are_heard()
def test_an_interrupt_leaves_no_job_running() -> None:
    ended, go_on = Event(), Event()

    def slow() -> None:
        signal.pthread_kill(main_thread().ident, signal.SIGINT)
        assert go_on.wait(60)
        ended.set()

    class Interrupted(Turnstile):
        def give_up(self) -> None:
            super().give_up()
            go_on.set()

    with Workers(1) as pool:
        results = run_in_order([slow], pool, Interrupted())
        with pytest.raises(KeyboardInterrupt):
            next(results)
        assert ended.is_set()


def test_shards_that_share_threads_share_the_room_for_results() -> None:
    with Workers(4, share_count=4) as pool:
        started = []

        def jobs() -> Iterator[Callable[[], int]]:
            for number in range(100):
                started.append(number)
                yield lambda: 0

        next(results := run_in_order(jobs(), pool, Turnstile()))
        assert len(started) <= 3
        results.close()
