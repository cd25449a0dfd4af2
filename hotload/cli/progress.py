"""A progress bar on a terminal: bytes, rate, time left. Nothing where there is no terminal."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from hotload.quantities import size

_SECONDS_BETWEEN_DRAWINGS = 0.1
_ERASE = "\r\x1b[K"


class ProgressBar:
    """Draws a line over the last one. Any thread may call it."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label, self._stream = label, stream
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._drawn = -_SECONDS_BETWEEN_DRAWINGS

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of so many are done."""
        with self._lock:
            seconds = time.monotonic() - self._started
            if done < total and seconds - self._drawn < _SECONDS_BETWEEN_DRAWINGS:
                return
            self._drawn = seconds
            line = _line(self._label, done, total, seconds, shutil.get_terminal_size().columns)
            self._stream.write(f"\r{line}\x1b[K")
            self._stream.flush()

    def erase(self) -> None:
        """Leave the terminal as it was."""
        with self._lock:
            self._stream.write(_ERASE)
            self._stream.flush()


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressBar | None]:
    """Show a bar on standard error until the block ends; None where that is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bar = ProgressBar(label, sys.stderr)
    try:
        yield bar
    finally:
        bar.erase()


def _line(label: str, done: int, total: int, seconds: float, columns: int) -> str:
    part = done / total if total else 1.0
    rate = done / seconds if seconds > 0 else 0.0
    left = f"{_clock((total - done) / rate)} left" if rate else ""
    figures = f"{size(done)} of {size(total)}  {size(int(rate))}/s  {left}"
    width = max(0, min(30, columns - len(label) - len(figures) - 12))
    bar = "#" * int(part * width)
    return f"{label} {part:4.0%} [{bar:<{width}}] {figures}"[: max(0, columns - 1)]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
