"""Work in several threads whose results, or some of whose steps, keep their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from threading import Condition, Lock
from typing import TypeVar

T = TypeVar("T")


class Workers(ThreadPoolExecutor):
    """Threads for the pieces of a shard; several shards may share them.

    numpy, zstd and the checksums release the interpreter lock, so threads use every core there is.
    """

    def __init__(self, count: int, share_count: int = 1) -> None:
        """`share_count` shards use these threads at a time."""
        super().__init__(count, thread_name_prefix="hotload")
        self.count, self.share_count = count, share_count


class Turnstile:
    """Lets one thread at a time pass, in the order of positions that follow one another.

    For sums over a file that several threads read. A thread whose turn cannot come any more, since
    another has failed, gets a CancelledError.
    """

    def __init__(self) -> None:
        self._position = 0
        self._is_over = False
        self._moved = Condition()

    @contextmanager
    def at(self, position: int, size: int) -> Iterator[None]:
        """Wait for `position`; the next turn is `size` further."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_over or self._position == position)
            self.check()
        yield
        with self._moved:
            self._position = position + size
            self._moved.notify_all()

    def check(self) -> None:
        """Return if the work goes on.

        Raises:
            CancelledError: it does not.
        """
        if self._is_over:
            raise CancelledError

    def give_up(self) -> None:
        """Let nobody wait any longer."""
        with self._moved:
            self._is_over = True
            self._moved.notify_all()


def run_in_order(
    jobs: Iterable[Callable[[], T]], pool: Workers | None, turns: Turnstile
) -> Generator[T, None, None]:
    """Run the jobs, a few at a time, and yield their results in order.

    Without a pool the caller does the work. When a job or the caller fails, their turns stop
    the others, and none is running once this ends.
    """
    if pool is None:
        yield from (job() for job in jobs)
        return
    jobs = iter(jobs)
    running = _Running()
    under_way: deque[Future[T]] = deque()
    # As many again as there are threads, so that none waits for the collector.
    width = max(2, 2 * pool.count // pool.share_count)
    try:
        under_way.extend(pool.submit(running.run, job) for job in islice(jobs, width))
        while under_way:
            result = under_way.popleft().result()
            under_way.extend(pool.submit(running.run, job) for job in islice(jobs, 1))
            yield result
    except BaseException:
        turns.give_up()
        raise
    finally:
        running.end()


class _Running:
    """Knows which jobs run, whatever became of their futures: an interrupt may lose one."""

    def __init__(self) -> None:
        self._count = 0
        self._is_over = False
        self._changed = Condition()

    def run(self, job: Callable[[], T]) -> T:
        with self._changed:
            if self._is_over:
                raise CancelledError
            self._count += 1
        try:
            return job()
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Let no job begin any more, and wait for those that run."""
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: self._count == 0)


# Bytes done and bytes in all; called by one thread at a time, not always the same.
ByteProgress = Callable[[int, int], object]
OnBytes = Callable[[int], object]


def for_each_shard(
    files: Iterable[str],
    work: Callable[[str, Workers | None, OnBytes], T],
    *,
    workers: int,
    total_bytes: int,
    progress: ByteProgress | None,
) -> dict[str, T]:
    """Run `work` on each file in parallel; return its results by file, in the order given.

    It is handed `workers` threads for the pieces of a shard, none where that is one, and is to tell
    the bytes it has done as it goes: that is also where it is stopped, by a CancelledError, once
    another shard has failed or the caller was interrupted. No thread is left when this ends.
    """
    files = list(files)
    meter = _Meter(total_bytes, progress)
    driver_count = min(workers, max(1, len(files)))
    drivers = ThreadPoolExecutor(driver_count, "hotload-shard")
    pool = Workers(workers, driver_count) if workers > 1 else None
    try:
        under_way = {file: drivers.submit(work, file, pool, meter.add) for file in files}
        for future in as_completed(under_way.values()):
            future.result()
        return {file: future.result() for file, future in under_way.items()}
    except BaseException:
        meter.stop()
        raise
    finally:
        drivers.shutdown(cancel_futures=True)
        if pool:
            pool.shutdown(cancel_futures=True)


class _Meter:
    """Adds up what all threads have done, and stops them."""

    def __init__(self, total_bytes: int, progress: ByteProgress | None) -> None:
        self._total_bytes, self._progress = total_bytes, progress
        self._done_bytes, self._is_stopped = 0, False
        self._lock = Lock()

    def add(self, size_bytes: int) -> None:
        if self._is_stopped:
            raise CancelledError
        if self._progress:
            with self._lock:
                self._done_bytes += size_bytes
                self._progress(self._done_bytes, self._total_bytes)

    def stop(self) -> None:
        self._is_stopped = True
