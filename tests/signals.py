"""Signals that are heard wherever the tests are started from."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_are_heard() -> Iterator[None]:
    """Let interrupts, hangups and requests to end do what they do by default.

    `nohup` ignores hangups and a shell ignores interrupts for its background jobs; what is ignored
    stays so in every child. Also decorates a test.
    """
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, default) for number, default in defaults.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
