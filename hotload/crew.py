"""Shards of a directory in parallel, stopped together (no files here, threads only)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from threading import Lock
from typing import TypeVar

from hotload.in_order import Workers

# Bytes done and bytes in all; called by one thread at a time, not always the same.
Progress = Callable[[int, int], object]
OnBytes = Callable[[int], object]
T = TypeVar("T")


def for_each_shard(
    files: Iterable[str],
    work: Callable[[str, Workers | None, OnBytes], T],
    *,
    workers: int,
    total_bytes: int,
    progress: Progress | None,
) -> dict[str, T]:
    """What `work` made of each file, by file in the order given.

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

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
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
